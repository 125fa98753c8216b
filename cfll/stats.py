"""GramStats: the same heads from accumulated sums.

For data larger than memory, micro-batches and several devices: the sums of a data set are the sums
of its parts, in any chunking. Uses the bordered system of `cfll.solve`, one layer below.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.heads import LinearHead, as_plain, check_anchor, widest_dtype
from cfll.moments import Centered, Moments, Pair, around, around_zero
from cfll.solve import SolveInfo
from cfll.solve.cholesky import cho_solve, dot, dot_over_rows
from cfll.solve.problem import add, as_penalty, bias_penalty_of, bordered_gram, check_penalty
from cfll.solve.sums import factor, solve_spd


class GramStats(NamedTuple):
    r"""Sufficient statistics of a least-squares problem: sums over samples.

    Solving from sums squares the condition number once and for all: the features are gone. In
    float32, directions of the features weaker than 1e-3 of the strongest are lost; where they
    matter use float64 (``jax_enable_x64`` and ``GramStats.zeros(..., dtype=jnp.float64)``).
    Means of features and targets cost no digits: what rounding loses of the sums is kept. Add
    statistics by `merge` and `psum`, which keep it: leaf by leaf it is lost, and nothing sees it.

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
        """The statistics of both sets of samples, of the same d, o and use_bias.

        Raises:
          ValueError: while tracing, where those differ.
        """
        ours, theirs = ((*s.cross.shape, s.feature_sum is not None) for s in (self, other))
        if ours != theirs:
            raise ValueError(
                f"statistics of (d, o, use_bias) = {theirs} do not fit those of {ours}: make both "
                f"by GramStats.zeros{ours}."
            )
        sums, terms = self._replace(lost=None), other._replace(lost=None)
        lost = jax.tree.map(jnp.add, _lost(self), _lost(other))
        return _joined(jax.tree.map(lambda *pair: Pair(*pair[:2]).plus(pair[2]), sums, lost, terms))

    def decay(self, factor: jax.typing.ArrayLike) -> "GramStats":
        """Forget: all sums times a factor in [0, 1], so that older samples weigh less."""
        sums, lost = self._replace(lost=None), _lost(self)
        return _joined(jax.tree.map(partial(_scale, factor), sums, lost))

    def psum(self, axis_name: str | tuple[str, ...]) -> "GramStats":
        """The statistics of all devices, inside ``shard_map``, ``pmap`` or ``vmap``.

        Two all-reduces over the mapped axis (or axes): the means, d + o + 1 numbers, and the sums
        around them, d^2 + d o + d + 2 o. Without bias one, of the sums, that begins ``lost`` anew.
        """
        if self.feature_sum is None:
            sums = jax.lax.psum(self._replace(lost=None), axis_name)
            return sums._replace(lost=_lost(sums))
        moments = _moments_of(self)
        first, weight = jax.lax.psum((moments.first.total, moments.weight.total), axis_name)
        centered = around(_mean(first, weight), moments)
        sums = jax.lax.psum(centered[1:], axis_name)
        return _stats_of(around_zero(Centered(centered.means, *sums), weight))

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
        anchor, penalty = check_anchor(anchor, d, o), as_plain(penalty)
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
    replicated = jax.tree.map(lambda _: jax.P(), stats._replace(lost=_lost(stats)))
    return stats.merge(samples.let_xla_shard(sums_of, rows.features, replicated)(rows))


def _lost(stats: GramStats) -> GramStats:
    """What rounding has lost of the sums; zeros where nobody kept it."""
    return stats.lost or jax.tree.map(jnp.zeros_like, stats._replace(lost=None))


def _scale(factor: jax.typing.ArrayLike, total: jax.Array, lost: jax.Array) -> Pair:
    """A pair times a number."""
    factor = jnp.asarray(factor, total.dtype)
    return Pair.of(jnp.zeros_like(total)).plus_product(factor, Pair(total, lost))


def _joined(pairs: Any) -> GramStats:
    """Statistics from a pair for each number."""
    total, lost = (
        jax.tree.map(lambda pair, k=k: pair[k], pairs, is_leaf=lambda node: isinstance(node, Pair))
        for k in range(2)
    )
    return total._replace(lost=lost)


def _sums_of(with_bias: bool, rows: samples.Samples) -> GramStats:
    """The sums over one batch, with what rounding loses of them."""
    weight = rows.total()
    if not with_bias:
        products, squares = _products(rows)
        d = len(products)
        sums = GramStats(products[:, :d], products[:, d:], None, None, squares, weight)
        return sums._replace(lost=_lost(sums))
    # Around the means, which a solve subtracts: the products have no digits of them to lose.
    means = _mean(_first(rows), weight)
    # The barrier keeps XLA from taking the rows it centers for the products, in another layout.
    first = _first(_less(rows, jax.lax.optimization_barrier(means)))
    centered = Centered(means, first, *_products(_less(rows, means)))
    return _stats_of(around_zero(centered, weight))


def _less(rows: samples.Samples, means: jax.Array) -> samples.Samples:
    """Features and targets less their means, (1, d + o)."""
    d = rows.features.shape[1]
    return rows._replace(features=rows.features - means[:, :d], targets=rows.targets - means[:, d:])


def _first(rows: samples.Samples) -> jax.Array:
    """The first moments, (1, d + o)."""
    parts = (rows.weigh(array).sum(axis=0) for array in (rows.features, rows.targets))
    return jnp.concatenate(list(parts))[None]


def _products(rows: samples.Samples) -> tuple[jax.Array, jax.Array]:
    """Products and squares of `Moments`."""
    weighted = rows.weigh(rows.features)
    gram, cross = dot_over_rows(rows.features, weighted), dot_over_rows(weighted, rows.targets)
    squares = jnp.sum(rows.weigh(jnp.square(rows.targets)), axis=0)
    return jnp.concatenate([gram, cross], axis=1), squares


def _mean(sums: jax.Array, weight: jax.Array) -> jax.Array:
    """About the means (1, k): any finite numbers near them will do."""
    return jax.lax.stop_gradient(sums / jnp.where(weight == 0, jnp.ones_like(weight), weight))


def _moments_of(stats: GramStats) -> Moments:
    """The sums of statistics with a bias, with what rounding lost."""
    both: Any = (stats, _lost(stats))
    firsts = (jnp.concatenate([part.feature_sum, part.target_sum])[None] for part in both)
    products = (jnp.concatenate([part.gram, part.cross], axis=1) for part in both)
    squares, weights = zip(*((part.target_squares, part.weight_sum) for part in both), strict=True)
    return Moments(Pair(*weights), Pair(*firsts), Pair(*products), Pair(*squares))


def _stats_of(moments: Moments) -> GramStats:
    """The other way."""
    d = len(moments.products.total)
    total, lost = (
        GramStats(products[:, :d], products[:, d:], first[0, :d], first[0, d:], squares, weight)
        for weight, first, products, squares in zip(*moments, strict=True)
    )
    return total._replace(lost=lost)


def center(stats: GramStats, weight: jax.Array) -> Centered:
    """The sums around the means, for this sum of weights: not zero."""
    moments = _moments_of(stats)
    return around(moments.first.total / weight, moments)


def share_rounded(stats: GramStats) -> float:
    """Of the sums around zero, what rounding them costs sums around the means, in units of eps."""
    return 1.0 if stats.lost is None else float(jnp.finfo(stats.gram.dtype).eps)


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
        size = jnp.diagonal(matrix)
        lower, singular, info = factor(matrix, size)
        return add(anchor, LinearHead(solve_spd(lower, singular, matrix, size, residual))), info
    # The bias is eliminated: what is left is the kernel's system, with the sums around the means,
    # (G + Lambda + c m m^T) k = r + c m gap. But c |m|^2 would cost G its digits, so this part is
    # kept out (Sherman, Morrison): with (G + Lambda) (x, u) = (r, m) it is k = x + c u g, where
    # g = (gap - m^T x) / (1 + c m^T u) is the mean residual at k, of which the bias takes a share.
    # It is kept in only where G + Lambda is singular without it. Where the bias is held fast, x is
    # far from k and their difference has lost digits: a step of refinement, of k and g, finds them.
    d, one = len(stats.gram), jnp.ones((), dtype)
    weight = jnp.where(stats.weight_sum == 0, one, stats.weight_sum)
    means, _, products, _ = center(stats, weight)
    mean, gram = means[:, :d], products[:, :d]
    share = stats.weight_sum / (weight + bias_penalty)  # of the mean residual, what the bias takes
    matrix = bordered_gram(gram, None, weight, penalty, None)
    size = jnp.diagonal(matrix) + share_rounded(stats) * weight * jnp.square(mean[0])
    lower, singular, info = factor(matrix, size)
    c, zero = share * bias_penalty, jnp.zeros((), dtype)
    inside, c = (jnp.where(singular, *pair) for pair in ((c, zero), (zero, c)))
    matrix, size = matrix + inside * dot(mean.T, mean), size + inside * jnp.square(mean[0])
    gap = means[:, d:] - anchor(mean)
    residual = products[:, d:] - dot(gram, anchor.kernel) + inside * dot(mean.T, gap)
    both = solve_spd(lower, singular, matrix, size, jnp.concatenate([residual, mean.T], axis=1))
    x, u = both[:, :-1], both[:, -1:]

    def joined(x: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = (gap - dot(mean, x)) / (one + c * dot(mean, u))
        return x + c * u * left, left

    kernel, left = joined(x, gap)
    missed = residual - dot(matrix, kernel) + c * mean.T * left
    solvable = jnp.where(singular, jnp.eye(d, dtype=dtype), lower)
    steps = joined(cho_solve(solvable, missed), gap - dot(mean, kernel) - left)
    step, change = (jnp.where(singular, zero, step) for step in steps)
    return add(anchor, LinearHead(kernel + step, share * (left + change)[0])), info
