"""CG: conjugate gradients on the normal equations, which are only ever multiplied with.

JAX's own ``jax.scipy.sparse.linalg.cg`` takes all right-hand sides for one long vector, with one
step length, and does not say how far it got; heads have many outputs, and users must see it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.samples import varying_like
from cfll.solve.problem import Problem, Residual, add, split_head, stack_head
from cfll.solve.route import Correction, Route, SolveInfo


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, preconditioned by the diagonal, started at the anchor.

    The ``solver`` for many features *and* many samples, where neither the Gram matrix nor the
    kernel matrix is small. An iteration costs two products with the features.
    `cfll.SolveInfo` says what is left undone.

    Attributes:
      tolerance: stop when every output's residual, relative to the one at the anchor, in the norm
        of the preconditioner, is at most this; 1e-3 is enough for training.
      max_iterations: stop in any case.

    Examples:
      >>> import jax, jax.numpy as jnp, cfll
      >>> features = jax.random.normal(jax.random.key(0), (64, 32))
      >>> targets = features[:, :1] * 2
      >>> head = cfll.ridge_solve(features, targets, 1e-3, solver=cfll.CG(tolerance=1e-6))
      >>> bool(jnp.abs(head.kernel[0, 0] - 2) < 1e-3)
      True
    """

    needs_units: ClassVar[bool] = False

    tolerance: float = 1e-4
    max_iterations: int = 100

    def __post_init__(self) -> None:
        if not (self.tolerance >= 0 and self.max_iterations >= 1):
            raise ValueError(f"{self} never starts; write cfll.CG(1e-4, max_iterations=100).")

    def factorize(self, problem: Problem, residual: Residual) -> jax.Array:
        """The diagonal of A, (d + 1,), in the place of a factor."""
        del residual
        features, penalty = problem.features, problem.penalty
        penalty = jnp.diagonal(penalty) if penalty.ndim == 2 else penalty
        diagonal = jnp.sum(problem.weigh(jnp.square(features)), axis=0) + penalty
        if problem.bias_penalty is None:
            return diagonal
        corner = problem.total() + problem.bias_penalty
        return jnp.concatenate([diagonal, corner.reshape(1)])

    def correct(
        self, factor: jax.Array, problem: Problem, residual: Residual, anchor: LinearHead | None
    ) -> Correction:
        del anchor
        x, iterations, left = self._iterate(factor, problem, problem.right_hand_side(residual))
        return Correction(x, SolveInfo(Route.CG, jnp.ones(()), iterations, left))

    def apply_inverse(
        self, factor: jax.Array, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        """As `cfll.solve.route.Solver` says."""
        if rows is not None:
            head = add(head, problem.adjoint(rows))
        x, _, _ = self._iterate(factor, problem, head)
        return problem.left_of(rows, x), x

    def _iterate(
        self, diagonal: jax.Array, problem: Problem, head: LinearHead
    ) -> tuple[LinearHead, jax.Array, jax.Array]:
        def matvec(rows: jax.Array) -> jax.Array:
            return stack_head(problem.multiply(split_head(rows, problem.has_bias)))

        x, iterations, left = conjugate_gradients(matvec, stack_head(head), diagonal, self)
        return split_head(x, problem.has_bias), iterations, left


def conjugate_gradients(
    matvec: Callable[[jax.Array], jax.Array], rhs: jax.Array, diagonal: jax.Array, options: CG
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve A x = rhs, (m, k), from x = 0; Saad, Iterative Methods for Sparse Systems, Alg. 9.1.

    Each column has its own step lengths and rests when it is done; the loop ends with the last.
    Where the diagonal of A is zero so is its row, and the solution stays zero. Returned are x, NaN
    in columns that met a NaN, the number of iterations, and rhs - A x relative to rhs in the norm
    of the preconditioner, of the worst column; computed afresh, not the iteration's own.
    """
    # In units of its largest entry: what is squared below neither overflows nor vanishes.
    unit = jnp.max(diagonal)
    inverse = jnp.where(diagonal == 0, 0, unit / jnp.where(diagonal == 0, 1, diagonal))[:, None]

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
    begin = varying_like(begin, rhs, diagonal)
    count, x, _, _, squared = jax.lax.while_loop(unfinished, iterate, begin)
    # A comparison with NaN ends the loop as convergence does: tell them apart.
    sound = jnp.isfinite(squared + start) & jnp.all(jnp.isfinite(diagonal))
    x = jnp.where(sound, x, jnp.full((), jnp.nan, x.dtype))
    left = squared_norm(rhs - matvec(x))
    relative = jnp.sqrt(left / jnp.where(start == 0, 1, start))
    return x * size, count, jnp.max(relative, initial=0)
