r"""qr: QR of the stacked matrix, whose condition number is the square root of that of A.

Stack :math:`M = (S^{1/2} \tilde\Phi; \mathrm{diag}(\Lambda, \mu)^{1/2})`, scale its columns to norm
one, M = Q R, R = U Sigma V^T. Then :math:`x = V \Sigma^{-1} U^\top Q^\top (S^{1/2} \rho; 0)` and
:math:`A^{-1} g = V \Sigma^{-2} V^\top g`. Direction k sees the data with strength
:math:`|S^{1/2} \tilde\Phi V_k|`. Below rounding that strength is noise, as it is for repeated
features, and the quotient of noise and a small Sigma_k (its square below eps) would be a huge
weight: such a direction gets no correction, as in exact arithmetic. One step of refinement follows,
for residuals larger than the targets.

Q, as large as the features, is never kept: R and Q^T rho are updated block by block of the rows.
"auto" sets the memory of this solver aside in every step, taken or not: with blocks it is small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.samples import varying_like
from cfll.solve.cholesky import dot
from cfll.solve.problem import Problem, add, split_head, stack_head
from cfll.solve.route import Route, SolveInfo

# What is taken for rounding, in multiples of the machine epsilon.
_NOISE = 32


@dataclass(frozen=True)
class QR:
    """The solver of the module's docstring. It makes its factor where it uses it."""

    def factorize(self, problem: Problem, residual: jax.Array) -> None:
        del problem, residual

    def correct(
        self, factor: Any, problem: Problem, residual: jax.Array, anchor: LinearHead | None
    ) -> tuple[LinearHead, SolveInfo]:
        del factor, anchor
        penalty = _stack_penalty(problem)

        # A loop, so that both steps run the same program and get the same R to the last bit:
        # rounding alone may turn the weak directions of Q, and U belongs to the R it was made from.
        def step(k: jax.Array, carry: tuple[jax.Array, _Basis]) -> tuple[jax.Array, _Basis]:
            x, basis = carry
            head = split_head(x, problem.has_bias)
            r, rotated = _triangle(problem, penalty, residual - head(problem.features))
            basis = jax.lax.cond(k == 0, lambda: _find_basis(problem, penalty, r), lambda: basis)
            from_data = basis.seen * dot(basis.u.T, rotated)
            pull = dot(basis.vt, stack_head(problem.penalize(head)) / penalty.norms.T)
            change = dot(basis.vt.T, basis.inverse * (from_data - basis.inverse * pull))
            return x + change / penalty.norms.T, basis

        square = jnp.zeros_like(penalty.rows)
        nothing = _Basis(square, square, square[:, :1], square[:, :1], square[0, 0])
        x = jnp.zeros((len(square), residual.shape[1]), residual.dtype)
        start = varying_like((x, nothing), problem.features, residual, penalty.rows)
        x, basis = jax.lax.fori_loop(0, 2, step, start)
        return split_head(x, problem.has_bias), SolveInfo(Route.QR, basis.rcond)

    def apply_inverse(
        self, factor: Any, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        del factor
        if rows is not None:
            head = add(head, problem.adjoint(rows))
        penalty = _stack_penalty(problem)
        r, _ = _triangle(problem, penalty, problem.features[:, :0])
        basis = _find_basis(problem, penalty, r)
        v = basis.vt.T / penalty.norms.T
        rows_of_x = dot(v, jnp.square(basis.inverse) * dot(v.T, stack_head(head)))
        x = split_head(rows_of_x, problem.has_bias)
        return problem.left_of(rows, x), x


class _StackedPenalty(NamedTuple):
    """What of M is not data, with its columns scaled, and the norms of the columns of M."""

    rows: jax.Array  # (d + 1, d + 1)
    norms: jax.Array  # (1, d + 1)


def _stack_penalty(problem: Problem) -> _StackedPenalty:
    (d, dtype), penalty = (problem.features.shape[1], problem.features.dtype), problem.penalty
    if penalty.ndim == 2:
        values, vectors = jnp.linalg.eigh(penalty, symmetrize_input=True)
        # Negative by more than rounding is not a penalty: NaN, which callers see.
        floor = -10 * jnp.finfo(dtype).eps * d * jnp.max(jnp.abs(values))
        values = jnp.where(values >= floor, jnp.maximum(values, 0), jnp.nan)
        root = jnp.sqrt(values)[:, None] * vectors.T
    else:
        root = jnp.diag(jnp.broadcast_to(jnp.sqrt(penalty), (d,)))
    if problem.bias_penalty is not None:
        corner = jnp.sqrt(problem.bias_penalty).reshape(1)
        root = jnp.pad(root, ((0, 1), (0, 1))) + jnp.diag(jnp.pad(corner, (d, 0)))

    weights = jnp.ones((1, 1), dtype) if problem.weights is None else problem.weights[:, None]
    columns = problem.features * jnp.sqrt(weights)
    largest, total = _largest(columns), problem.total().reshape(1, 1)
    if problem.has_bias:  # a column of the roots of the weights
        largest = jnp.concatenate([largest, jnp.sqrt(_largest(weights))], axis=1)
    largest = jnp.maximum(largest, _largest(root))
    unit = jnp.where(largest > 0, largest, 1)  # no overflow in the squares
    squares = _sum_squares(columns / unit[:, :d])
    if problem.has_bias:
        squares = jnp.concatenate([squares, total / jnp.square(unit[:, d:])], axis=1)
    squares = squares + _sum_squares(root / unit)
    norms = jnp.where(squares > 0, unit * jnp.sqrt(squares), 1)
    return _StackedPenalty(root / norms, norms)


def _largest(rows: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(rows), axis=0, keepdims=True, initial=0)


def _sum_squares(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows), axis=0, keepdims=True)


def _fold_rows(step: Callable[..., Any], carry: Any, problem: Problem, residual: jax.Array) -> Any:
    """Fold ``step(carry, rows of S^{1/2} Phi~, rows of S^{1/2} residual)`` over blocks of rows."""
    n, d = problem.features.shape
    size = max(d, 256, n // 8)

    def on_block(carry: Any, start: Any, size: int) -> Any:
        def block(array: jax.Array | None) -> jax.Array | None:
            return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, size)

        blocks = jax.tree.map(block, (problem.features, problem.weights, residual))
        part = problem._replace(features=blocks[0], weights=blocks[1])
        rows, root = part.root_weighted()  # here, since XLA folds a constant of n rows for seconds
        if problem.has_bias:
            rows = jnp.concatenate([rows, root], axis=1)
        return step(carry, rows, blocks[2] * root)

    whole = n // size if n > size else 0
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda k, carry: on_block(carry, k * size, size), carry)
    if n > whole * size:
        carry = on_block(carry, whole * size, n - whole * size)
    return carry


def _triangle(
    problem: Problem, penalty: _StackedPenalty, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """R, (d + 1, d + 1), and Q^T (S^{1/2} residual; 0), (d + 1, o)."""

    def step(carry: tuple[jax.Array, jax.Array], rows: jax.Array, residual: jax.Array) -> Any:
        r, rotated = carry
        q, r = jnp.linalg.qr(jnp.concatenate([r, rows / penalty.norms]))
        return r, dot(q.T, jnp.concatenate([rotated, residual]))

    nothing = jnp.zeros((len(penalty.rows), residual.shape[1]), residual.dtype)
    start = varying_like((penalty.rows, nothing), problem.features, penalty.rows, residual)
    return _fold_rows(step, start, problem, residual)


class _Basis(NamedTuple):
    """The directions of the problem, from the singular values of R."""

    u: jax.Array  # (d + 1, d + 1)
    vt: jax.Array  # (d + 1, d + 1)
    inverse: jax.Array  # (d + 1, 1): Sigma^{-1}, zero where Sigma is noise
    seen: jax.Array  # (d + 1, 1): 1.0 where the data are more than noise
    rcond: jax.Array  # ()


def _find_basis(problem: Problem, penalty: _StackedPenalty, r: jax.Array) -> _Basis:
    eps = jnp.finfo(r.dtype).eps
    u, sigma, vt = jnp.linalg.svd(r)

    def seen_by(squares: jax.Array, rows: jax.Array, _: jax.Array) -> jax.Array:
        return squares + _sum_squares(dot(rows / penalty.norms, vt.T))[0]

    none = problem.features[:, :0]
    start = varying_like(jnp.zeros_like(sigma), sigma)
    strength = jnp.sqrt(_fold_rows(seen_by, start, problem, none))
    cut = _NOISE * eps * sigma[0]
    inverse = jnp.where(sigma <= cut, 0, 1 / sigma)  # NaN stays NaN
    seen = (strength > cut) | (jnp.square(sigma / sigma[0]) > eps)
    rcond = jnp.square(sigma[-1] / sigma[0])
    return _Basis(u, vt, inverse[:, None], seen.astype(u.dtype)[:, None], rcond)
