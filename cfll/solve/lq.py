r"""lq: QR of the transposed stack, of size n, where a dual is singular to working precision.

In units of the penalty (one number lambda, after scaling the features) the kernel matrix is
:math:`Z Z^\top + \lambda I = T^\top T` with :math:`T = (Z^\top; \sqrt\lambda I)`, (d + n, n), whose
condition number is the square root of the kernel matrix's. With T = P Sigma V^T, without the last n
rows of P, the equations of `cfll.solve.dual` are solved by

.. math::
    D = g / \lambda + P w, \qquad \alpha = \lambda V \Sigma^{-1} w, \qquad
    w = \Sigma^{-1} V^\top (S^{1/2} \rho - s \delta) - P^\top g / \lambda.

Directions whose data are below rounding get no correction, as in `cfll.solve.qr`: else samples that
are repeated with other targets would get weights of their difference over rounding.

"auto" sets the memory of this route aside in every guarded step. So Z^T is factored in blocks of
rows, Z_k^T = Q_k R_k, then (R_1; R_2; ...; sqrt(lambda) I) = (U_1; U_2; ...) Sigma V^T: P has the
blocks Q_k U_k, and nothing but Q is as large as the features.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.solve.cholesky import dot
from cfll.solve.problem import Problem, Residual, add, power_of_two_above
from cfll.solve.route import Correction, Route, SolveInfo

# What is taken for rounding, in multiples of the machine epsilon.
_NOISE = 32
# Of rows, each with at least as many rows as there are samples.
_MAX_BLOCKS = 8


class _Stack(NamedTuple):
    """The singular value decomposition of T and what goes with it."""

    q: jax.Array  # (blocks, rows, n), of Z^T, with rows of zeros below
    u: jax.Array  # (blocks, n, n); columns of zeros where the data are noise, and so of P
    inverse: jax.Array  # (n, 1): Sigma^{-1}, bounded where Sigma is noise
    vt: jax.Array  # (n, n)
    scale: jax.Array  # of the features, (d, 1) or (1, 1)
    lam: jax.Array  # ()
    root: jax.Array  # s, (n, 1)
    border: jax.Array  # Sigma^{-1} V^T s, (n, 1)
    rcond: jax.Array  # ()
    dim: int  # d

    def rotate(self, rows: jax.Array) -> jax.Array:
        """Sigma^{-1} V^T S^{1/2} rows."""
        return self.inverse * dot(self.vt, self.root * rows)

    def rotate_left(self, left: jax.Array) -> jax.Array:
        """Sigma^{-1} V^T alpha, for S^{1/2} alpha; without weight no sample has one."""
        root = jnp.where(self.root == 0, 1, self.root)
        return self.inverse * dot(self.vt, left / root)

    def to_kernel(self, w: jax.Array) -> jax.Array:
        """P w."""
        return dot(self.q, dot(self.u, w)).reshape(-1, w.shape[1])[: self.dim]

    def left_of(self, w: jax.Array) -> jax.Array:
        """S^{1/2} alpha."""
        # With lambda zero what no feature explains stays, as with any other.
        lam = jnp.where(self.lam == 0, jnp.square(1 / jnp.max(self.inverse)), self.lam)
        return self.root * lam * dot(self.vt.T, self.inverse * w)

    def from_kernel(self, rows: jax.Array) -> jax.Array:
        """P^T rows."""
        blocks, size, _ = self.q.shape
        rows = jnp.pad(rows, ((0, blocks * size - self.dim), (0, 0))).reshape(blocks, size, -1)
        return jnp.sum(dot(self.u.mT, dot(self.q.mT, rows)), axis=0)


@dataclass(frozen=True)
class LQ:
    """The solver of the module's docstring, for a penalty that is no matrix."""

    needs_units: ClassVar[bool] = False

    def factorize(self, problem: Problem, residual: Residual) -> None:
        del problem, residual

    def correct(
        self, factor: Any, problem: Problem, residual: Residual, anchor: LinearHead | None
    ) -> Correction:
        del factor, anchor
        stack = _stack(problem)
        w = stack.rotate(residual.rows)
        bias = None
        if problem.bias_penalty is not None and residual.mean is not None:
            mu = problem.bias_penalty
            ratio = jnp.where(mu == 0, 0, mu / stack.lam)
            # Both sides over the larger of ratio and one: a ratio may be infinite.
            mine, other = jnp.minimum(ratio, 1), 1 / jnp.maximum(ratio, 1)
            schur = mine + other * jnp.sum(jnp.square(stack.border))
            delta = (other * dot(stack.border.T, w) - mine * residual.mean) / _or_one(schur)
            w, bias = w - stack.border * delta, delta[0]
        head = LinearHead(stack.scale * stack.to_kernel(w), bias)
        return Correction(head, SolveInfo(Route.QR, stack.rcond), stack.left_of(w))

    def apply_inverse(
        self, factor: Any, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        del factor
        stack = _stack(problem)
        scaled = stack.scale * head.kernel / stack.lam
        schur = stack.lam * jnp.sum(jnp.square(stack.border))

        def solve(w: jax.Array, pull: Any) -> tuple[jax.Array, Any]:
            """W without the share of the bias, and the bias."""
            if problem.bias_penalty is None or pull is None:
                return w, None
            divisor = _or_one(problem.bias_penalty + schur)
            delta = (stack.lam * dot(stack.border.T, w) + pull) / divisor
            return w - stack.border * delta, delta[0]

        w = -stack.from_kernel(scaled)
        if rows is not None:
            w = w + stack.rotate(rows)
        w, bias = solve(w, None if head.bias is None else head.bias[None, :])
        left, x = stack.left_of(w), LinearHead(stack.scale * (scaled + stack.to_kernel(w)), bias)
        # That sum cancels, as in the dual; its error shows in the predictions.
        unweighted = -x(problem.features) if rows is None else rows - x(problem.features)
        w = stack.rotate(unweighted) - stack.rotate_left(left)
        w, change = solve(w, None if bias is None else jnp.zeros_like(bias)[None, :])
        more = LinearHead(stack.scale * stack.to_kernel(w), change)
        return left + stack.left_of(w), add(x, more)


def _stack(problem: Problem) -> _Stack:
    z, root = problem.root_weighted()
    n, d = z.shape
    eps, penalty = jnp.finfo(z.dtype).eps, problem.penalty.reshape(-1, 1)
    lam = jnp.min(penalty)
    scale = jnp.ones((1, 1), z.dtype)
    if penalty.size > 1:
        scale = jnp.sqrt(lam / jnp.maximum(penalty, jnp.finfo(z.dtype).tiny))
    # In units of the largest entry of T nothing overflows or vanishes when squared.
    largest = jnp.maximum(jnp.max(jnp.abs(z) * scale.reshape(1, -1)), jnp.sqrt(lam))
    unit = power_of_two_above(largest.reshape(1, 1))
    # Not lam / unit / unit: XLA divides once, by the square of the unit, which may be zero.
    scale, lam = scale / unit, jnp.square(jnp.sqrt(lam) / unit).reshape(())
    blocks = max(1, min(d // (4 * n), _MAX_BLOCKS))
    size = -(-d // blocks)
    scales = jnp.broadcast_to(scale, (d, 1))

    def factorize(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Q_k and R_k."""
        columns = k * size + jnp.arange(size)
        rows = problem.features.at[:, columns].get(mode="fill", fill_value=0).T * root.T
        return jnp.linalg.qr(rows * scales.at[columns].get(mode="fill", fill_value=0))

    q, r = jax.lax.map(factorize, jnp.arange(blocks))
    r = jnp.concatenate([r.reshape(-1, n), jnp.sqrt(lam) * jnp.eye(n, dtype=z.dtype)])
    u, sigma, vt = jnp.linalg.svd(r, full_matrices=False)
    u = u[:-n]
    strength, cut = jnp.linalg.norm(u, axis=0) * sigma, _NOISE * eps * sigma[0]
    seen = (strength > cut) | (jnp.square(sigma) > eps * jnp.square(sigma[0]))
    u = jnp.where(seen[None, :], u, jnp.where(jnp.isnan(u), u, 0)).reshape(blocks, n, n)
    # Without data Sigma is sqrt(lambda). Not zero: what no feature explains determines a bias.
    alone = jnp.maximum(jnp.sqrt(lam), jnp.finfo(z.dtype).tiny ** (1 / 3))
    inverse = 1 / jnp.where(strength > cut, sigma, alone)[:, None]
    rcond = jnp.square(sigma[-1] / sigma[0])
    # What is rounding in V^T s must not meet 1 / Sigma^2: repeated samples would move the bias.
    rotated = dot(vt, root)
    rotated = jnp.where(jnp.abs(rotated) <= _NOISE * eps * jnp.linalg.norm(root), 0, rotated)
    return _Stack(q, u, inverse, vt, scale, lam, root, inverse * rotated, rcond, d)


def _or_one(divisor: jax.Array) -> jax.Array:
    """One for zero: where no sample counts, a free bias stays as it is."""
    return jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
