r"""qr: CholeskyQR, twice, of the stacked matrix: where A is singular to working precision.

Stack :math:`M = (S^{1/2} \tilde\Phi; \mathrm{diag}(\Lambda, \mu)^{1/2})`, so that A = M^T M. A
factor of the shifted matrix, :math:`L L^\top = A + \sigma \, \mathrm{diag}(A)`, exists whatever
rounding did to A. The columns of :math:`M L^{-\top}` are orthonormal but for directions in which A
is below sigma, and their Gram matrix, *made anew from the data*, shows those as if A had never been
formed. With its eigenvectors, :math:`B = V \, \mathrm{diag}(b) V^\top`,

.. math::
    A^{-1} = L^{-\top} V \, \mathrm{diag}(1 / b) V^\top L^{-1}.

Where the data's part of b is below rounding it is noise, as it is for repeated features, and the
quotient of noise and a small penalty would be a huge weight: such a direction gets no correction,
as in exact arithmetic. Refinement follows, and then what the penalties alone ask for there.

The rows of M L^{-T}, as many as the features, are never kept: "auto" sets the memory of this solver
aside in every step, taken or not.

Reference: Fukaya et al., Shifted Cholesky QR for computing the QR factorization of ill-conditioned
matrices, SIAM J. Sci. Comput. 42 (2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.samples import varying_like
from cfll.solve.cholesky import cho_solve, cholesky, dot, lower_gram
from cfll.solve.primal import NormalEquations, Primal, refine_by_data
from cfll.solve.problem import Problem, Residual, add, bordered_gram, split_head, stack_head
from cfll.solve.route import Correction, Route, SolveInfo

# The shift, relative to the diagonal, in multiples of the machine epsilon and sqrt(m); and what is
# taken for rounding in b, in multiples of the shift.
_SHIFT, _NOISE = 32, 1 / 16
_STEPS = 2


@dataclass(frozen=True)
class QR(Primal):
    """The solver of the module's docstring."""

    def correct(
        self,
        factor: NormalEquations,
        problem: Problem,
        residual: Residual,
        anchor: LinearHead | None,
    ) -> Correction:
        basis = _find_basis(problem)
        limit = jnp.full((), _STEPS, jnp.int32)
        x = basis.solve(stack_head(factor.right_hand_side))
        x = refine_by_data(basis.solve, problem, x, residual, limit, anchor)
        # Rounding has left something in the directions without data, as much as it is of the shift.
        nothing = Residual(jnp.zeros_like(residual.rows), residual.mean)
        penalized = problem.penalize(split_head(x, problem.has_bias))
        pull = jax.tree.map(jnp.subtract, problem.right_hand_side(nothing), penalized)
        x = x + basis.solve_without_data(stack_head(pull))
        return Correction(split_head(x, problem.has_bias), SolveInfo(Route.QR, factor.rcond))

    def apply_inverse(
        self, factor: NormalEquations, problem: Problem, rows: jax.Array | None, head: LinearHead
    ) -> tuple[jax.Array, LinearHead]:
        del factor  # made of squares, which may be out of range
        basis = _find_basis(problem)
        both = head if rows is None else add(head, problem.adjoint(rows))
        x = split_head(basis.solve(stack_head(both)), problem.has_bias)
        # Without data the penalties alone have to balance the head.
        pull = jax.tree.map(jnp.subtract, head, problem.penalize(x))
        x = add(x, split_head(basis.solve_without_data(stack_head(pull)), problem.has_bias))
        return problem.left_of(rows, x), x


class _Basis(NamedTuple):
    """Directions in which A is diagonal: v^T A v = diag(b)."""

    v: jax.Array  # L^{-T} V, (d + 1, d + 1)
    inverse: jax.Array  # 1 / b, zero where the data are noise, (d + 1, 1)
    penalties: jax.Array  # diag(Lambda, mu), (d + 1, d + 1)

    def solve(self, rows: jax.Array) -> jax.Array:
        """A^{-1} rows, where the data are more than noise."""
        return dot(self.v, self.inverse * dot(self.v.T, rows))

    def solve_without_data(self, rows: jax.Array) -> jax.Array:
        """A^{-1} rows in the other directions, where A is the penalties."""
        without = self.inverse == 0
        v = jnp.where(without.T, self.v, jnp.zeros_like(self.v))
        matrix = dot(v.T, dot(self.penalties, v))
        unit = jnp.sqrt(jnp.diagonal(matrix))[:, None]
        inverse_unit = 1 / jnp.where(unit > 0, unit, jnp.ones_like(unit))
        matrix = matrix * inverse_unit * inverse_unit.T
        # Directions of very different units may look alike; those with data need some diagonal.
        shift = jnp.where(jnp.diagonal(matrix) > 0, _shift_of(matrix), 1)
        v = v * inverse_unit.T
        return dot(v, cho_solve(cholesky(matrix + jnp.diag(shift)), dot(v.T, rows)))


def _find_basis(problem: Problem) -> _Basis:
    """The directions of A by Cholesky factors and eigenvectors."""
    penalties = _penalties(problem)
    unit = _largest_of_columns(problem, penalties)
    inverse_unit = 1 / unit  # not / unit / unit.T, which XLA may make / (unit unit.T): out of range
    scaled = penalties * inverse_unit * inverse_unit.T
    matrix = _gram(problem, lambda rows: rows * inverse_unit) + scaled
    diagonal = jnp.diagonal(matrix)
    diagonal = jnp.where(diagonal == 0, jnp.ones_like(diagonal), diagonal)
    lower = cholesky(matrix + _shift_of(matrix) * jnp.diag(diagonal))
    whiten = jnp.diag(inverse_unit[0])
    whiten = jax.lax.linalg.triangular_solve(lower, whiten, left_side=True, lower=True)

    data = _gram(problem, lambda rows: dot(rows, whiten.T))
    b, v = jnp.linalg.eigh(data + dot(whiten, dot(penalties, whiten.T)))
    from_data = jnp.sum(v * dot(data, v), axis=0)
    eps, shift = jnp.finfo(b.dtype).eps, _shift_of(matrix)
    seen = (from_data > _NOISE * shift) | (b > eps / shift)
    inverse = jnp.where(seen | jnp.isnan(b), 1 / b, jnp.zeros_like(b))
    return _Basis(dot(whiten.T, v), inverse[:, None], penalties)


def _shift_of(matrix: jax.Array) -> float:
    """More than what rounding does to a matrix of unit diagonal."""
    return float(_SHIFT * math.sqrt(len(matrix)) * jnp.finfo(matrix.dtype).eps)


def _penalties(problem: Problem) -> jax.Array:
    """diag(Lambda, mu), (d + 1, d + 1)."""
    zero = jnp.zeros((), problem.features.dtype)
    zeros = jnp.zeros(problem.features.shape[1], zero.dtype)
    gram = jnp.diag(zeros)
    return bordered_gram(gram, zeros, zero, problem.penalty, problem.bias_penalty)


def _largest_of_columns(problem: Problem, penalties: jax.Array) -> jax.Array:
    """The largest entry of each column of M, (1, d + 1): in these units nothing overflows."""
    # Without weights no root of them, whose n ones XLA would fold while compiling.
    weights = jnp.ones_like(penalties[0, :1]) if problem.weights is None else problem.weights
    root = jnp.sqrt(weights)
    largest = jnp.max(jnp.abs(problem.features) * root[:, None], axis=0, initial=0)
    if problem.has_bias:
        largest = jnp.append(largest, jnp.max(root, initial=0))
    largest = jnp.maximum(largest, jnp.sqrt(jnp.diagonal(penalties)))
    return jnp.where(largest > 0, largest, jnp.ones_like(largest))[None, :]


def _gram(problem: Problem, transform: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The Gram matrix of the transformed rows of S^{1/2} Phi~, in blocks of rows."""
    n, d = problem.features.shape
    size = max(d, 256, n // 8)

    def add_block(gram: jax.Array, start: jax.typing.ArrayLike, size: int) -> jax.Array:
        def block(array: jax.Array | None) -> jax.Array | None:
            return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, size)

        features, weights = jax.tree.map(block, (problem.features, problem.weights))
        rows, root = problem._replace(features=features, weights=weights).root_weighted()
        if problem.has_bias:
            rows = jnp.concatenate([rows, root], axis=1)
        rows = transform(rows)
        return gram + lower_gram(rows, rows)

    m = d + problem.has_bias
    gram = varying_like(jnp.zeros((m, m), problem.features.dtype), problem.features)
    whole = n // size if n > size else 0
    if whole:
        gram = jax.lax.fori_loop(0, whole, lambda k, gram: add_block(gram, k * size, size), gram)
    gram = add_block(gram, whole * size, n - whole * size) if n > whole * size else gram
    return jnp.tril(gram) + jnp.tril(gram, -1).T
