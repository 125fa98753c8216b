"""Errors of every solver, and their records."""

import itertools
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cfll
from benchmarks.core.records import Record, Records
from benchmarks.core.runner import Runner
from benchmarks.experiments.numerics.exact import exact_head
from benchmarks.experiments.numerics.problems import (
    Case,
    Problem,
    Settings,
    bordered,
    cases,
    make_problem,
    system_condition,
)

SUMS = "GramStats.prox"
SOLVERS = ("auto", "primal", "dual", "qr", SUMS)

# In multiples of the machine epsilon: an `rcond` below this calls a system singular. It is where
# `GramStats`, which cannot refine, gives Cholesky up, and what its users are to look out for.
SINGULAR = 1e2


@partial(jax.jit, static_argnames="solver")
def solve(
    features: jax.Array, targets: jax.Array, anchor: cfll.LinearHead, lam: jax.Array, solver: str
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


def run(settings: Settings, case: Case, runner: Runner) -> None:
    """Solve the problems of a case by the solvers that have no record yet."""

    @cache
    def problems() -> list[tuple[Problem, np.ndarray]]:
        drawn = [make_problem(case, settings.num_outputs, s) for s in range(settings.num_seeds)]
        return [(problem, exact_head(problem)) for problem in drawn]

    def errors(solver: str) -> Record:
        seen = [measure(problem, exact, solver) for problem, exact in problems()]
        conditions = [_plain(system_condition(problem)) for problem, _ in problems()]
        by_field = {name: [one[name] for one in seen] for name in seen[0]}
        return {**by_field, "system condition": conditions}

    for solver in SOLVERS:
        runner.run(key_of(settings, case, solver), partial(errors, solver))


class Solved(NamedTuple):
    """One problem, one solver."""

    case: Case  # kind and shape
    seed: int  # of the problem
    solver: str  # of `SOLVERS`
    head: float  # relative error of the head; infinite where the answer is not finite
    predictions: float  # relative error of the predictions; likewise
    route: str  # a `cfll.Route`, as it is printed
    rcond: float  # as the solve estimates it; NaN if Cholesky failed
    condition: float  # of the penalized system

    @property
    def warned(self) -> bool:
        """Whether `SolveInfo.rcond` calls the system singular, 1.2e-5 in float32."""
        return not self.rcond >= SINGULAR * np.finfo(self.case.dtype).eps


def read(records: Records, settings: Settings) -> list[Solved]:
    """All problems that have a record, in the order of `cases` and `SOLVERS`."""
    unknown = {"head": np.inf, "predictions": np.inf, "rcond": np.nan, "system condition": np.inf}
    found = []
    for case, solver in itertools.product(cases(settings), SOLVERS):
        result = records.get(key_of(settings, case, solver)) or {"route": []}
        for seed, route in enumerate(result["route"]):
            head, predictions, rcond, condition = (
                missing if result[name][seed] is None else result[name][seed]
                for name, missing in unknown.items()
            )
            found.append(Solved(case, seed, solver, head, predictions, route, rcond, condition))
    return found
