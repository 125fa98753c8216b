"""Route, SolveInfo: how a head was solved. Solver: what every way of solving offers."""

from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cfll.heads import LinearHead
from cfll.solve.problem import Problem, Residual


class Route(IntEnum):
    """The ways to a head; ``print(cfll.Route(info.route))`` says which one was taken."""

    PRIMAL = 0  # Cholesky of the normal equations, of size d + 1
    DUAL = 1  # Cholesky of the kernel matrix, of size n
    QR = 2  # QR of the stacked features, after "auto": singular to working precision
    EIGH = 3  # eigenvectors of sums that are singular to working precision
    GIVEN = 4  # not solved here: the caller brought a head
    CG = 5  # conjugate gradients

    @classmethod
    def _missing_(cls, value: object) -> "Route | None":
        """Of a scalar array, which has no hash: Python 3.12 and later do not look it up."""
        return next((route for route in cls if route == value), None)

    def __str__(self) -> str:
        return self.name.lower()


class SolveInfo(NamedTuple):
    """How a head was solved.

    Attributes:
      route: int32 scalar, a `Route`.
      rcond: float32 scalar, estimate of the reciprocal condition number of the penalized system
        scaled to unit diagonal, as seen by rounding: a solve without refinement errs by about
        1e-7 / rcond in float32, and below 1e-5 the system is close to singular. 0 if Cholesky
        failed, 1 where there was none.
      iterations: int32 scalar, of ``cg``; 0 for the others.
      residual: float32 scalar, what ``cg`` left of the residual at the anchor, the worst output, in
        the norm of the preconditioner; 0 for the others. Above the tolerance: it was not finished.

    Examples:
      >>> print(Route(SolveInfo(route=0, rcond=0.5).route))
      primal
    """

    route: Any
    rcond: Any
    iterations: Any = np.int32(0)
    residual: Any = np.float32(0)

    def as_arrays(self) -> "SolveInfo":
        """The same in the dtypes of the attributes, with a number where rcond is none."""
        rcond = jnp.asarray(self.rcond, jnp.float32)
        return SolveInfo(
            jnp.asarray(self.route, jnp.int32),
            jnp.where(jnp.isnan(rcond), jnp.zeros_like(rcond), rcond),
            jnp.asarray(self.iterations, jnp.int32),
            jnp.asarray(self.residual, jnp.float32),
        )

    def worst(self) -> "SolveInfo":
        """Of several solves, stacked: the worst conditioned, and the least finished."""
        route, rcond, iterations, residual = jax.tree.map(jnp.ravel, self)
        k = jnp.argmin(rcond)
        return SolveInfo(route[k], rcond[k], iterations.max(), residual.max())


class Correction(NamedTuple):
    """What `Solver.correct` finds.

    Attributes:
      head: the solution x.
      info: how it was found.
      left: S (rows - Phi~ x), (n, o), of a solver that has it without that difference, which
        cancels where the data outweigh the penalty; None of the others.
    """

    head: LinearHead
    info: SolveInfo
    left: jax.Array | None = None


class Solver(Protocol):
    """One way to solve a `Problem`; hashable. A new one is one file with these three methods.

    Attributes:
      needs_units: whether residuals and anchors must come in units of the residual, (1, o).
    """

    @property
    def needs_units(self) -> bool: ...

    def factorize(self, problem: Problem, residual: Residual) -> Any:
        """What solving takes, in a type of the solver's own."""

    def correct(
        self, factor: Any, problem: Problem, residual: Residual, anchor: LinearHead | None
    ) -> Correction:
        """The solution x of A x = `Problem.right_hand_side`, as exact as anchor + x needs it."""
        ...

    def apply_inverse(
        self, factor: Any, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        """S (rows - Phi~ x) and the solution x of A x = Phi~^T S rows + head, for derivatives.

        Rows are (n, o), or None for zeros. Linear in both; not refined.
        """
        ...
