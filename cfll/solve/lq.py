r"""lq: QR of the transposed stack, of size n, where a dual is singular to working precision.

In units of the penalty (one number lambda, after scaling the features) the kernel matrix is
:math:`Z Z^\top + \lambda I = T^\top T` with :math:`T = (Z^\top; \sqrt\lambda I)`, (d + n, n), whose
condition number is the square root of the kernel matrix's. With T = Q R, R = U Sigma V^T and P the
first d rows of Q U the equations of `cfll.solve.dual` are solved by

.. math::
    D = g / \lambda + P w, \qquad \alpha = \lambda V \Sigma^{-1} w, \qquad
    w = \Sigma^{-1} V^\top (S^{1/2} \rho - s \delta) - P^\top g / \lambda.

Directions whose data are below rounding get no correction, as in `cfll.solve.qr`: else samples that
are repeated with other targets would get weights of their difference over rounding. No matrix is of
size d x d: "auto" sets this memory aside in every guarded step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.solve.cholesky import dot
from cfll.solve.problem import Problem, power_of_two_above
from cfll.solve.route import Route, SolveInfo

# What is taken for rounding, in multiples of the machine epsilon.
_NOISE = 32


class _Stack(NamedTuple):
    """The singular value decomposition of T and what goes with it."""

    p: jax.Array  # (d, n), zero where the data are noise
    inverse: jax.Array  # (n, 1): Sigma^{-1}, bounded where Sigma is noise
    vt: jax.Array  # (n, n)
    scale: jax.Array  # of the features, (d, 1) or (1, 1)
    lam: jax.Array  # ()
    root: jax.Array  # s, (n, 1)
    u: jax.Array  # Sigma^{-1} V^T s, (n, 1)
    rcond: jax.Array  # ()

    def rotate(self, rows: jax.Array) -> jax.Array:
        """Sigma^{-1} V^T S^{1/2} rows."""
        return self.inverse * dot(self.vt, self.root * rows)


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
        w = stack.rotate(residual)
        bias = None
        if problem.bias_penalty is not None:
            mu = problem.bias_penalty
            ratio = jnp.where(mu == 0, 0, mu / stack.lam)
            delta = dot(stack.u.T, w) / _or_one(ratio + jnp.sum(jnp.square(stack.u)))
            w, bias = w - stack.u * delta, delta[0]
        return LinearHead(stack.scale * dot(stack.p, w), bias), SolveInfo(Route.QR, stack.rcond)

    def apply_inverse(
        self, factor: Any, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        del factor
        stack = _stack(problem)
        scaled = stack.scale * head.kernel / stack.lam
        w, bias = -dot(stack.p.T, scaled), None
        if rows is not None:
            w = w + stack.rotate(rows)
        if problem.bias_penalty is not None and head.bias is not None:
            schur = problem.bias_penalty + stack.lam * jnp.sum(jnp.square(stack.u))
            delta = (stack.lam * dot(stack.u.T, w) + head.bias[None, :]) / _or_one(schur)
            w, bias = w - stack.u * delta, delta[0]
        alpha = stack.lam * dot(stack.vt.T, stack.inverse * w)
        return stack.root * alpha, LinearHead(stack.scale * (scaled + dot(stack.p, w)), bias)


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
    scale, lam = scale / unit, (lam / unit / unit).reshape(())
    q, r = jnp.linalg.qr(jnp.concatenate([scale * z.T, jnp.sqrt(lam) * jnp.eye(n, dtype=z.dtype)]))
    u, sigma, vt = jnp.linalg.svd(r)
    p = dot(q[:d], u)
    strength, cut = jnp.linalg.norm(p, axis=0) * sigma, _NOISE * eps * sigma[0]
    seen = (strength > cut) | (jnp.square(sigma) > eps * jnp.square(sigma[0]))
    p = jnp.where(seen, p, jnp.where(jnp.isnan(p), p, 0))
    # Not zero: what the features do not explain determines a bias.
    inverse = 1 / _or_one(jnp.maximum(sigma, cut))[:, None]
    rcond = jnp.square(sigma[-1] / sigma[0])
    # What is rounding in V^T s must not meet 1 / Sigma^2: repeated samples would move the bias.
    rotated = dot(vt, root)
    rotated = jnp.where(jnp.abs(rotated) <= _NOISE * eps * jnp.linalg.norm(root), 0, rotated)
    return _Stack(p, inverse, vt, scale, lam, root, inverse * rotated, rcond)


def _or_one(divisor: jax.Array) -> jax.Array:
    """One for zero: where no sample counts, a free bias stays as it is."""
    return jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
