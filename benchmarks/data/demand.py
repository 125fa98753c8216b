"""The demand design: ticket sales by price, confounded; fully synthetic (Xu et al., 2020).

    P = 25 + (C + 3) psi(T) + V,   Y = f(P, T, S) + e,   f(p, t, s) = 100 + (10 + p) s psi(t) - 2 p

The noise in the price and that in the sales correlate by rho, so a regression of sales on price is
biased. The cost C moves only the price: (C, T, S) is the instrument.

Units: price and cost in dollars, time t in [0, 10] through the year, customer type s in 1 .. 7,
sales in tickets.
"""

from typing import NamedTuple

import numpy as np

NUM_VALIDATION = 400


class Train(NamedTuple):
    """What is observed, all float32."""

    treatment: np.ndarray  # price, (n, 1)
    covariate: np.ndarray  # time and customer type, (n, 2)
    instrument: np.ndarray  # cost, time and customer type, (n, 3)
    outcome: np.ndarray  # sales, (n, 1)


class Grid(NamedTuple):
    """Points where the truth is known, float32."""

    treatment: np.ndarray  # price, (n, 1)
    covariate: np.ndarray  # time and customer type, (n, 2)
    structural: np.ndarray  # f, (n, 1)


class DemandData(NamedTuple):
    """Observations to train on, 400 points of the grid to select by, 2400 to report."""

    train: Train
    validation: Grid
    test: Grid


def psi(t: np.ndarray) -> np.ndarray:
    """Demand through the year, a parabola-like curve with a peak at t = 5."""
    return 2 * ((t - 5) ** 4 / 600 + np.exp(-4 * (t - 5) ** 2) + t / 10 - 2)


def structural(p: np.ndarray, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Sales f(p, t, s) without noise."""
    return 100 + (10 + p) * s * psi(t) - 2 * p


def sample(num_samples: int, seed: int, rho: float = 0.5) -> Train:
    """Draw observations; rho is the correlation of the noise in price and in sales, -1 to 1."""
    if not -1 <= rho <= 1:
        raise ValueError(f"rho is a correlation, between -1 and 1, not {rho}.")
    rng = np.random.default_rng(seed)
    s = rng.integers(1, 8, num_samples)
    t = rng.uniform(0, 10, num_samples)
    cost, price_noise, other_noise = rng.standard_normal((3, num_samples))
    price = 25 + (cost + 3) * psi(t) + price_noise
    sales_noise = rho * price_noise + np.sqrt(1 - rho**2) * other_noise
    return Train(
        treatment=as_columns(price),
        covariate=as_columns(t, s),
        instrument=as_columns(cost, t, s),
        outcome=as_columns(structural(price, t, s) + sales_noise),
    )


def make_demand(num_train: int, seed: int, rho: float = 0.5) -> DemandData:
    """Draw observations (Xu et al.: 1000, 5000, 10,000); grid and split are the same for all seeds.

    The grid of 20 prices x 20 times x 7 types is 400 points to validate and 2400 to test on.
    """
    axes = np.meshgrid(
        np.linspace(10, 25, 20), np.linspace(0, 10, 20), np.arange(1, 8), indexing="ij"
    )
    p, t, s = (axis.reshape(-1) for axis in axes)
    grid = Grid(as_columns(p), as_columns(t, s), as_columns(structural(p, t, s)))
    order = np.random.default_rng(0).permutation(len(p))
    validation, test = (
        Grid(*(values[part] for values in grid)) for part in np.split(order, [NUM_VALIDATION])
    )
    return DemandData(sample(num_train, seed, rho), validation, test)


def as_columns(*columns: np.ndarray) -> np.ndarray:
    """Vectors (n,) as a matrix (n, k), float32."""
    return np.stack(columns, axis=1).astype(np.float32)
