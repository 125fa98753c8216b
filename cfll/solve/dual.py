r"""dual: Cholesky of the kernel matrix, of size n.

With Z = S^{1/2} Phi and s = S^{1/2} 1 put :math:`D = \Lambda^{-1} (g + Z^\top \alpha)`. Then the
normal equations with right-hand side :math:`\tilde\Phi^\top S \rho + (g, g_0)` hold if

.. math::
    C \alpha + s \delta = S^{1/2} \rho - Z \Lambda^{-1} g, \qquad
    s^\top \alpha - \mu \delta = -g_0, \qquad C = I + Z \Lambda^{-1} Z^\top :

a bordered system with the factor of C in its corner; the bias costs one more right-hand side.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.solve.cholesky import cho_solve, cholesky, cholesky_with_rcond, dot
from cfll.solve.problem import Problem, Residual, as_column, stack_head
from cfll.solve.refine import refine, step_limit
from cfll.solve.route import Correction, Route, SolveInfo


class KernelMatrix(NamedTuple):
    """The factor of C and what goes with it."""

    lower: jax.Array  # (n, n)
    rcond: jax.Array  # ()
    penalty_lower: jax.Array | None  # (d, d), of a matrix Lambda
    column: jax.Array | None  # C^{-1} s, (n, 1); None without a bias
    schur: jax.Array | None  # mu + s^T C^{-1} s, ()


@dataclass(frozen=True)
class Dual:
    """The solver of the module's docstring."""

    # Alpha is about lam / |features|^2 of the residual, and must not vanish.
    needs_units: ClassVar[bool] = True

    def factorize(self, problem: Problem, residual: Residual) -> KernelMatrix:
        z, s = problem.root_weighted()
        del residual
        penalty_lower = cholesky(problem.penalty) if problem.penalty.ndim == 2 else None
        if problem.penalty.ndim == 0:
            kernel = dot(z, z.T) / problem.penalty  # n^2 divisions instead of n d
        else:
            kernel = dot(z, _unpenalize(problem, penalty_lower, z.T))
        lower, rcond = cholesky_with_rcond(kernel + jnp.eye(z.shape[0], dtype=z.dtype))
        if problem.bias_penalty is None:
            return KernelMatrix(lower, rcond, penalty_lower, None, None)
        # A free bias without a sample that counts is the one singularity that C does not show.
        determined = problem.bias_penalty + problem.total() > 0
        rcond = jnp.where(determined, rcond, jnp.full((), jnp.nan, rcond.dtype))
        column = cho_solve(lower, s)
        schur = problem.bias_penalty + jnp.sum(s * column)
        return KernelMatrix(lower, rcond, penalty_lower, column, schur)

    def correct(
        self, factor: KernelMatrix, problem: Problem, residual: Residual, anchor: LinearHead | None
    ) -> Correction:
        z, s = problem.root_weighted()
        n, has_bias = len(z), problem.has_bias
        num_dual = n + has_bias  # rows of alpha over delta

        def solve(rows: jax.Array) -> jax.Array:
            """Alpha over delta over the kernel."""
            dual = _solve_bordered(factor, s, rows)
            kernel = _unpenalize(problem, factor.penalty_lower, dot(z.T, dual[:n]))
            return jnp.concatenate([dual, kernel])

        def residual_of(x: jax.Array, residual: Residual) -> jax.Array:
            dual, predicted = x[:num_dual], dot(z, x[num_dual:])
            if problem.bias_penalty is None or residual.mean is None:
                return s * residual.rows - dual - predicted
            alpha, delta = dual[:-1], dual[-1:]
            last = problem.bias_penalty * (residual.mean + delta) - dot(s.T, alpha)
            return jnp.concatenate([s * residual.rows - alpha - predicted - s * delta, last])

        right_hand_side = s * residual.rows
        if problem.bias_penalty is not None and residual.mean is not None:
            last = problem.bias_penalty * residual.mean
            right_hand_side = jnp.concatenate([right_hand_side, last])
        dual = _solve_bordered(factor, s, right_hand_side)
        # With alpha, which is what the correction leaves of the residual.
        once = Correction(
            LinearHead(
                _unpenalize(problem, factor.penalty_lower, dot(z.T, dual[:n])),
                dual[n] if has_bias else None,
            ),
            SolveInfo(Route.DUAL, factor.rcond),
            s * dual[:n],
        )
        # Stacked here and in the branch: what a branch is given is written to memory.
        rows = None if anchor is None else stack_head(anchor)
        limit = step_limit(factor.rcond, stack_head(once.head), rows)

        # Refine alpha, delta and the kernel together. Not alpha alone, whose own rounding the
        # kernel Lambda^{-1} Z^T alpha magnifies where the data outweigh the penalty; nor the kernel
        # alone: Lambda^{-1} (g - Z^T C^{-1} Z Lambda^{-1} g), which would solve for what is left of
        # its normal equations, cancels there.
        def refined() -> Correction:
            x = jnp.concatenate([dual, once.head.kernel])
            # Here the bias, delta, stands above the kernel.
            above = None if anchor is None else jnp.roll(stack_head(anchor), has_bias, axis=0)
            x = refine(solve, residual_of, x, residual, limit, above, num_auxiliary=n)
            head = LinearHead(x[num_dual:], x[n] if has_bias else None)
            return once._replace(head=head, left=s * x[:n])

        # Without refinement there is no copy of the kernel below alpha.
        return jax.lax.cond(limit > 0, refined, lambda: once)

    def apply_inverse(
        self, factor: KernelMatrix, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        z, s = problem.root_weighted()
        n = len(z)

        def unpenalize(kernel: jax.Array) -> jax.Array:
            return _unpenalize(problem, factor.penalty_lower, kernel)

        right_hand_side = -dot(z, unpenalize(head.kernel))
        if rows is not None:
            right_hand_side = right_hand_side + s * rows
        if head.bias is not None:
            right_hand_side = jnp.concatenate([right_hand_side, -head.bias[None, :]])
        dual = _solve_bordered(factor, s, right_hand_side)
        kernel = unpenalize(head.kernel + dot(z.T, dual[:n]))
        # That sum cancels where the data outweigh the penalty; its error shows in the predictions.
        left = -dot(z, kernel) - dual[:n]
        if rows is not None:
            left = left + s * rows
        if head.bias is not None:
            left = jnp.pad(left - s * dual[n:], ((0, 1), (0, 0)))
        change = _solve_bordered(factor, s, left)
        dual, kernel = dual + change, kernel + unpenalize(dot(z.T, change[:n]))
        return s * dual[:n], LinearHead(kernel, None if head.bias is None else dual[n])


def _unpenalize(problem: Problem, penalty_lower: jax.Array | None, rows: jax.Array) -> jax.Array:
    """Lambda^{-1} rows, for rows of shape (d, k)."""
    if penalty_lower is not None:
        return cho_solve(penalty_lower, rows)
    return rows / as_column(problem.penalty)


def _solve_bordered(factor: KernelMatrix, s: jax.Array, rows: jax.Array) -> jax.Array:
    """Alpha over delta from the right-hand sides of their two equations, (n + 1, o)."""
    if factor.column is None or factor.schur is None:
        return cho_solve(factor.lower, rows)
    alpha = cho_solve(factor.lower, rows[:-1])
    delta = (dot(s.T, alpha) - rows[-1:]) / factor.schur
    return jnp.concatenate([alpha - factor.column * delta, delta])
