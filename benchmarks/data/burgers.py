"""Burgers' equation, the regression data of Section 6: initial state -> state at time one.

    u_t + (u^2 / 2)_x = nu u_xx,   x in [0, 2 pi) periodic,   t from 0 to 1,   nu = 0.1

With this viscosity the solution is smooth, so it is solved on a few hundred points and *evaluated*
on the paper's 8192 points by its Fourier series, which is exact. Only the solver's grid is cached
(8 MB). Where the user has the paper's own file, it is read instead.

Units: x in radians, u and t dimensionless.
"""

from pathlib import Path
from typing import NamedTuple

import exponax
import jax
import jax.numpy as jnp
import numpy as np
import scipy.io
from rich.progress import track

from benchmarks.data.files import require

DOMAIN = 2 * np.pi
FINE_POINTS = 8192
COARSE_POINTS = 256
MAT_FILE = "burgers_data_R10.mat"
MAT_SOURCE = "https://github.com/neuraloperator/neuraloperator (data sets of the FNO paper)"


class BurgersSettings(NamedTuple):
    """Everything that determines the data; it is the key of the cache."""

    num_samples: int = 2048  # number of initial states
    seed: int = 0  # of the initial states, independent of any training seed
    viscosity: float = 0.1  # nu
    num_points: int = 512  # points (and so twice the modes) of the solver's grid
    # Time step. The fourth-order steps leave an error of 1e-8 at 0.01, float32 one of 5e-7.
    dt: float = 0.01


class Fields(NamedTuple):
    """Pairs of functions on one grid."""

    initial: np.ndarray  # u(x, 0), shape (samples, points)
    final: np.ndarray  # u(x, 1), shape (samples, points)


class Splits(NamedTuple):
    """The paper's split: 1448 to train and 200 to choose the rate, 400 to test on the fine grid."""

    train: Fields
    validation: Fields
    test: Fields


DEFAULTS = BurgersSettings()


def load_burgers(
    cache_folder: Path, settings: BurgersSettings = DEFAULTS, mat: Path | None = None
) -> Splits:
    """The three splits, generated on the first call and read from `cache_folder` afterwards.

    With the paper's file `mat` nothing is generated or cached. Training and validation fields are
    on 256 points, test fields on 8192, float32.
    """
    if mat is not None:
        return split(read_mat(mat))
    name = "burgers_" + "_".join(str(value) for value in settings) + ".npz"
    path = cache_folder / name
    if path.exists():
        with np.load(path) as arrays:
            fields = Fields(arrays["initial"], arrays["final"])
    else:
        fields = solve_burgers(settings)
        cache_folder.mkdir(parents=True, exist_ok=True)
        # Written under another name first: an interrupted run must not leave half a cache behind.
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **fields._asdict())
        partial.rename(path)
    return split(fields)


def read_mat(path: Path) -> Fields:
    """The paper's `burgers_data_R10.mat`, of MATLAB's format 5, or 7.3 if h5py is installed.

    Returns fields on the points of the file, (2048, 8192) in the original. Raises
    FileNotFoundError, ImportError (format 7.3 without h5py) or ValueError (not `a` and `u` of one
    shape).
    """
    if path.suffix != ".mat":
        path = path / MAT_FILE
    require(path, "a MATLAB file with a = u(x, 0) and u = u(x, 1), (samples, points)", MAT_SOURCE)
    try:
        arrays = scipy.io.loadmat(path, variable_names=("a", "u"))
    except NotImplementedError:  # how SciPy says 7.3, which is HDF5
        arrays = _read_mat_73(path)
    if not {"a", "u"} <= set(arrays) or arrays["a"].shape != arrays["u"].shape:
        raise ValueError(
            f"{path} must hold `a` and `u` of one shape (samples, points); it holds "
            f"{ {name: np.shape(arrays[name]) for name in arrays if name[0] != '_'} }."
        )
    return Fields(arrays["a"].astype(np.float32), arrays["u"].astype(np.float32))


def _read_mat_73(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"{path} is of MATLAB's format 7.3 (HDF5). Either install h5py, or convert the file "
            "once, in MATLAB: load(file, 'a', 'u'); save(file, 'a', 'u', '-v7')."
        ) from error
    with h5py.File(path) as file:  # MATLAB writes by column: the axes come out reversed
        return {name: file[name][()].T for name in ("a", "u") if name in file}


def split(fields: Fields) -> Splits:
    """Split in the paper's proportions, 1448 : 200 : 400, and evaluate on the two grids."""
    num_samples = len(fields.initial)
    num_train = num_samples * 1448 // 2048
    num_validation = num_samples * 200 // 2048

    def part(start: int, stop: int, num_points: int) -> Fields:
        return resample(Fields(*(values[start:stop] for values in fields)), num_points)

    return Splits(
        train=part(0, num_train, COARSE_POINTS),
        validation=part(num_train, num_train + num_validation, COARSE_POINTS),
        test=part(num_train + num_validation, num_samples, FINE_POINTS),
    )


def initial_states(settings: BurgersSettings) -> np.ndarray:
    """Gaussian random fields with spectrum 25 / ((2 pi k)^2 + 25), k >= 1, without a mean.

    u(x, 0) on the solver's grid, (samples, points), of variance 0.35.
    """
    num_points = settings.num_points
    k = np.arange(1, num_points // 2)
    scale = np.sqrt(2) * 25 / ((2 * np.pi * k) ** 2 + 25)
    rng = np.random.default_rng(settings.seed)
    cosines, sines = rng.standard_normal((2, settings.num_samples, len(k))) * scale
    coefficients = np.zeros((settings.num_samples, num_points // 2 + 1), complex)
    coefficients[:, 1:-1] = (cosines - 1j * sines) * num_points / 2
    return np.fft.irfft(coefficients, num_points)


def solve_burgers(settings: BurgersSettings) -> Fields:
    """Solve from t = 0 to 1 with exponential time differencing (ETDRK4), dealiased; float32."""
    stepper = exponax.stepper.Burgers(
        num_spatial_dims=1,
        domain_extent=DOMAIN,
        num_points=settings.num_points,
        dt=settings.dt,
        diffusivity=settings.viscosity,
        convection_scale=1.0,  # exponax has the 1/2 of (u^2 / 2)_x built in
        conservative=True,
        order=4,
    )
    # In Fourier space throughout: a step then costs no transforms but those of its nonlinearity.
    step = jax.jit(jax.vmap(stepper.step_fourier))
    initial = initial_states(settings).astype(np.float32)
    state = jnp.fft.rfft(initial, axis=1)[:, None, :]
    for _ in track(
        range(round(1 / settings.dt)), f"Solving Burgers' equation, {len(initial)} initial states"
    ):
        state = jax.block_until_ready(step(state))
    final = jnp.fft.irfft(state[:, 0, :], settings.num_points, axis=1)
    return Fields(initial, np.asarray(final, np.float32))


def resample(fields: Fields, num_points: int) -> Fields:
    """Evaluate the Fourier series on another grid; the coarse grids are subsets of the fine one."""

    def evaluate(values: np.ndarray) -> np.ndarray:
        n = values.shape[1]
        if num_points <= n:  # keep the points, do not filter: what a subsampled fine grid shows
            return values[:, :: n // num_points]
        coefficients = np.fft.rfft(values, axis=1)
        return np.fft.irfft(coefficients, num_points, axis=1) * np.float32(num_points / n)

    return Fields(evaluate(fields.initial), evaluate(fields.final))


def grid(num_points: int) -> np.ndarray:
    """The points x_j = 2 pi j / num_points, in radians."""
    return (np.arange(num_points) * (DOMAIN / num_points)).astype(np.float32)
