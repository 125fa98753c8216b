"""The promises of the guide `diagnostics`, and what `auto` is for."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.numerics.measure import SOLVERS, SUMS, Solved
from benchmarks.experiments.numerics.problems import SPECTRUM
from benchmarks.experiments.numerics.tables import shown, worst
from benchmarks.reporting.summary import Claim

# What the guide promises for float32.
HEAD_PROMISE, PREDICTIONS_PROMISE = 1e-4, 1e-3
# Up to this condition number of the penalized system. Prescribed as 1e4, it comes out as 10001:
# (1 + p) / p for a penalty of p = 1e-4 of the largest eigenvalue.
PROMISED_CONDITION = 1.001e4


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
    return f"{shown(getattr(one, error))} ({_place(one)})"


def _beside(first: Sequence[Solved], second: Sequence[Solved]) -> list[tuple[Solved, Solved]]:
    """The same problems by two solvers; an interrupted run may have one of the two."""
    found = {(one.case, one.seed): one for one in second}
    return [(one, found[one.case, one.seed]) for one in first if (one.case, one.seed) in found]


def claims_of(solved: Sequence[Solved]) -> list[Claim]:
    """The promises of the guide `diagnostics`, and what `auto` is for."""
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
        f"{name} {shown(worst(o for o in group if name != 'dual' or o.case.penalty)[0])}"
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
        for dtype in dict.fromkeys(a.case.dtype for a, _ in pairs)
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
            "numbers up to 1e4 of the penalized system (guide).",
            worst(promised["auto"])[0] <= HEAD_PROMISE,
            f"largest errors: {heads}, in {len(promised['auto'])} problems; the dual only with a "
            "penalty, and NaN where that is small (its own matrix has another condition number); "
            f"{SUMS} is not part of the promise",
            promised["auto"],
        ),
        claim(
            "float32: on dead, repeated, collinear and badly scaled features for which Cholesky "
            "fails, predictions of `auto` stay within 1e-3 (guide).",
            worst(structured)[1] <= PREDICTIONS_PROMISE,
            f"largest error {_largest(structured, 'predictions')}, in {len(structured)} problems",
            structured,
        ),
        claim(
            "float32: on log-spaced spectra for which Cholesky fails, with a penalty, predictions "
            "of `auto` stay within 1e-3.",
            worst(penalized)[1] <= PREDICTIONS_PROMISE,
            f"largest error {_largest(penalized, 'predictions')}, in {len(penalized)} problems",
            penalized,
        ),
        claim(
            "float32: on log-spaced spectra for which Cholesky fails, without a penalty, "
            "predictions of `auto` stay within 1e-3.",
            worst(free)[1] <= PREDICTIONS_PROMISE,
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
            "the guide, 1e-4 of the head and 1e-3 of predictions.",
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
