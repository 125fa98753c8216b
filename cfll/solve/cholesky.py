r"""Gram matrices, their Cholesky factors and how far those can be trusted; knows no head.

Speed. On a CPU LAPACK does not share XLA's threads: with one thread its factorizations and
triangular solves are slow beside XLA's matrix products. So large ones are split into halves,

.. math::
    A = \begin{pmatrix} A_{11} & A_{21}^\top \\ A_{21} & A_{22} \end{pmatrix}, \qquad
    L = \begin{pmatrix} L_{11} & \\ L_{21} & L_{22} \end{pmatrix}, \qquad
    L_{21} = A_{21} L_{11}^{-\top}, \qquad L_{22} L_{22}^\top = A_{22} - L_{21} L_{21}^\top,

until LAPACK has little left to do.

Trust. The relative pivot :math:`L_{jj}^2 / A_{jj}` of a Cholesky factor is the part of column j
that the columns before it do not explain: an upper bound, mostly a close one, of the smallest
eigenvalue of the matrix scaled to unit diagonal. (Not on Kahan's matrices, chains of moderate
pivots: two steps of inverse iteration find their small eigenvalue.) Rounding the m^2 entries of
that matrix, each by about eps, perturbs it by about eps sqrt(m) in norm. So the relative error of
the solution is about eps / ``rcond`` with ``rcond`` = smallest relative pivot / sqrt(m), whatever
the scale of each feature, at a cost of m^2. (`tests/test_solve.py` holds it against random,
collinear and shifted features. The classical bound, with the norm of the matrix for the norm of its
rounding, is far more pessimistic where features have a mean, as features after a ReLU do.)
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp

# How many rows, at least, a product sums over at once: float32 loses the digits of a long sum.
_BLOCK = 2**14
# From how many features on a Gram matrix is made in strips: below, a product is too small to split.
_STRIPS_FROM = 512
# Up to this size a factor is LAPACK's alone: a few hundred rows are not worth splitting.
_LEAF = 640
# How far below the smallest pivot the smallest eigenvalue lies on features that are not contrived.
_OPTIMISM = 10

_HIGHEST = jax.lax.Precision.HIGHEST  # GPUs multiply float32 in TF32 by default, TPUs in bfloat16
dot = partial(jnp.matmul, precision=_HIGHEST)


def dot_over_rows(left: jax.Array, right: jax.Array) -> jax.Array:
    """left^T right, for left (n, k) and right (n, m)."""
    n = len(left)
    # A power of two, so that devices keep the blocks of their rows.
    blocks = 2 ** int(math.log2(max(n // _BLOCK, 1)))
    if blocks == 1:
        # This way around the smaller matrix is transposed, and copied for it.
        return dot(left.T, right) if left.shape[1] <= right.shape[1] else dot(right.T, left).T
    whole = n - n % blocks
    split = (rows[:whole].reshape(blocks, -1, rows.shape[1]) for rows in (left, right))
    products = jnp.einsum("bnk,bnm->bkm", *split, precision=_HIGHEST)
    return jnp.sum(products, axis=0) + dot(left[whole:].T, right[whole:])


def lower_gram(left: jax.Array, right: jax.Array) -> jax.Array:
    """The lower triangle of left^T right, where that product is symmetric; (d, d)."""
    # In strips, each against the columns up to its own last one: 5 / 8 of the operations.
    d = left.shape[1]
    if d < _STRIPS_FROM:
        return dot_over_rows(left, right)
    ends = [d * k // 4 for k in range(5)]
    strips = [
        jnp.pad(dot_over_rows(left[:, start:end], right[:, :end]), ((0, 0), (0, d - end)))
        for start, end in itertools.pairwise(ends)
    ]
    return jnp.concatenate(strips)


def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower Cholesky factor, from the lower triangle alone; NaN where it does not exist."""
    if len(matrix) <= _LEAF:
        return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    half = len(matrix) // 2
    first = cholesky(matrix[:half, :half])
    below = _solve_lower(first, matrix[half:, :half].T).T
    last = cholesky(matrix[half:, half:] - dot(below, below.T))
    return jnp.concatenate(
        [jnp.pad(first, ((0, 0), (0, len(last)))), jnp.concatenate([below, last], axis=1)]
    )


def cho_solve(lower: jax.Array, rhs: jax.Array) -> jax.Array:
    """(lower lower^T)^{-1} rhs, for a factor (m, m) and rhs (m, k)."""
    return _solve_transposed(lower, _solve_lower(lower, rhs))


def _solve_lower(lower: jax.Array, rhs: jax.Array) -> jax.Array:
    """lower^{-1} rhs."""
    if len(lower) <= _LEAF:
        return jax.lax.linalg.triangular_solve(lower, rhs, left_side=True, lower=True)
    half = len(lower) // 2
    first = _solve_lower(lower[:half, :half], rhs[:half])
    left = rhs[half:] - dot(lower[half:, :half], first)
    return jnp.concatenate([first, _solve_lower(lower[half:, half:], left)])


def _solve_transposed(lower: jax.Array, rhs: jax.Array) -> jax.Array:
    """lower^{-T} rhs."""
    if len(lower) <= _LEAF:
        return jax.lax.linalg.triangular_solve(
            lower, rhs, left_side=True, lower=True, transpose_a=True
        )
    half = len(lower) // 2
    last = _solve_transposed(lower[half:, half:], rhs[half:])
    left = rhs[:half] - dot(lower[half:, :half].T, last)
    return jnp.concatenate([_solve_transposed(lower[:half, :half], left), last])


def cholesky_with_rcond(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor and the condition estimate of the module's docstring, then NaN as well."""
    lower = cholesky(matrix)
    diagonal, dtype = jnp.diagonal(matrix), jnp.finfo(matrix.dtype)
    pivots = jnp.square(jnp.diagonal(lower)) / diagonal
    # Below this range products that count were flushed to zero; above it the solution of a
    # right-hand side of size one is.
    in_range = (diagonal >= dtype.tiny / dtype.eps) & (diagonal <= dtype.eps / dtype.tiny)
    pivots = jnp.where(in_range | jnp.isnan(pivots), pivots, jnp.zeros_like(pivots))
    # Chains of small pivots multiply: two steps of inverse iteration see the smallest eigenvalue.
    root = jnp.sqrt(diagonal)[:, None]
    vector = jnp.cos(jnp.arange(len(root), dtype=root.dtype))[:, None]  # no symmetry to miss
    for _ in range(2):
        vector = root * cho_solve(lower, root * vector / jnp.linalg.norm(vector))
    smallest = 1 / jnp.linalg.norm(vector)
    return lower, jnp.minimum(jnp.min(pivots), _OPTIMISM * smallest) / math.sqrt(matrix.shape[0])
