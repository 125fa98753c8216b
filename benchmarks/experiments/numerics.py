r"""numerics: how exact are the heads, for condition numbers from 1 to 1e12?

Features with prescribed singular values, and features as networks have them (dead, repeated,
collinear, badly scaled), are solved by every solver in float32 and float64. The references are
exact: floats are rational numbers, and the normal equations are solved in integers. So the errors
in the tables are those of the solvers alone, also where float64 itself has no digits left.

Two errors, both relative and in the Frobenius norm: of the head (kernel over bias), and of its
predictions on the features that it was solved on. The second is what a training step sees; the
first also counts directions in which the features hardly vary.

Top of the benchmarks: one experiment, one command. Knows cfll, figures and records; no data and no
networks. Everything is dimensionless.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import track

import cfll
from benchmarks.core.records import Record, Records
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Claim, Summary, Table, show

SUMS = "GramStats.prox"
SOLVERS = ("auto", "primal", "dual", "qr", SUMS)
DTYPES = ("float32", "float64")
SPECTRUM = "spectrum"
STRUCTURES = ("dead", "repeated", "collinear", "scaled")

# In multiples of the machine epsilon: an `rcond` below this calls a system singular. It is where
# `GramStats`, which cannot refine, gives Cholesky up, and what its users are to look out for.
SINGULAR = 1e2

# What README.md promises for float32.
HEAD_PROMISE, PREDICTIONS_PROMISE = 1e-4, 1e-3
# Up to this condition number of the penalized system. Prescribed as 1e4, it comes out as 10001:
# (1 + p) / p for a penalty of p = 1e-4 of the largest eigenvalue.
PROMISED_CONDITION = 1.001e4


class Size(NamedTuple):
    """Shape of a problem.

    Attributes:
      n: samples.
      d: features.
      bias: whether there is a bias, one more unknown.
    """

    n: int
    d: int
    bias: bool


class Settings(NamedTuple):
    """What is measured.

    Attributes:
      num_seeds: random problems per case.
      num_outputs: o.
      sizes: name -> shape. With fewer samples than unknowns there are no cases without penalty.
      conditions: largest over smallest singular value of the features with the ones column.
      penalties: `lam` of these, as shares of the largest eigenvalue of the Gram matrix.
      paper_penalties: `lam` of the features as networks have them, as it is.
    """

    num_seeds: int = 3
    num_outputs: int = 4
    sizes: tuple[tuple[str, Size], ...] = (
        ("tall", Size(96, 24, True)),
        ("tall, no bias", Size(96, 24, False)),
        ("wide", Size(24, 96, True)),
    )
    conditions: tuple[float, ...] = (1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8, 1e10, 1e12)
    penalties: tuple[float, ...] = (0, 1e-8, 1e-4)
    paper_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)


# Seconds to minutes, so that there is one size only.
SETTINGS = Settings()


class Case(NamedTuple):
    """Random problems of one kind; the key of a record, with the solver.

    Attributes:
      dtype: "float32" or "float64", of the data and of the solve.
      kind: `SPECTRUM` or one of `STRUCTURES`.
      size: the shape.
      penalty: of `Settings.penalties` for `SPECTRUM`, of `Settings.paper_penalties` else.
      condition: for `SPECTRUM`, of `Settings.conditions`; else None.
    """

    dtype: str
    kind: str
    size: Size
    penalty: float
    condition: float | None


def cases(settings: Settings) -> list[Case]:
    """All of them, spectra first."""
    found = [
        Case(dtype, SPECTRUM, size, penalty, condition)
        for dtype in DTYPES
        for _, size in settings.sizes
        for penalty in settings.penalties
        for condition in settings.conditions
        if penalty > 0 or size.n >= size.d + size.bias
    ]
    return found + [
        Case(dtype, kind, size, penalty, None)
        for dtype in DTYPES
        for kind in STRUCTURES
        for _, size in settings.sizes
        for penalty in settings.paper_penalties
        if size.bias
    ]


# Problems -----------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """One proximal least-squares problem; every number is exact in the dtype of its case.

    Attributes:
      features: (n, d).
      targets: (n, o).
      kernel: of the anchor, (d, o).
      bias: of the anchor, (o,), or None for heads without one.
      lam: the penalty.
    """

    features: np.ndarray
    targets: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None
    lam: np.floating


def with_prescribed_spectrum(
    rng: np.random.Generator, size: Size, condition: float
) -> tuple[np.ndarray, float]:
    """Features whose matrix, with the ones column of the bias, has log-spaced singular values.

    Of M = U S V^T the last column must be the ones: U S q = 1 with q the last row of V. So S is
    scaled until S q is as long as the ones, and U is turned until it maps the one to the other.

    Args:
      rng: draws the orthogonal factors.
      size: the shape.
      condition: largest over smallest singular value.

    Returns:
      The features, (n, d), without the ones column, and the largest singular value.
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


# Exact references ---------------------------------------------------------------------------------
#
# A reference in float64 by QR has errors of about 2e-16 times the condition number, squared where
# the residual is large: no digits at 1e8. It cannot judge solves in float64, and extended precision
# is not there on every machine. But floats are integers over powers of two, and Python's integers
# have all digits; a system of 25 unknowns takes a tenth of a second.


def exact_head(problem: Problem) -> np.ndarray:
    """Kernel over bias, each entry the float64 that is nearest to the exact solution.

    Args:
      problem: penalty positive, or features of full column rank.

    Returns:
      (d + 1, o), or (d, o) without a bias.
    """
    features, anchor = bordered(problem)
    targets = problem.targets.astype(float)
    shift = max(map(_binary_places, (features, targets, anchor)))
    # All in units of 2^-shift, the residual and the Gram matrix of its square.
    phi, y, w = (_in_units(array, shift) for array in (features, targets, anchor))
    residual = y * 2**shift - phi.dot(w)
    above, below = float(problem.lam).as_integer_ratio()

    def penalized(gram: np.ndarray) -> np.ndarray:
        gram = gram * below
        gram[np.diag_indices(len(gram))] += above << (2 * shift)
        return gram

    n, unknowns = phi.shape
    if n < unknowns:
        solved, scale = _solve_exactly(penalized(phi.dot(phi.T)), residual * below)
        solved = phi.T.dot(solved)
    else:
        solved, scale = _solve_exactly(penalized(phi.T.dot(phi)), phi.T.dot(residual) * below)
    # Python divides integers of any length with one rounding.
    return ((w * scale + solved) / (scale << shift)).astype(float)


def _binary_places(values: np.ndarray) -> int:
    """The smallest k >= 0 that makes integers of values * 2^k, or a few more."""
    _, exponents = np.frexp(values)
    return 53 - int(exponents[values != 0].min(initial=0))


def _in_units(values: np.ndarray, shift: int) -> np.ndarray:
    """The integers values * 2^shift, of dtype object."""
    fractions, exponents = np.frexp(values)
    whole = (fractions * 2.0**53).astype(np.int64).astype(object)
    # Zeros have the exponent 0.
    return whole << np.maximum(exponents + shift - 53, 0).astype(object)


def _solve_exactly(matrix: np.ndarray, rhs: np.ndarray) -> tuple[np.ndarray, int]:
    """Integers x and s with matrix x = s rhs, by elimination without fractions (Bareiss)."""
    m, size, previous = np.hstack([matrix, rhs]), len(matrix), 1
    for k in range(size - 1):
        below = slice(k + 1, None)
        minors = m[below, below] * m[k, k] - np.outer(m[below, k], m[k, below])
        m[below, below] = minors // previous  # without remainder: they are determinants
        previous = m[k, k]
    determinant, x = m[size - 1, size - 1], m[:, size:].copy()
    for k in range(size - 2, -1, -1):
        x[k] = (x[k] * determinant - m[k, k + 1 : size].dot(x[k + 1 :])) // m[k, k]
    return x, determinant


# Measuring ----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="solver")
def solve(
    features: jax.Array,
    targets: jax.Array,
    anchor: cfll.LinearHead,
    lam: jax.Array,
    solver: str,
) -> tuple[cfll.LinearHead, cfll.SolveInfo]:
    """Head and diagnostics of one of `SOLVERS`. `lam` is traced, so that it may be zero."""
    if solver != SUMS:
        return cfll.penalized_solve(features, targets, anchor, lam, solver=solver)
    d, o = anchor.kernel.shape
    stats = cfll.GramStats.zeros(d, o, anchor.bias is not None, features.dtype)
    return stats.add(features, targets).solve(anchor, lam)


def measure(problem: Problem, exact: np.ndarray, solver: str) -> Record:
    """Errors and diagnostics of one solve, as plain numbers; `None` for what is not finite."""
    with jax.enable_x64(problem.features.dtype == np.float64):
        anchor = cfll.LinearHead(
            jnp.asarray(problem.kernel), None if problem.bias is None else jnp.asarray(problem.bias)
        )
        head, info = solve(
            jnp.asarray(problem.features),
            jnp.asarray(problem.targets),
            anchor,
            jnp.asarray(problem.lam),
            solver,
        )
        head, info = jax.tree.map(np.asarray, (head, info))
    found = np.asarray(head.kernel, float)
    if head.bias is not None:
        found = np.vstack([found, head.bias])
    features, _ = bordered(problem)
    return {
        "head": _plain(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
        "predictions": _plain(
            np.linalg.norm(features @ (found - exact)) / np.linalg.norm(features @ exact)
        ),
        "route": str(cfll.Route(int(info.route))),
        "rcond": _plain(info.rcond),
    }


def _plain(value: Any) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def key_of(settings: Settings, case: Case, solver: str) -> Record:
    """What a record is filed under."""
    return {
        "experiment": "numerics",
        **case._asdict(),
        "solver": solver,
        "num_outputs": settings.num_outputs,
        "num_seeds": settings.num_seeds,
    }


def run(settings: Settings, case: Case, records: Records) -> None:
    """Solve the problems of a case by the solvers that have no record yet."""
    missing = [solver for solver in SOLVERS if records.get(key_of(settings, case, solver)) is None]
    if not missing:
        return
    seeds = range(settings.num_seeds)
    problems = [make_problem(case, settings.num_outputs, seed) for seed in seeds]
    exact = [exact_head(problem) for problem in problems]
    conditions = [_plain(system_condition(problem)) for problem in problems]
    for solver in missing:
        seen = [measure(p, x, solver) for p, x in zip(problems, exact, strict=True)]
        by_field = {name: [one[name] for one in seen] for name in seen[0]}
        result = {**by_field, "system condition": conditions}
        records.add(key_of(settings, case, solver), result)


# What the numbers say -----------------------------------------------------------------------------


class Solved(NamedTuple):
    """One problem, one solver.

    Attributes:
      case: kind and shape.
      seed: of the problem.
      solver: of `SOLVERS`.
      head: relative error of the head; infinite where the answer is not finite.
      predictions: relative error of the predictions; likewise.
      route: a `cfll.Route`, as it is printed.
      rcond: as the solve estimates it; NaN if Cholesky failed.
      condition: of the penalized system.
    """

    case: Case
    seed: int
    solver: str
    head: float
    predictions: float
    route: str
    rcond: float
    condition: float

    @property
    def warned(self) -> bool:
        """Whether `SolveInfo.rcond` calls the system singular, 1.2e-5 in float32."""
        return not self.rcond >= SINGULAR * np.finfo(self.case.dtype).eps


def read(records: Records, settings: Settings) -> list[Solved]:
    """All problems that have a record, in the order of `cases` and `SOLVERS`."""
    found = []
    for case in cases(settings):
        for solver in SOLVERS:
            result = records.get(key_of(settings, case, solver))
            for index in range(settings.num_seeds if result else 0):
                assert result is not None
                head, predictions, rcond, condition = (
                    result[name][index]
                    for name in ("head", "predictions", "rcond", "system condition")
                )
                found.append(
                    Solved(
                        case,
                        index,
                        solver,
                        np.inf if head is None else head,
                        np.inf if predictions is None else predictions,
                        result["route"][index],
                        np.nan if rcond is None else rcond,
                        np.inf if condition is None else condition,
                    )
                )
    return found


def _shown(error: float) -> str:
    return f"{error:.0e}" if np.isfinite(error) else "NaN"


def _worst(solved: Iterable[Solved]) -> tuple[float, float]:
    """The largest errors of head and predictions; zero of none."""
    listed = list(solved)
    return (
        max((one.head for one in listed), default=0.0),
        max((one.predictions for one in listed), default=0.0),
    )


def _cell(solved: Sequence[Solved]) -> str:
    """Both errors, with a star where the diagnostics warn of every one of the problems."""
    if not solved:
        return ""
    head, predictions = _worst(solved)
    if not np.isfinite(head):
        return "NaN"
    return f"{_shown(head)} / {_shown(predictions)}" + "*" * all(one.warned for one in solved)


def _routes(solved: Iterable[Solved]) -> str:
    return ", ".join(dict.fromkeys(one.route for one in solved if one.solver == "auto"))


def _row(solved: Sequence[Solved]) -> tuple[str, ...]:
    """A cell per solver, and where auto went."""
    cells = [_cell([one for one in solved if one.solver == solver]) for solver in SOLVERS]
    return (*cells, _routes(solved))


_LEGEND = (
    "Relative errors of head / predictions, largest of {seeds} problems per cell; *: `rcond` calls "
    "the system singular ({limit:.1g} and below), so a caller is warned; NaN: no answer, which is "
    "seen as well."
)


def spectrum_table(settings: Settings, dtype: str, solved: Sequence[Solved]) -> Table:
    """Errors by penalty and condition number of the features."""
    names = {size: name for name, size in settings.sizes if size.bias}
    rows = []
    for case in cases(settings):
        here = [one for one in solved if one.case == case]
        if (case.dtype, case.kind) == (dtype, SPECTRUM) and case.size in names and here:
            rows.append(
                (f"{names[case.size]}, {case.penalty:g}", f"{case.condition:.0e}", *_row(here))
            )
    return Table(
        caption=f"{dtype}, prescribed singular values, with bias. "
        + _LEGEND.format(seeds=settings.num_seeds, limit=SINGULAR * np.finfo(dtype).eps)
        + " Penalties as shares of the largest eigenvalue of the Gram matrix.",
        headings=("shape, penalty", "condition of the features", *SOLVERS, "auto took"),
        rows=tuple(rows),
    )


def structure_table(settings: Settings, solved: Sequence[Solved]) -> Table:
    """Errors on features as networks have them, the worst over the paper's penalties."""
    rows = []
    for dtype in DTYPES:
        for kind in STRUCTURES:
            for name, size in settings.sizes:
                here = [one for one in solved if one.case[:3] == (dtype, kind, size)]
                if here:
                    rows.append((f"{dtype}, {kind}, {name}", *_row(here)))
    penalties = ", ".join(f"{penalty:g}" for penalty in settings.paper_penalties)
    return Table(
        caption=f"ReLU features, one-hot targets, lam = {penalties}. "
        + "Half of the features are dead, repeated or combinations of others, or all are scaled by "
        "1e-6 to 1e6. Relative errors of head / predictions, the largest over penalties and seeds; "
        "*: `rcond` warns of all.",
        headings=("features", *SOLVERS, "auto took"),
        rows=tuple(rows),
    )


def trust_table(solved: Sequence[Solved]) -> Table:
    """What a caller who looks at `rcond` still has to reckon with."""
    rows = []
    for dtype in DTYPES:
        for solver in SOLVERS:
            here = [one for one in solved if (one.case.dtype, one.solver) == (dtype, solver)]
            answered = [one for one in here if np.isfinite(one.head)]
            head, predictions = _worst(one for one in answered if not one.warned)
            rows.append(
                (
                    f"{dtype}, {solver}",
                    str(len(here)),
                    str(len(here) - len(answered)),
                    str(sum(one.warned for one in answered)),
                    _shown(head),
                    _shown(predictions),
                )
            )
    return Table(
        caption="All problems of this section. The last two columns: the largest relative errors "
        "of which neither `rcond` nor a NaN warns.",
        headings=("solver", "problems", "NaN", "warned", "head", "predictions"),
        rows=tuple(rows) if solved else (),
    )


def _place(one: Solved) -> str:
    """Where a problem is found in the tables."""
    condition = "" if one.case.condition is None else f", condition {one.case.condition:.0e}"
    bias = "" if one.case.size.bias else " without bias"
    return (
        f"{one.case.dtype}, {one.case.kind}, {one.case.size.n} x {one.case.size.d}{bias}, penalty "
        f"{one.case.penalty:g}{condition}"
    )


def _largest(solved: Iterable[Solved], error: str) -> str:
    """The largest error and its place, in words."""
    listed = list(solved)
    if not listed:
        return "none"
    one = max(listed, key=lambda one: getattr(one, error))
    return f"{_shown(getattr(one, error))} ({_place(one)})"


def _beside(first: Sequence[Solved], second: Sequence[Solved]) -> list[tuple[Solved, Solved]]:
    """The same problems by two solvers; an interrupted run may have one of the two."""
    found = {(one.case, one.seed): one for one in second}
    return [(one, found[one.case, one.seed]) for one in first if (one.case, one.seed) in found]


def claims_of(solved: Sequence[Solved]) -> list[Claim]:
    """The README's promises, and what `auto` is for."""
    by_solver = {name: [one for one in solved if one.solver == name] for name in SOLVERS}
    auto = by_solver["auto"]

    promised = {
        name: [
            one
            for one in by_solver[name]
            if one.case.dtype == "float32"
            and one.case.kind == SPECTRUM
            and one.condition <= PROMISED_CONDITION
        ]
        for name in SOLVERS
    }
    heads = ", ".join(
        # The dual divides by the penalty.
        f"{name} {_shown(_worst(o for o in group if name != 'dual' or o.case.penalty)[0])}"
        for name, group in promised.items()
    )
    singular = [one for one in auto if one.case.dtype == "float32" and one.warned]
    structured = [one for one in singular if one.case.kind != SPECTRUM]
    penalized = [one for one in singular if one.case.kind == SPECTRUM and one.case.penalty]
    free = [one for one in singular if one.case.kind == SPECTRUM and not one.case.penalty]

    pairs, by_primal = _beside(auto, by_solver["qr"]), _beside(auto, by_solver["primal"])
    ratios = {
        dtype: max(
            (a.head / q.head for a, q in pairs if a.case.dtype == dtype and q.head), default=0.0
        )
        for dtype in DTYPES
    }
    num_single = sum(a.case.dtype == "float32" for a, _ in pairs)
    behind = [
        a
        for a, q in pairs
        if a.case.dtype == "float32"
        and (
            a.head > max(10 * q.head, HEAD_PROMISE)
            or a.predictions > max(10 * q.predictions, PREDICTIONS_PROMISE)
        )
    ]
    failed = [(a, p) for a, p in by_primal if max(p.head, p.predictions) > 1e-3]
    unmoved = [a for a, _ in failed if a.route == "primal" and not a.warned]
    silent = [one for one in auto if one.predictions > PREDICTIONS_PROMISE and not one.warned]

    def claim(sentence: str, holds: bool, evidence: str, decided_by: Sequence[Any]) -> Claim:
        return Claim(sentence, holds if decided_by else None, evidence if decided_by else "not run")

    return [
        claim(
            "float32: `auto` has a relative error of the head of at most 1e-4 for condition "
            "numbers up to 1e4 of the penalized system (README).",
            _worst(promised["auto"])[0] <= HEAD_PROMISE,
            f"largest errors: {heads}, in {len(promised['auto'])} problems; the dual only with a "
            "penalty, and NaN where that is small (its own matrix has another condition number); "
            f"{SUMS} is not part of the promise",
            promised["auto"],
        ),
        claim(
            "float32: on dead, repeated, collinear and badly scaled features for which Cholesky "
            "fails, predictions of `auto` stay within 1e-3 (README).",
            _worst(structured)[1] <= PREDICTIONS_PROMISE,
            f"largest error {_largest(structured, 'predictions')}, in {len(structured)} problems",
            structured,
        ),
        claim(
            "float32: on log-spaced spectra for which Cholesky fails, with a penalty, predictions "
            "of `auto` stay within 1e-3.",
            _worst(penalized)[1] <= PREDICTIONS_PROMISE,
            f"largest error {_largest(penalized, 'predictions')}, in {len(penalized)} problems",
            penalized,
        ),
        claim(
            "float32: on log-spaced spectra for which Cholesky fails, without a penalty, "
            "predictions of `auto` stay within 1e-3.",
            _worst(free)[1] <= PREDICTIONS_PROMISE,
            f"largest error {_largest(free, 'predictions')}, in {len(free)} problems: directions "
            "below rounding get no correction, and with targets of noise there is signal in each",
            free,
        ),
        claim(
            "`auto` is never NaN where a solution exists.",
            all(np.isfinite(one.head) for one in auto),
            f"{sum(not np.isfinite(one.head) for one in auto)} of {len(auto)} problems are NaN; "
            + ", ".join(
                f"{name} {sum(not np.isfinite(one.head) for one in by_solver[name])}"
                for name in SOLVERS[1:]
            ),
            auto,
        ),
        claim(
            "The error of the head by `auto` is never more than ten times that by `qr`.",
            all(ratio <= 10 for ratio in ratios.values()),
            "largest ratio "
            + ", ".join(f"{ratio:.1g} in {dtype}" for dtype, ratio in ratios.items())
            + ": Cholesky squares the condition number and is kept while that leaves digits",
            pairs,
        ),
        claim(
            "float32: `auto` is never both ten times worse than `qr` and outside of the bounds of "
            "the README, 1e-4 of the head and 1e-3 of predictions.",
            not behind,
            f"{len(behind)} of {num_single} problems are; largest error of "
            f"predictions there {_largest(behind, 'predictions')}",
            pairs,
        ),
        claim(
            "Where `primal` errs by more than 1e-3 (or is NaN), `auto` took another route or "
            "`rcond` calls the system singular.",
            not unmoved,
            f"{len(failed)} such problems; in {len(unmoved)} of them neither",
            failed,
        ),
        claim(
            "Where predictions of `auto` err by more than 1e-3, `rcond` says so.",
            not silent,
            f"{len(silent)} of {len(auto)} problems without warning; largest "
            f"{_largest(silent, 'predictions')}",
            auto,
        ),
    ]


_MARKERS = ("o", "s", "^", "D", "v")
_NO_ANSWER = 30.0  # where NaN is drawn


def draw(settings: Settings, solved: Sequence[Solved], path: Path) -> None:
    """Error of the predictions over the condition number, a column per dtype."""
    sizes = dict(settings.sizes)
    strong = min(penalty for penalty in settings.penalties if penalty)
    panels = (("tall", 0.0), ("wide", strong))
    with mpl.rc_context(plots.STYLE):
        figure, grid = plt.subplots(
            len(panels),
            len(DTYPES),
            figsize=(10.5, 7),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        legend: dict[str, Any] = {}
        for axes, dtype in zip(grid[0], DTYPES, strict=True):
            axes.set_title(dtype)
        for line_of_axes, (shape, penalty) in zip(grid, panels, strict=True):
            for axes, dtype in zip(line_of_axes, DTYPES, strict=True):
                here = [
                    one
                    for one in solved
                    if (*one.case[:4],) == (dtype, SPECTRUM, sizes[shape], penalty)
                ]
                _draw_panel(axes, here, legend)
                axes.set(ylim=(1e-17, 3 * _NO_ANSWER))
        for axes, (shape, penalty) in zip(grid[:, 0], panels, strict=True):
            n, d, _ = sizes[shape]
            lam = f"lam = {penalty:g} of the largest eigenvalue" if penalty else "no penalty"
            axes.set_ylabel(f"{n} samples, {d} features\n{lam}\nrelative error of predictions")
        for axes in grid[-1]:
            axes.set_xlabel("condition number of the features")
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside upper center",
            ncols=len(legend),
            handlelength=4,
            title="filled: rcond is healthy; hollow: it calls the system singular; cross: NaN",
        )
        figure.savefig(path)
        plt.close(figure)


def _draw_panel(axes: Any, solved: Sequence[Solved], legend: dict[str, Any]) -> None:
    for index, solver in enumerate(SOLVERS):
        here = [one for one in solved if one.solver == solver]
        if not here:
            continue
        conditions = list(dict.fromkeys(one.case.condition for one in here))
        groups = [[one for one in here if one.case.condition == c] for c in conditions]
        errors = np.array([_worst(group)[1] for group in groups])
        warned = np.array([all(one.warned for one in group) for group in groups])
        style = plots.LINES[index]
        marker, failed = _MARKERS[index], ~np.isfinite(errors)
        shown = np.where(failed, np.nan, np.maximum(errors, 1e-16))
        # Lines that lie on each other stay visible: the first is the widest.
        width = 4.5 - 0.8 * index
        (line,) = axes.loglog(conditions, shown, **style | {"linewidth": width, "alpha": 0.8})
        for mask, face in ((~warned & ~failed, style["color"]), (warned & ~failed, "white")):
            axes.loglog(
                np.array(conditions)[mask],
                shown[mask],
                linestyle="",
                marker=marker,
                color=style["color"],
                markerfacecolor=face,
                markersize=8 - index,
            )
        # Side by side: several solvers have no answer at the same condition number.
        axes.loglog(
            np.array(conditions)[failed] * 1.35 ** (index - 2),
            np.full(failed.sum(), _NO_ANSWER),
            linestyle="",
            marker="x",
            color=style["color"],
            markersize=5,
        )
        legend.setdefault(solver, _handle(line, marker))


def _handle(line: Any, marker: str) -> mpl.lines.Line2D:
    return mpl.lines.Line2D(
        [], [], color=line.get_color(), linestyle=line.get_linestyle(), marker=marker
    )


def summarize(records: Records, figures: Path, *, preset: str = "cpu") -> Summary:
    """Draw the figure and say what the numbers say.

    Args:
      records: results of `numerics`.
      figures: folder of the figure, made if it is not there.
      preset: there is one size only; the same for all.
    """
    del preset
    settings = SETTINGS
    solved = read(records, settings)
    paths, tables = [], []
    if solved:
        figures.mkdir(parents=True, exist_ok=True)
        paths = [figures / "numerics.png"]
        draw(settings, solved, paths[0])
        tables = [
            *(spectrum_table(settings, dtype, solved) for dtype in DTYPES),
            structure_table(settings, solved),
            trust_table(solved),
        ]
    return Summary(
        title="Accuracy of the solvers",
        command="python -m benchmarks numerics",
        setup=(
            "Proximal heads of features with log-spaced singular values from 1 to 1 / condition "
            "number (with the ones column of the bias; up to a factor), targets and anchor from "
            f"N(0, 1), {settings.num_outputs} outputs, {settings.num_seeds} seeds; and of features "
            "as networks have them, anchor at zero. Data are rounded to the dtype, so that in "
            "float32 condition numbers above 1e8 end there. References are exact: the normal "
            "equations in integers. The condition number of the penalized system, of which the "
            "README speaks, is the square of that of the features where there is no penalty, and "
            "at most one over the relative penalty where there is one. The problems without bias "
            "are in the claims only."
        ),
        tables=tables,
        claims=claims_of(solved),
        figures=paths,
    )


def numerics(out: Path = Path("benchmarks/out/numerics")) -> None:
    """Measure the errors of all solvers for condition numbers from 1 to 1e12.

    Some minutes on one core; on whatever device JAX has, which the records name. To compare
    devices, take a folder for each: a folder that has the numbers is not computed again.

    Args:
      out: folder of the numbers and the figure.
    """
    records, console = Records(out / "numerics.jsonl"), Console()
    for case in track(cases(SETTINGS), "solving", console=console, transient=True):
        run(SETTINGS, case, records)
    show(console, summarize(records, out))
