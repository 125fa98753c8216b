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
from cfll.solve.route import Correction, SolveInfo

# Features, up to which a matrix of d^2 may be set aside for penalties per feature.
_LARGEST_QR = 4096


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
    ) -> Correction:
        has_left = isinstance(self.cholesky, Dual)

        def by(solver: Any, factor: Any) -> Correction:
            x, info, left = solver.correct(factor, problem, residual, anchor)
            if has_left and left is None:
                left = problem.left_of(residual.rows, x)
            return Correction(x, SolveInfo(info.route, factor_rcond).as_arrays(), left)

        def fall_back() -> Correction:
            own = self.fallback.factorize(problem, residual) if has_left else factor
            return by(self.fallback, own)

        factor_rcond = factor.rcond
        return jax.lax.cond(is_hopeless(factor_rcond), fall_back, lambda: by(self.cholesky, factor))

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
    if not 0 < rows < d or jnp.ndim(penalty) == 2:
        return Auto(Primal(), QR())
    # In units of the smallest of several penalties features of larger ones may be below rounding.
    return Auto(Dual(), LQ() if jnp.ndim(penalty) == 0 or d > _LARGEST_QR else QR())
