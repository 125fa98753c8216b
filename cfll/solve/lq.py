r"""lq: QR of the transposed stack, of size n, where a dual has few samples and is singular.

In units of the penalty (one number lambda, after scaling the features) the kernel matrix is
:math:`Z Z^\top + \lambda I = T^\top T` with :math:`T = (Z^\top; \sqrt\lambda I)`, (d + n, n). With
T = Q R, whose condition number is the square root of the kernel matrix's, and :math:`Q_1` the first
d rows of Q, the equations of `cfll.solve.dual` are solved by

.. math::
    D = g / \lambda + Q_1 w, \qquad \alpha = \lambda R^{-1} w, \qquad
    w = R^{-\top} (S^{1/2} \rho - s \delta) - Q_1^\top g / \lambda

without a product that squares anything. No matrix is of size d x d: "auto" sets this memory aside
in every guarded step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.solve.cholesky import dot
from cfll.solve.problem import Problem
from cfll.solve.route import Route, SolveInfo

# What is taken for rounding, in multiples of the machine epsilon.
_NOISE = 32


class _Stack(NamedTuple):
    """T = Q R and what goes with it."""

    q1: jax.Array  # (d, n)
    r: jax.Array  # (n, n)
    scale: jax.Array  # of the features, (d, 1) or (1, 1)
    lam: jax.Array  # ()
    u: jax.Array  # R^{-T} s, (n, 1)
    root: jax.Array  # s, (n, 1)
    rcond: jax.Array  # ()


@dataclass(frozen=True)
class LQ:
    """The solver of the module's docstring, for a penalty that is no matrix."""

    def factorize(self, problem: Problem, residual: jax.Array) -> None:
        del problem, residual

    def correct(
        self, factor: Any, problem: Problem, residual: jax.Array, anchor: LinearHead | None
    ) -> tuple[LinearHead, SolveInfo]:
        del factor, anchor
        stack = _stack(problem)
        w = _solve_transposed(stack.r, stack.root * residual)
        bias = None
        if problem.bias_penalty is not None:
            mu = problem.bias_penalty
            ratio = jnp.where(mu == 0, 0, mu / stack.lam)
            delta = dot(stack.u.T, w) / _or_one(ratio + jnp.sum(jnp.square(stack.u)))
            w, bias = w - stack.u * delta, delta[0]
        return LinearHead(stack.scale * dot(stack.q1, w), bias), SolveInfo(Route.QR, stack.rcond)

    def apply_inverse(
        self, factor: Any, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        del factor
        stack = _stack(problem)
        scaled = stack.scale * head.kernel / stack.lam
        w, bias = -dot(stack.q1.T, scaled), None
        if rows is not None:
            w = w + _solve_transposed(stack.r, stack.root * rows)
        if problem.bias_penalty is not None and head.bias is not None:
            schur = problem.bias_penalty + stack.lam * jnp.sum(jnp.square(stack.u))
            delta = (stack.lam * dot(stack.u.T, w) + head.bias[None, :]) / _or_one(schur)
            w, bias = w - stack.u * delta, delta[0]
        alpha = stack.lam * jax.lax.linalg.triangular_solve(stack.r, w, left_side=True)
        return stack.root * alpha, LinearHead(stack.scale * (scaled + dot(stack.q1, w)), bias)


def _stack(problem: Problem) -> _Stack:
    z, root = problem.root_weighted()
    n, d = z.shape
    penalty = problem.penalty.reshape(-1, 1)
    tiny = jnp.finfo(z.dtype).tiny
    lam = jnp.min(penalty)
    scale = (
        jnp.sqrt(lam / jnp.maximum(penalty, tiny))
        if penalty.size > 1
        else jnp.ones((1, 1), z.dtype)
    )
    rows = scale * z.T
    largest = jnp.max(jnp.sum(jnp.square(rows), axis=0))
    # Below rounding the penalty cannot be seen: repeated samples that contradict each other would
    # get weights of their difference over rounding.
    floor = jnp.square(_NOISE * jnp.finfo(z.dtype).eps) * largest
    corner = jnp.sqrt(jnp.maximum(lam, floor))
    q, r = jnp.linalg.qr(jnp.concatenate([rows, corner * jnp.eye(n, dtype=z.dtype)]))
    pivots = jnp.abs(jnp.diagonal(r))
    rcond = jnp.square(jnp.min(pivots) / jnp.max(pivots))
    return _Stack(q[:d], r, scale, lam, _solve_transposed(r, root), root, rcond)


def _or_one(schur: jax.Array) -> jax.Array:
    """Zero if the bias is free and no sample counts: it stays as it is."""
    return jnp.where(schur == 0, jnp.ones_like(schur), schur)


def _solve_transposed(r: jax.Array, rows: jax.Array) -> jax.Array:
    """R^{-T} rows."""
    return jax.lax.linalg.triangular_solve(r, rows, left_side=True, transpose_a=True)
