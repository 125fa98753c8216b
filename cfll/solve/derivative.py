r"""The solution of a problem as a differentiable function, whatever solver found it.

No factorization is differentiated. x solves A x = Phi~^T S rho. With the residual r = rho - Phi~ x
these are two equations, linear in the unknowns r and x,

.. math::
    r + \tilde\Phi x = \rho, \qquad \tilde\Phi^\top S r - \mathrm{diag}(\Lambda, \mu) x = 0.

Differentiating them at fixed r and x gives right-hand sides (c, -g) for (dr, dx) in the same
system, which is solved by A dx = Phi~^T S c + g with the factor at hand. Transposed, with
right-hand sides (c, h), it is solved by A x = Phi~^T c - h. `jax.lax.custom_linear_solve` knows the
system besides these two solutions: so it can be transposed (reverse mode) and differentiated again
(higher orders), while the factor stays a constant. No root of a weight appears, whose derivative
would be infinite at zero. Where the data outweigh the penalty r is a difference that cancels, and
the derivative by the features is made of it: a solver that knows S r otherwise, the dual, says it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.samples import varying_like
from cfll.solve.problem import (
    Problem,
    Residual,
    add,
    power_of_two_above,
    scale,
    split_head,
    stack_head,
)
from cfll.solve.route import SolveInfo, Solver


def solve_correction(
    solver: Solver, problem: Problem, residual: jax.Array, anchor: LinearHead | None
) -> tuple[LinearHead, SolveInfo]:
    """The correction of the anchor for residuals (n, o), differentiable by problem and residual."""
    # Inside shard_map all of it must vary over the same axes: a linear solve is transposed as one.
    given = problem, residual, anchor
    problem, residual, anchor = varying_like(given, *jax.tree.leaves(given))
    fixed, rows, anchor = jax.lax.stop_gradient((problem, residual, anchor))
    centered, unit = fixed.centered(rows), None
    if solver.needs_units:  # here, where XLA scales the solution while it adds the anchor
        # Of rows and mean: a penalized bias needs both.
        unit = power_of_two_above(jnp.concatenate(jax.tree.leaves(centered)))
        centered = jax.tree.map(lambda rows: rows / unit, centered)
        anchor = None if anchor is None else scale(anchor, 1 / unit)
    factor = solver.factorize(fixed, centered)
    if anchor is not None:
        anchor = _raise(anchor, centered)
    x, info, left = solver.correct(factor, fixed, centered, anchor)
    x = _raise(x, centered)
    if unit is not None:
        x, left = scale(x, unit), None if left is None else left * unit
    r = _unweighted(fixed, left, rows - x(fixed.features))
    return _differentiable(solver, factor, x, r, problem, residual)[0], info.as_arrays()


def _unweighted(problem: Problem, left: jax.Array | None, difference: jax.Array) -> jax.Array:
    """The difference r, with the digits it lost where it is small if S r is known otherwise."""
    if left is None or problem.weights is None:
        return difference if left is None else left
    weights = problem.weights[:, None]
    return jnp.where(weights > 0, left / jnp.where(weights > 0, weights, 1), difference)


def _raise(head: LinearHead, residual: Residual) -> LinearHead:
    """The head + (0, mean)."""
    if head.bias is None or residual.mean is None:
        return head
    return head._replace(bias=head.bias + residual.mean[0])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    solver: Solver, factor: Any, x: LinearHead, r: jax.Array, problem: Problem, residual: jax.Array
) -> tuple[LinearHead, jax.Array]:
    del solver, factor, problem, residual
    return x, r


@_differentiable.defjvp
def _differentiable_jvp(solver, primals, tangents):
    factor, _, _, problem, residual = primals
    x, r = _differentiable(solver, *primals)

    def equations(problem: Problem, residual: jax.Array) -> tuple[jax.Array, LinearHead]:
        normal = jax.tree.map(jnp.subtract, problem.adjoint(r), problem.penalize(x))
        return residual - x(problem.features), normal

    _, (rows, head) = jax.jvp(equations, (problem, residual), tangents[3:])
    return (x, r), _solve_linear(solver, factor, problem, rows, head)


def _solve_linear(
    solver: Solver, factor: Any, problem: Problem, rows: jax.Array, head: LinearHead
) -> tuple[LinearHead, jax.Array]:
    """The solution x of A x = Phi~^T S rows + head and r = rows - Phi~ x, linear in both."""
    n, fixed = len(rows), jax.lax.stop_gradient(problem)

    # One array of unknowns, r over kernel over bias: JAX transposes a linear solve only if all of
    # its right-hand sides are linear in the input, and some of these may be constants.
    def split(unknowns: jax.Array) -> tuple[jax.Array, LinearHead]:
        return unknowns[:n], split_head(unknowns[n:], problem.has_bias)

    def join(rows: jax.Array, head: LinearHead) -> jax.Array:
        return jnp.concatenate([rows, stack_head(head)])

    def matvec(unknowns: jax.Array) -> jax.Array:
        r, x = split(unknowns)
        normal = jax.tree.map(jnp.subtract, problem.adjoint(r), problem.penalize(x))
        return join(r + x(problem.features), normal)

    def solve(_: Any, right_hand_side: jax.Array) -> jax.Array:
        rows, negative = split(right_hand_side)
        left, x = solver.apply_inverse(factor, fixed, rows, jax.tree.map(jnp.negative, negative))
        return join(_unweighted(fixed, left, rows - x(fixed.features)), x)

    def transpose_solve(_: Any, right_hand_side: jax.Array) -> jax.Array:
        rows, negative = split(right_hand_side)
        head = add(fixed.transposed(rows), jax.tree.map(jnp.negative, negative))
        left, x = solver.apply_inverse(factor, fixed, None, head)
        return join(rows + left, x)

    right_hand_side = join(rows, jax.tree.map(jnp.negative, head))
    solution = jax.lax.custom_linear_solve(matvec, right_hand_side, solve, transpose_solve)
    r, x = split(solution)
    return x, r
