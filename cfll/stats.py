"""GramStats: the same heads from accumulated sums.

For data larger than memory, micro-batches and several devices: the sums of a data set are the sums
of its parts, in any chunking. Uses the bordered system of `cfll.solve`, one layer below.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.heads import LinearHead, check_anchor, widest_dtype
from cfll.solve import Route, SolveInfo
from cfll.solve.cholesky import cho_solve, cholesky_with_rcond, dot, dot_over_rows
from cfll.solve.problem import add, as_penalty, bias_penalty_of, bordered_gram, check_penalty

# Refinement needs the data. Below this rcond, in multiples of the machine epsilon, who has only
# sums cannot solve by Cholesky.
_SINGULAR = 1e2

_Pair = tuple[jax.Array, jax.Array]  # a rounded sum, and what rounding lost


class GramStats(NamedTuple):
    r"""Sufficient statistics of a least-squares problem: sums over samples.

    Solving from sums squares the condition number once and for all: the features are gone. In
    float32, directions of the features weaker than 1e-3 of the strongest are lost; where they
    matter use float64 (``jax_enable_x64`` and ``GramStats.zeros(..., dtype=jnp.float64)``).
    Features with a mean of 10 standard deviations err by 1e-5 to 1e-4, the more the more there are,
    of 100 by 1e-3 to 1e-2, of 1000 they are lost, and ``rcond`` says so: subtract such a mean
    before. A mean of the targets costs digits that ``rcond`` does not see: 1e-4 of the kernel at a
    mean of 1e4 standard deviations, 2e-2 at 1e6. Subtract it, too. `cfll.ridge_solve` has neither.

    Attributes:
      gram: (d, d), :math:`\sum_i w_i \phi_i \phi_i^\top`.
      cross: (d, o), :math:`\sum_i w_i \phi_i y_i^\top`.
      feature_sum: (d,), :math:`\sum_i w_i \phi_i`; ``None`` for heads without bias.
      target_sum: (o,), :math:`\sum_i w_i y_i`; ``None`` for heads without bias.
      target_squares: (o,), :math:`\sum_i w_i y_i^2`, for `cfll.bayesian_ridge`.
      weight_sum: (), :math:`\sum_i w_i`.
      lost: what rounding has lost of each of these sums, so that long streams err no more than
        short ones: the same fields, with ``lost=None``; ``None`` for nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> stats = GramStats.zeros(2, 1)
      >>> for chunk in jnp.arange(12.0).reshape(3, 2, 2):
      ...     stats = stats.add(chunk**2 / 100, chunk[:, :1])
      >>> stats.ridge(beta=0.1).kernel.shape
      (2, 1)
    """

    gram: jax.Array
    cross: jax.Array
    feature_sum: jax.Array | None
    target_sum: jax.Array | None
    target_squares: jax.Array
    weight_sum: jax.Array
    lost: Any = None

    @classmethod
    def zeros(
        cls, d: int, o: int, use_bias: bool = True, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> "GramStats":
        """The sums over no samples, of d features and o outputs, accumulated in this dtype."""
        zeros = cls(
            gram=jnp.zeros((d, d), dtype),
            cross=jnp.zeros((d, o), dtype),
            feature_sum=jnp.zeros((d,), dtype) if use_bias else None,
            target_sum=jnp.zeros((o,), dtype) if use_bias else None,
            target_squares=jnp.zeros((o,), dtype),
            weight_sum=jnp.zeros((), dtype),
        )
        return zeros._replace(lost=_lost(zeros))

    def add(
        self, features: jax.Array, targets: jax.Array, sample_weight: jax.Array | None = None
    ) -> "GramStats":
        """The statistics with more samples, in the dtype of these.

        Args:
          features, targets, sample_weight: as in `cfll.ridge_solve`, but no weights per output.

        Returns:
          New statistics.

        Raises:
          ValueError, TypeError: while tracing, for shapes and dtypes that do not fit.
        """
        features, targets = samples.check_batch(features, targets, sample_weight)
        if (features.shape[-1], targets.shape[-1]) != self.cross.shape:
            raise ValueError(
                f"features {features.shape} and targets {targets.shape} do not fit statistics of "
                f"{self.cross.shape[0]} features and {self.cross.shape[1]} outputs: write "
                f"GramStats.zeros({features.shape[-1]}, {targets.shape[-1]})."
            )
        return _add(self, features, targets, sample_weight)

    def merge(self, other: "GramStats") -> "GramStats":
        """The statistics of both sets of samples, of the same d, o and use_bias."""
        lost = jax.tree.map(jnp.add, _lost(self), _lost(other))
        pairs = jax.tree.map(
            _sum_exactly, self._replace(lost=None), lost, other._replace(lost=None)
        )
        sums, lost = jax.tree.transpose(jax.tree.structure(lost), None, pairs)
        return sums._replace(lost=lost)

    def decay(self, factor: jax.typing.ArrayLike) -> "GramStats":
        """Forget: all sums times a factor in [0, 1], so that older samples weigh less."""
        return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), self)

    def psum(self, axis_name: str | tuple[str, ...]) -> "GramStats":
        """The statistics of all devices, inside ``shard_map``, ``pmap`` or ``vmap``.

        One all-reduce of d^2 + d o + d + 2 o + 1 numbers, over the mapped axis (or axes). It rounds
        the sums once per device, and ``lost`` starts at zero again: sum long streams first.
        """
        sums = jax.lax.psum(self._replace(lost=None), axis_name)
        return sums._replace(lost=_lost(sums))

    def ridge(self, beta: jax.typing.ArrayLike, *, penalize_bias: bool = True) -> LinearHead:
        """`cfll.ridge_solve` of all samples added, with the same beta and penalize_bias."""
        d, o = self.cross.shape
        zero = LinearHead.zeros(d, o, self.feature_sum is not None, self.gram.dtype)
        return self.solve(zero, beta, penalize_bias=penalize_bias, name="beta")[0]

    def prox(
        self, anchor: LinearHead, lam: jax.typing.ArrayLike, *, penalize_bias: bool = True
    ) -> LinearHead:
        """`cfll.prox_solve` of all samples added; a bias if both anchor and statistics have one."""
        return self.solve(anchor, lam, penalize_bias=penalize_bias)[0]

    def solve(
        self,
        anchor: LinearHead,
        penalty: jax.typing.ArrayLike,
        *,
        penalize_bias: bool = True,
        name: str = "lam",
    ) -> tuple[LinearHead, SolveInfo]:
        """`prox` with its diagnostics.

        Cholesky; where it is singular to working precision, an eigendecomposition of the scaled
        Gram matrix that leaves the anchor alone in the directions that the sums do not determine.

        Args:
          anchor: the head to stay near.
          penalty: scalar, (d,) or (d, d), multiplying a *sum* over samples.
          penalize_bias: as in `cfll.prox_solve`.
          name: what the caller calls the penalty, for messages.

        Returns:
          The head and a `cfll.SolveInfo` with the route "primal" or "eigh".

        Raises:
          ValueError, TypeError: while tracing, for an anchor or a penalty that does not fit.
        """
        d, o = self.cross.shape
        check_anchor(anchor, d, o)
        has_bias = self.feature_sum is not None
        if (anchor.bias is not None) != has_bias:
            raise ValueError(
                "anchor and statistics disagree about a bias: write GramStats.zeros(d, o, "
                f"use_bias={anchor.bias is not None})."
            )
        # How many samples there were is data here, not a shape: d + 1 switches that check off.
        check_penalty(name, penalty, d, d + 1, False)
        return _solve(penalize_bias, self, anchor, penalty)


# Compiled themselves: outside of jit a call compiles once per shape; inside they are inlined.
@partial(jax.jit, inline=True)
def _add(
    stats: GramStats, features: jax.Array, targets: jax.Array, sample_weight: jax.Array | None
) -> GramStats:
    rows = samples.flatten(features, targets, sample_weight, stats.gram.dtype)
    sums_of = partial(_sums_of, stats.feature_sum is not None)
    replicated = jax.tree.map(lambda _: jax.P(), stats._replace(lost=None))
    return stats.merge(samples.let_xla_shard(sums_of, rows.features, replicated)(rows))


def _lost(stats: GramStats) -> GramStats:
    """What rounding has lost of the sums; zeros where nobody kept it."""
    return stats.lost or jax.tree.map(jnp.zeros_like, stats._replace(lost=None))


def _sums_of(with_bias: bool, rows: samples.Samples) -> GramStats:
    """The sums over one batch."""
    weighted = rows.weigh(rows.features)
    return GramStats(
        gram=dot_over_rows(rows.features, weighted),
        cross=dot_over_rows(weighted, rows.targets),
        feature_sum=jnp.sum(weighted, axis=0) if with_bias else None,
        target_sum=jnp.sum(rows.weigh(rows.targets), axis=0) if with_bias else None,
        target_squares=jnp.sum(rows.weigh(jnp.square(rows.targets)), axis=0),
        weight_sum=rows.total(),
    )


def _sum_exactly(
    total: jax.Array, lost: jax.Array, *terms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of all, rounded, and what rounding loses; by Knuth's two-sum."""
    for term in terms:
        before, total = total, total + term
        part = total - before
        lost = lost + jax.lax.stop_gradient((before - (total - part)) + (term - part))
    rounded = total + lost
    return rounded, jax.lax.stop_gradient(lost - (rounded - total))


def _halves(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers of half the digits that add up to this one; products of such are exact."""
    info = jnp.finfo(array.dtype)
    high = jax.lax.reduce_precision(array, info.nexp, (info.nmant - 1) // 2)
    return high, array - high


def _subtract_product(total: _Pair, left: jax.Array, right: _Pair) -> jax.Array:
    """The difference of total and left * right, rounded once."""
    factors = (*_halves(right[0]), right[1])
    terms = (-half * factor for half in _halves(left) for factor in factors)
    return _sum_exactly(*total, *terms)[0]


def center(stats: GramStats, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Means (1, d + o) of (features, targets), products (d, d + o) with the features, squares (o,).

    Products, and squares of the targets, around the means, with all digits: sum (x - m) (z - c)^T =
    G - m s^T - (s_x - w m) c^T, with the exact sums G, s and w, holds for rounded m and c, too.
    """

    def joined(sums: Any) -> tuple[jax.Array, ...]:
        products = jnp.concatenate([sums.gram, sums.cross], axis=1)
        sums_ = jnp.concatenate([sums.feature_sum, sums.target_sum])[None]
        return products, sums_, sums.weight_sum

    products, sums, weights = zip(joined(stats), joined(_lost(stats)), strict=True)
    d, means = len(stats.gram), sums[0] / weight
    around = _subtract_product(products, means[:, :d].T, sums)
    rest = _subtract_product(sums, means, weights)
    squares, mean = (stats.target_squares, _lost(stats).target_squares), means[0, d:]
    of_targets = sums[0][0, d:], sums[1][0, d:]
    around_mean = _subtract_product(squares, mean, of_targets) - rest[0, d:] * mean
    return means, around - rest[:, :d].T * means, around_mean


@partial(jax.jit, static_argnums=0, inline=True)
def _solve(
    penalize_bias: bool, stats: GramStats, anchor: LinearHead, penalty: jax.Array
) -> tuple[LinearHead, SolveInfo]:
    dtype = widest_dtype(stats.gram, anchor.kernel)
    stats, anchor = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (stats, anchor))
    penalty = as_penalty(penalty, dtype)
    bias_penalty = bias_penalty_of(penalty, anchor.bias is not None, penalize_bias)
    if bias_penalty is None:
        matrix = bordered_gram(stats.gram, None, stats.weight_sum, penalty, None)
        residual = stats.cross - dot(stats.gram, anchor.kernel)
        correction, info = _solve_spd(matrix, jnp.diagonal(matrix), residual)
        return add(anchor, LinearHead(correction)), info
    # The bias is eliminated: what is left is the kernel's system, with the sums around the means.
    d, one = len(stats.gram), jnp.ones((), dtype)
    weight = jnp.where(stats.weight_sum == 0, one, stats.weight_sum)
    means, around, _ = center(stats, weight)
    mean, gram = means[:, :d], around[:, :d]
    share = stats.weight_sum / (weight + bias_penalty)  # of the mean residual, what the bias takes
    pull = share * bias_penalty * mean.T
    matrix = bordered_gram(gram + dot(pull, mean), None, weight, penalty, None)
    gap = means[:, d:] - anchor(mean)
    residual = around[:, d:] - dot(gram, anchor.kernel) + dot(pull, gap)
    size = jnp.diagonal(matrix) + weight * jnp.square(mean[0])
    kernel, info = _solve_spd(matrix, size, residual)
    bias = share * (gap - dot(mean, kernel))[0]
    return add(anchor, LinearHead(kernel, bias)), info


def _solve_spd(matrix: jax.Array, size: jax.Array, rhs: jax.Array) -> tuple[jax.Array, SolveInfo]:
    """The solution of matrix x = rhs, where entry (i, j) is rounded as sqrt(size_i size_j) is."""
    lower, rcond = cholesky_with_rcond(jax.lax.stop_gradient(matrix))
    rcond = rcond * jax.lax.stop_gradient(jnp.min(jnp.diagonal(matrix) / size))
    singular = ~(rcond >= _SINGULAR * jnp.finfo(matrix.dtype).eps)

    def apply_inverse(_: object, rhs: jax.Array) -> jax.Array:
        return jax.lax.cond(
            singular, lambda: _pseudo_solve(matrix, size, rhs), lambda: cho_solve(lower, rhs)
        )

    x = jax.lax.custom_linear_solve(partial(dot, matrix), rhs, apply_inverse, symmetric=True)
    return x, SolveInfo(jnp.where(singular, Route.EIGH, Route.PRIMAL), rcond).as_arrays()


def _pseudo_solve(matrix: jax.Array, size: jax.Array, rhs: jax.Array) -> jax.Array:
    """The smallest solution of matrix x = rhs in the directions that rounding leaves standing."""
    scale = jnp.sqrt(jnp.where(size == 0, jnp.ones((), size.dtype), size))
    values, vectors = jnp.linalg.eigh(
        jax.lax.stop_gradient(matrix / scale[:, None] / scale[None, :])
    )
    scale = jax.lax.stop_gradient(scale)
    cut = 8 * matrix.shape[0] * jnp.finfo(matrix.dtype).eps
    inverse = jnp.where(values > cut, 1 / values, jnp.where(jnp.isnan(values), values, 0))
    rotated = dot(vectors.T, rhs / scale[:, None])
    return dot(vectors, inverse[:, None] * rotated) / scale[:, None]
