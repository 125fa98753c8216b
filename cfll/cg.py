"""CG, conjugate_gradients: a symmetric system solved by products alone.

Beside `solve.py`, below it: knows arrays, neither features nor heads. JAX's own
``jax.scipy.sparse.linalg.cg`` takes all right-hand sides for one long vector, with one step length,
and does not say how far it got; heads have many right-hand sides, and users must see it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class CG(NamedTuple):
    """Conjugate gradients, preconditioned by the diagonal, started at the anchor.

    Pass it as ``solver``: for many features *and* many samples, where neither the Gram matrix nor
    the kernel matrix is small. An iteration costs two products with the features. What is left
    undone is in `cfll.solve.SolveInfo`: ``iterations`` and ``residual``.

    Attributes:
      tolerance: stop when every output's residual, relative to the one at the anchor, in the norm
        of the preconditioner, is at most this. The next batch moves the head anyway: 1e-3 is
        enough for training.
      max_iterations: stop in any case.

    Examples:
      >>> import jax, jax.numpy as jnp, cfll
      >>> features = jax.random.normal(jax.random.key(0), (64, 32))
      >>> targets = features[:, :1] * 2
      >>> head = cfll.ridge_solve(features, targets, 1e-3, solver=cfll.CG(tolerance=1e-6))
      >>> bool(jnp.abs(head.kernel[0, 0] - 2) < 1e-3)
      True
    """

    tolerance: float = 1e-4
    max_iterations: int = 100


class Outcome(NamedTuple):
    """Where the iteration stopped.

    Attributes:
      solution: (m, k), NaN in columns that met a NaN.
      iterations: int32 scalar.
      residual: scalar, ``rhs - A solution`` relative to ``rhs``, both in the norm of the
        preconditioner, of the worst column; computed afresh, not the iteration's own.
    """

    solution: jax.Array
    iterations: jax.Array
    residual: jax.Array


def conjugate_gradients(
    matvec: Callable[[jax.Array], jax.Array], rhs: jax.Array, diagonal: jax.Array, options: CG
) -> Outcome:
    """Solve A x = rhs for all columns at once, from x = 0.

    Each column has its own step lengths and rests when it is done; the loop ends with the last.

    Args:
      matvec: x -> A x, for x of shape (m, k); symmetric, positive semi-definite.
      rhs: (m, k).
      diagonal: (m,), of A; where it is zero so is the row, and the solution stays zero.
      options: when to stop.

    Returns:
      The `Outcome`.

    References:
      Saad, Iterative Methods for Sparse Linear Systems, Algorithm 9.1.
    """
    inverse = jnp.where(diagonal == 0, 0, 1 / jnp.where(diagonal == 0, 1, diagonal))[:, None]

    def squared_norm(residual: jax.Array) -> jax.Array:
        return jnp.sum(residual * inverse * residual, axis=0, keepdims=True)

    # Columns of size one: nothing here squares itself into infinity or zero.
    size = jnp.max(jnp.abs(rhs), axis=0, keepdims=True, initial=0)
    size = jnp.where(size == 0, 1, size)
    rhs = rhs / size
    start = squared_norm(rhs)
    goal = jnp.asarray(options.tolerance, rhs.dtype) ** 2 * start

    def unfinished(state):
        count, _, _, _, squared = state
        return (count < options.max_iterations) & jnp.any(squared > goal)

    def iterate(state):
        count, x, residual, direction, squared = state
        image = matvec(direction)
        curvature = jnp.sum(direction * image, axis=0, keepdims=True)
        resting = (squared <= goal) | (curvature == 0)
        length = jnp.where(resting, 0, squared / jnp.where(resting, 1, curvature))
        x = x + length * direction
        residual = residual - length * image
        new = squared_norm(residual)
        ratio = jnp.where(resting, 0, new / jnp.where(resting, 1, squared))
        return count + 1, x, residual, inverse * residual + ratio * direction, new

    begin = (jnp.zeros((), jnp.int32), jnp.zeros_like(rhs), rhs, inverse * rhs, start)
    count, x, _, _, squared = jax.lax.while_loop(unfinished, iterate, begin)
    # A comparison with NaN ends the loop as convergence does: tell them apart.
    sound = jnp.isfinite(squared + start) & jnp.all(jnp.isfinite(diagonal))
    x = jnp.where(sound, x, jnp.full((), jnp.nan, x.dtype))
    left = squared_norm(rhs - matvec(x))
    relative = jnp.sqrt(left / jnp.where(start == 0, 1, start))
    return Outcome(x * size, count, jnp.max(relative, initial=0))
