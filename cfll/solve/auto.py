"""auto: Cholesky, primal or dual by shape, and QR of that size where the pivots are too small."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfll.heads import LinearHead
from cfll.samples import concrete
from cfll.solve.dual import Dual
from cfll.solve.lq import LQ
from cfll.solve.primal import Primal
from cfll.solve.problem import Problem, Residual
from cfll.solve.qr import QR
from cfll.solve.refine import is_hopeless
from cfll.solve.route import Correction, SolveInfo

# Smallest of several penalties over the largest, down to which a dual serves all of the features.
_SMALLEST_RATIO = 1e-8
# Features, up to which they get a primal where the penalties are not known while tracing.
_LARGEST_PRIMAL = 4096


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
        def by(solver: Any) -> Correction:
            found = solver.correct(factor, problem, residual, anchor)
            return found._replace(info=SolveInfo(found.info.route, factor.rcond).as_arrays())

        failed = is_hopeless(factor.rcond)
        return jax.lax.cond(failed, lambda: by(self.fallback), lambda: by(self.cholesky))

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
    if not 0 < rows < d or jnp.ndim(penalty) == 2 or _may_differ_a_lot(penalty):
        return Auto(Primal(), QR())
    return Auto(Dual(), LQ())


def _may_differ_a_lot(penalty: jax.Array) -> bool:
    """Whether features of larger penalties may be below rounding in units of the smallest one."""
    if jnp.ndim(penalty) == 0:
        return False
    values = concrete(penalty)
    if values is None:
        return len(penalty) <= _LARGEST_PRIMAL
    return bool(np.min(values) < _SMALLEST_RATIO * np.max(values))
