"""primal: Cholesky of the normal equations, of size d + 1.

The ones column of the features is never built: their Gram matrix is bordered with their sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.solve.cholesky import cho_solve, cholesky_with_rcond, lower_gram
from cfll.solve.problem import Problem, Residual, add, bordered_gram, split_head, stack_head
from cfll.solve.refine import refine, step_limit
from cfll.solve.route import Correction, Route, SolveInfo


class NormalEquations(NamedTuple):
    """The factor of A, (d + 1, d + 1), and the right-hand side of the correction."""

    # The right-hand side is here so that devices sum it together with the Gram matrix.
    lower: jax.Array
    rcond: jax.Array
    right_hand_side: LinearHead


@dataclass(frozen=True)
class Primal:
    """The solver of the module's docstring."""

    needs_units: ClassVar[bool] = False

    def factorize(self, problem: Problem, residual: Residual) -> NormalEquations:
        features = problem.features
        weighted = problem.weigh(features)
        matrix = bordered_gram(
            lower_gram(features, weighted),
            jnp.sum(weighted, axis=0),
            problem.total(),
            problem.penalty,
            problem.bias_penalty,
        )
        return NormalEquations(*cholesky_with_rcond(matrix), problem.right_hand_side(residual))

    def correct(
        self,
        factor: NormalEquations,
        problem: Problem,
        residual: Residual,
        anchor: LinearHead | None,
    ) -> Correction:
        solve = partial(cho_solve, factor.lower)
        # A Gram matrix with an infinity may have a factor that answers zeros.
        failed = jnp.where(jnp.isnan(factor.rcond), factor.rcond, jnp.zeros_like(factor.rcond))
        x = solve(stack_head(factor.right_hand_side)) + failed
        limit = step_limit(factor.rcond, x, None if anchor is None else stack_head(anchor))
        x = refine_by_data(solve, problem, x, residual, limit, anchor)
        return Correction(split_head(x, problem.has_bias), SolveInfo(Route.PRIMAL, factor.rcond))

    def apply_inverse(
        self, factor: NormalEquations, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        if rows is not None:
            head = add(head, problem.adjoint(rows))
        x = split_head(cho_solve(factor.lower, stack_head(head)), problem.has_bias)
        return problem.left_of(rows, x), x


def refine_by_data(
    solve: Callable[[jax.Array], jax.Array],
    problem: Problem,
    x: jax.Array,
    residual: Residual,
    limit: jax.Array,
    anchor: LinearHead | None,
) -> jax.Array:
    """`refine` of a solution (d + 1, o) of the normal equations."""

    def residual_of(x: jax.Array, residual: Residual) -> jax.Array:
        return stack_head(problem.normal_residual(split_head(x, problem.has_bias), residual))

    rows = None if anchor is None else stack_head(anchor)
    return refine(solve, residual_of, x, residual, limit, rows)
