"""Problems with prescribed singular values, and with features as networks have them."""

from typing import NamedTuple

import numpy as np

SPECTRUM = "spectrum"
STRUCTURES = ("dead", "repeated", "collinear", "scaled")


class Size(NamedTuple):
    """Shape of a problem."""

    n: int  # samples
    d: int  # features
    bias: bool  # whether there is a bias, one more unknown


class Settings(NamedTuple):
    """What is measured."""

    num_seeds: int = 3  # random problems per case
    num_outputs: int = 4  # o
    # Name -> shape. With fewer samples than unknowns there are no cases without penalty.
    sizes: tuple[tuple[str, Size], ...] = (
        ("tall", Size(96, 24, True)),
        ("tall, no bias", Size(96, 24, False)),
        ("wide", Size(24, 96, True)),
    )
    # Largest over smallest singular value of the features with the ones column.
    conditions: tuple[float, ...] = (1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8, 1e10, 1e12)
    # `lam` of these, as shares of the largest eigenvalue of the Gram matrix.
    penalties: tuple[float, ...] = (0, 1e-8, 1e-4)
    # `lam` of the features as networks have them, as it is.
    paper_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    dtypes: tuple[str, ...] = ("float32", "float64")  # of the data and of the solve


class Case(NamedTuple):
    """Random problems of one kind; the key of a record, with the solver."""

    dtype: str  # "float32" or "float64", of the data and of the solve
    kind: str  # `SPECTRUM` or one of `STRUCTURES`
    size: Size  # the shape
    penalty: float  # of `Settings.penalties` for `SPECTRUM`, of `Settings.paper_penalties` else
    condition: float | None  # for `SPECTRUM`, of `Settings.conditions`; else None


def cases(settings: Settings) -> list[Case]:
    """All of them, spectra first."""
    found = [
        Case(dtype, SPECTRUM, size, penalty, condition)
        for dtype in settings.dtypes
        for _, size in settings.sizes
        for penalty in settings.penalties
        for condition in settings.conditions
        if penalty > 0 or size.n >= size.d + size.bias
    ]
    return found + [
        Case(dtype, kind, size, penalty, None)
        for dtype in settings.dtypes
        for kind in STRUCTURES
        for _, size in settings.sizes
        for penalty in settings.paper_penalties
        if size.bias
    ]


class Problem(NamedTuple):
    """One proximal least-squares problem; every number is exact in the dtype of its case."""

    features: np.ndarray  # (n, d)
    targets: np.ndarray  # (n, o)
    kernel: np.ndarray  # of the anchor, (d, o)
    bias: np.ndarray | None  # of the anchor, (o,), or None for heads without one
    lam: np.floating  # the penalty


def with_prescribed_spectrum(
    rng: np.random.Generator, size: Size, condition: float
) -> tuple[np.ndarray, float]:
    """Features whose matrix, with the ones column of the bias, has log-spaced singular values.

    Of M = U S V^T the last column must be the ones: U S q = 1 with q the last row of V. So S is
    scaled until S q is as long as the ones, and U is turned until it maps the one to the other.
    Returns them, (n, d), without the ones, and the largest singular value.
    """
    n, unknowns = size.n, size.d + size.bias
    rank = min(n, unknowns)
    v = np.linalg.qr(rng.normal(size=(unknowns, unknowns)))[0][:, :rank]
    values = np.geomspace(1, 1 / condition, rank)
    if not size.bias:
        u = np.linalg.qr(rng.normal(size=(n, rank)))[0]
        values = values * np.sqrt(n)
        return (u * values) @ v.T, float(values[0])
    values = values * np.sqrt(n) / np.linalg.norm(values * v[-1])
    target = values * v[-1] / np.sqrt(n)
    inner, outer = _basis_with(rng, target, rank), _basis_with(rng, np.ones(n) / np.sqrt(n), rank)
    return ((outer @ inner.T * values) @ v.T)[:, :-1], float(values[0])


def _basis_with(rng: np.random.Generator, first: np.ndarray, count: int) -> np.ndarray:
    """Random orthonormal columns, (len(first), count), of which the first is given."""
    columns = np.column_stack([first, rng.normal(size=(len(first), count - 1))])
    basis = np.linalg.qr(columns)[0]
    basis[:, 0] = first  # qr returns it up to sign
    return basis


def with_structure(rng: np.random.Generator, size: Size, kind: str) -> np.ndarray:
    """ReLU features that are dead, repeated, collinear or scaled apart by 1e-6 to 1e6."""
    n, d = size.n, size.d
    features = np.maximum(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d), 0)
    half = d // 2
    if kind == "dead":
        features[:, :half] = 0
    if kind == "repeated":
        features[:, half : 2 * half] = features[:, :half]
    if kind == "collinear":
        features[:, half:] = features[:, :half] @ rng.normal(size=(half, d - half))
    if kind == "scaled":
        features *= 10 ** rng.permutation(np.linspace(-6, 6, d))
    return features


def make_problem(case: Case, num_outputs: int, seed: int) -> Problem:
    """The problem of a case with this seed, rounded to its dtype.

    For `SPECTRUM` targets and anchor are standard normal: the hard case, since no direction of
    the features is free of signal. The others have one-hot targets and the anchor at zero, as
    the first step of a classifier has them.
    """
    rng = np.random.default_rng([seed, case.size.n, case.size.d, num_outputs])
    n, d, bias = case.size
    if case.kind == SPECTRUM:
        assert case.condition is not None
        features, largest = with_prescribed_spectrum(rng, case.size, case.condition)
        targets, kernel = rng.normal(size=(n, num_outputs)), rng.normal(size=(d, num_outputs))
        offset, lam = rng.normal(size=num_outputs), case.penalty * largest**2
    else:
        features, lam = with_structure(rng, case.size, case.kind), case.penalty
        targets = np.eye(num_outputs)[rng.integers(num_outputs, size=n)]
        kernel, offset = np.zeros((d, num_outputs)), np.zeros(num_outputs)
    dtype = np.dtype(case.dtype)
    return Problem(
        features.astype(dtype),
        targets.astype(dtype),
        kernel.astype(dtype),
        offset.astype(dtype) if bias else None,
        dtype.type(lam),
    )


def bordered(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Features with the ones column and kernel over bias of the anchor, in float64."""
    features, kernel = problem.features.astype(float), problem.kernel.astype(float)
    if problem.bias is None:
        return features, kernel
    ones = np.ones((len(features), 1))
    return np.hstack([features, ones]), np.vstack([kernel, problem.bias.astype(float)])


def system_condition(problem: Problem) -> float:
    """Condition number of the penalized system, that of the stacked matrix squared."""
    features, _ = bordered(problem)
    root = np.sqrt(float(problem.lam)) * np.eye(features.shape[1])
    return float(np.linalg.cond(np.vstack([features, root]))) ** 2
