"""auto: Cholesky, primal or dual by shape, and QR of that size where the pivots are too small."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.solve.dual import Dual
from cfll.solve.lq import LQ
from cfll.solve.primal import Primal
from cfll.solve.problem import Problem, Residual
from cfll.solve.qr import QR
from cfll.solve.refine import is_hopeless
from cfll.solve.route import SolveInfo


@dataclass(frozen=True)
class Auto:
    """The solver of the module's docstring.

    Attributes:
      cholesky: the one to try first.
      fallback: the one that does not square the condition number.
    """

    cholesky: Primal | Dual
    fallback: QR | LQ

    @property
    def needs_units(self) -> bool:
        return self.cholesky.needs_units

    def factorize(self, problem: Problem, residual: Residual) -> Any:
        return self.cholesky.factorize(problem, residual)

    def correct(
        self, factor: Any, problem: Problem, residual: Residual, anchor: LinearHead | None
    ) -> tuple[LinearHead, SolveInfo]:
        def by(solver: Any) -> tuple[LinearHead, jax.Array]:
            x, info = solver.correct(factor, problem, residual, anchor)
            return x, info.as_arrays().route

        failed = is_hopeless(factor.rcond)
        x, route = jax.lax.cond(failed, lambda: by(self.fallback), lambda: by(self.cholesky))
        return x, SolveInfo(route, factor.rcond)

    def apply_inverse(
        self, factor: Any, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        def by(solver: Any) -> tuple[jax.Array, LinearHead]:
            return solver.apply_inverse(factor, problem, rows, head)

        return jax.lax.cond(
            is_hopeless(factor.rcond), lambda: by(self.fallback), lambda: by(self.cholesky)
        )


def choose_solver(rows: int, d: int, penalty: jax.Array) -> Auto:
    """The smaller factor; shapes are known while tracing."""
    # A matrix penalty would need a factor of its own in the dual, and no rows have no dual at all.
    if 0 < rows < d and jnp.ndim(penalty) < 2:
        return Auto(Dual(), LQ())
    return Auto(Primal(), QR())
