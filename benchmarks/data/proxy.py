"""Proxy variables (Xu et al., 2021): two designs whose confounder is seen in two proxies only.

demand: a price and ticket sales, both moved by the hidden demand d; its proxies are two costs,
which move the price, and the views of a page. With psi as in `demand.py`, xi noise of variance 1,

    z = (2 sin(2 pi d / 10), 2 cos(2 pi d / 10)) + xi,   w = 7 psi(d) + 45 + xi,
    a = 35 + (z_1 + 3) psi(d) + z_2 + xi,   y = a min(exp((w - a) / 10), 5) - 5 psi(d) + xi

dsprites: a heart's image a, whose hidden vertical position moves the outcome, too; its proxies are
z, scale, orientation and horizontal position, and w, another image at the same height:

    y = f(a) (posY - 15.5)^2 / 85.25 + xi / 2,   posY = 0 .. 31, of mean factor 1

Bottom of the benchmarks: NumPy only, knows neither models nor cfll.
"""

from typing import NamedTuple

import numpy as np

from benchmarks.data import dsprites
from benchmarks.data.demand import as_columns, psi

PRICES = np.linspace(10, 30, 10)
TRUTH_SEED, TRUTH_DRAWS = 42, 10_000  # as published, so that errors are of the same truth
FIXED_HEART = {"scale": 3, "orientation": 0, "posX": 16}  # classes of the outcome proxy

SETUPS = {
    "demand": "A price and its sales, as published; the truth at ten prices. No activation after "
    "the last layer, as in the updated code.",
    "dsprites": "Hearts rendered by us, the updated outcome (published errors are of another one), "
    "hidden widths {:g} times the published ones.",
}
# Why claims do not hold, as far as it was found out, of the recorded presets.
REASONS = {
    "demand": "Reasons, as far as found. Proximal and ridge heads, tuned alike, are level: the "
    "ranges between quartiles overlap at each N, for refitted and for current heads. The original "
    "depends on how long its settings are searched for: from one start its medians were 37, 30 and "
    "27, from three they are those above. Current heads want smaller rates than refitted ones: at "
    "the settings chosen for refitted ones, proximal, they err by 45, 93 and 70. NMMR has one "
    "stage. At a rate of 0.003 rounding decides a run: seeds 0 to 9 made again on another machine "
    "moved the median from 27 to 37.6 at N = 1000 (proximal, refitted), by less than 2 in the "
    "other rows of proximal heads, and by nothing with tuned ridge heads, whose rates are 0.0003.",
    "dsprites": "Reason: batch norm. Stage 2 makes 20 updates in all, after which the running "
    "statistics that evaluation takes still hold 12 % of their start (0.9 to the power of 20). "
    "Current heads were solved on features that were normalized by the batch; refitted ones are "
    "solved on evaluated features. So current heads lag for all methods, the one of full batches "
    "included, whose heads are exact at each step.",
}
# Lower quartile, median and upper quartile of 20 seeds (Kompa et al., 2022), or the median alone.
PUBLISHED: dict[str, dict[int, tuple[float, ...]]] = {
    "DFPV": {1000: (36, 41.8, 51), 5000: (45, 48.2, 55), 10_000: (36, 87, 535)},
    "NMMR-U": {1000: (23.7,), 5000: (16.2,), 10_000: (14.3,)},
    "KPV": {1000: (470,), 5000: (481,), 10_000: (471,)},
    "2SLS": {1000: (82,), 5000: (82,), 10_000: (82,)},
}


class Train(NamedTuple):
    """What is observed, all float32.

    Attributes:
      treatment: a, prices (n, 1) or noisy images (n, 4096).
      treatment_proxy: z, costs (n, 2) or latent values (n, 3).
      outcome_proxy: w, views (n, 1) or noisy images (n, 4096).
      outcome: y, (n, 1).
    """

    treatment: np.ndarray
    treatment_proxy: np.ndarray
    outcome_proxy: np.ndarray
    outcome: np.ndarray


class Grid(NamedTuple):
    """Treatments (n, ...) and the mean outcome f if they were set, (n, 1), float32."""

    treatment: np.ndarray
    structural: np.ndarray


class ProxyData(NamedTuple):
    """Observations to train on, and where the truth is known."""

    train: Train
    test: Grid


class Standardized(NamedTuple):
    """Data of mean 0 and standard deviation 1 in every column, and the way back.

    Attributes:
      data: the outcome, and f with it, in standard deviations of the observed outcome.
      outcome_scale: that standard deviation.
    """

    data: ProxyData
    outcome_scale: float


def make_demand(num_train: int, seed: int) -> ProxyData:
    """Draw observations; the truth at ten prices is the same for every seed."""
    rng = np.random.default_rng(seed)
    d = rng.uniform(0, 10, num_train)
    noise = rng.standard_normal((5, num_train))
    cost1 = 2 * np.sin(2 * np.pi * d / 10) + noise[0]
    cost2 = 2 * np.cos(2 * np.pi * d / 10) + noise[1]
    price = 35 + (cost1 + 3) * psi(d) + cost2 + noise[2]
    views = _views(d, noise[3])
    sales = _sales(price, views, d) + noise[4]
    train = Train(as_columns(price), as_columns(cost1, cost2), as_columns(views), as_columns(sales))
    return ProxyData(train, Grid(as_columns(PRICES), as_columns(_mean_sales())))


def _views(d: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return 7 * psi(d) + 45 + noise


def _sales(price: np.ndarray, views: np.ndarray, d: np.ndarray) -> np.ndarray:
    return price * np.minimum(np.exp((views - price) / 10), 5) - 5 * psi(d)


def _mean_sales() -> np.ndarray:
    """The truth at `PRICES`, by the mean over draws of demand and views."""
    rng = np.random.default_rng(TRUTH_SEED)
    d = rng.uniform(0, 10, TRUTH_DRAWS)
    views = _views(d, rng.standard_normal(TRUTH_DRAWS))
    return np.array([_sales(price, views, d).mean() for price in PRICES])


def make_dsprites(num_train: int, seed: int, hearts: dsprites.Hearts) -> ProxyData:
    """Draw observations of the updated outcome; the 588 test images are the same for every seed."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(dsprites.CLASSES, size=(num_train, 4))
    fixed = classes.copy()
    fixed[:, :3] = tuple(FIXED_HEART.values())
    treatment, outcome_proxy = (
        hearts(each)
        + dsprites.NOISE * rng.standard_normal((num_train, dsprites.PIXELS), np.float32)
        for each in (classes, fixed)
    )
    factor = (classes[:, 3:] - 15.5) ** 2 / 85.25
    outcome = dsprites.structural(treatment) * factor + rng.normal(scale=0.5, size=(num_train, 1))
    proxy = dsprites.latent_values(classes)[:, :3]
    arrays = (treatment, proxy, outcome_proxy, outcome)
    images = hearts(dsprites.grid_classes())
    grid = Grid(images, dsprites.structural(images).astype(np.float32))
    return ProxyData(Train(*(array.astype(np.float32) for array in arrays)), grid)


def standardize(data: ProxyData) -> Standardized:
    """Every column of the observations to mean 0 and standard deviation 1, the grid likewise."""
    means = Train(*(array.mean(0, dtype=np.float64) for array in data.train))
    scales = Train(*(array.std(0, dtype=np.float64) for array in data.train))

    def scaled(array: np.ndarray, name: str) -> np.ndarray:
        mean, scale = getattr(means, name), getattr(scales, name)
        return ((array - mean) / scale).astype(np.float32)

    train = Train(*map(scaled, data.train, Train._fields))
    grid = Grid(scaled(data.test.treatment, "treatment"), scaled(data.test.structural, "outcome"))
    return Standardized(ProxyData(train, grid), float(scales.outcome[0]))
