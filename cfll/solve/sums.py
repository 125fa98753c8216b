"""Systems of which only the matrix is known: by Cholesky, or in the directions that stand out."""

from functools import partial

import jax
import jax.numpy as jnp

from cfll.solve.cholesky import cho_solve, cholesky_with_rcond, dot
from cfll.solve.route import Route, SolveInfo

# Refinement needs the data. Below this rcond, in multiples of the machine epsilon, who has only
# sums cannot solve by Cholesky.
_SINGULAR = 1e2


def factor(matrix: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, SolveInfo]:
    """The Cholesky factor, where entry (i, j) is rounded as sqrt(size_i size_j) is; is it none?"""
    matrix, size = jax.lax.stop_gradient((matrix, size))
    lower, rcond = cholesky_with_rcond(matrix)
    rcond = rcond * jnp.min(jnp.diagonal(matrix) / size)
    singular = ~(rcond >= _SINGULAR * jnp.finfo(matrix.dtype).eps)
    info = SolveInfo(jnp.where(singular, Route.EIGH, Route.PRIMAL), rcond)
    return lower, singular, info.as_arrays()


def solve_spd(
    lower: jax.Array, singular: jax.Array, matrix: jax.Array, size: jax.Array, rhs: jax.Array
) -> jax.Array:
    """The solution of matrix x = rhs; `lower` is its factor, unless it is singular."""

    def apply_inverse(_: object, rhs: jax.Array) -> jax.Array:
        return jax.lax.cond(
            singular, lambda: _pseudo_solve(matrix, size, rhs), lambda: cho_solve(lower, rhs)
        )

    return jax.lax.custom_linear_solve(partial(dot, matrix), rhs, apply_inverse, symmetric=True)


def _pseudo_solve(matrix: jax.Array, size: jax.Array, rhs: jax.Array) -> jax.Array:
    """The smallest solution of matrix x = rhs in the directions that rounding leaves standing."""
    scale = jnp.sqrt(jnp.where(size == 0, jnp.ones((), size.dtype), size))
    values, vectors = jnp.linalg.eigh(
        jax.lax.stop_gradient(matrix / scale[:, None] / scale[None, :])
    )
    scale = jax.lax.stop_gradient(scale)
    cut = 8 * matrix.shape[0] * jnp.finfo(matrix.dtype).eps
    inverse = jnp.where(values > cut, 1 / values, jnp.where(jnp.isnan(values), values, 0))
    rotated = dot(vectors.T, rhs / scale[:, None])
    return dot(vectors, inverse[:, None] * rotated) / scale[:, None]
