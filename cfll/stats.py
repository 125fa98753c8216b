"""GramStats: the same heads from accumulated sums.

For data larger than memory, micro-batches and several devices: the sums of a data set are the sums
of its parts, in any chunking. Uses the bordered system of `cfll.solve`, one layer below.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.heads import LinearHead, check_anchor, widest_dtype
from cfll.solve import Route, SolveInfo
from cfll.solve.cholesky import cho_solve, cholesky_with_rcond, dot
from cfll.solve.problem import (
    add,
    as_penalty,
    bias_penalty_of,
    bordered_gram,
    check_penalty,
    split_head,
    stack_head,
)

# Refinement needs the data. Below this rcond, in multiples of the machine epsilon, who has only
# sums cannot solve by Cholesky.
_SINGULAR = 1e2


class GramStats(NamedTuple):
    r"""Sufficient statistics of a least-squares problem: sums over samples.

    Solving from sums squares the condition number once and for all: the features are gone. In
    float32, directions of the features weaker than 1e-3 of the strongest are lost; where they
    matter use float64 (``jax_enable_x64`` and ``GramStats.zeros(..., dtype=jnp.float64)``).

    Attributes:
      gram: (d, d), :math:`\sum_i w_i \phi_i \phi_i^\top`.
      cross: (d, o), :math:`\sum_i w_i \phi_i y_i^\top`.
      feature_sum: (d,), :math:`\sum_i w_i \phi_i`; ``None`` for heads without bias.
      target_sum: (o,), :math:`\sum_i w_i y_i`; ``None`` for heads without bias.
      weight_sum: (), :math:`\sum_i w_i`.

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
    weight_sum: jax.Array

    @classmethod
    def zeros(
        cls, d: int, o: int, use_bias: bool = True, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> "GramStats":
        """The sums over no samples, of d features and o outputs, accumulated in this dtype."""
        return cls(
            gram=jnp.zeros((d, d), dtype),
            cross=jnp.zeros((d, o), dtype),
            feature_sum=jnp.zeros((d,), dtype) if use_bias else None,
            target_sum=jnp.zeros((o,), dtype) if use_bias else None,
            weight_sum=jnp.zeros((), dtype),
        )

    def add(
        self, features: jax.Array, targets: jax.Array, sample_weight: jax.Array | None = None
    ) -> "GramStats":
        """The statistics with more samples, in the dtype of these.

        Args:
          features, targets, sample_weight: as in `cfll.ridge_solve`.

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
        return jax.tree.map(jnp.add, self, other)

    def decay(self, factor: jax.typing.ArrayLike) -> "GramStats":
        """Forget: all sums times a factor in [0, 1], so that older samples weigh less."""
        return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), self)

    def psum(self, axis_name: str | tuple[str, ...]) -> "GramStats":
        """The statistics of all devices, inside ``shard_map``, ``pmap`` or ``vmap``.

        One all-reduce of d^2 + d o + d + o + 1 numbers, over the mapped axis (or axes).
        """
        return jax.lax.psum(self, axis_name)

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
    with_bias = stats.feature_sum is not None

    def sums_of(rows: samples.Samples) -> GramStats:
        weighted = rows.weigh(rows.features)
        return GramStats(
            gram=dot(rows.features.T, weighted),
            cross=dot(weighted.T, rows.targets),
            feature_sum=jnp.sum(weighted, axis=0) if with_bias else None,
            target_sum=jnp.sum(rows.weigh(rows.targets), axis=0) if with_bias else None,
            weight_sum=rows.total(),
        )

    replicated = jax.tree.map(lambda _: jax.P(), stats)
    return stats.merge(samples.let_xla_shard(sums_of, rows.features, replicated)(rows))


@partial(jax.jit, static_argnums=0, inline=True)
def _solve(
    penalize_bias: bool, stats: GramStats, anchor: LinearHead, penalty: jax.Array
) -> tuple[LinearHead, SolveInfo]:
    dtype = widest_dtype(stats.gram, anchor.kernel)
    stats, anchor = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (stats, anchor))
    has_bias = anchor.bias is not None
    penalty = as_penalty(penalty, dtype)
    sums = stats.gram, stats.feature_sum, stats.weight_sum
    matrix = bordered_gram(*sums, penalty, bias_penalty_of(penalty, has_bias, penalize_bias))
    zero = jnp.zeros((), dtype)
    unpenalized = bordered_gram(*sums, zero, zero if has_bias else None)
    cross = stack_head(LinearHead(stats.cross, stats.target_sum))
    residual = cross - dot(unpenalized, stack_head(anchor))

    lower, rcond = cholesky_with_rcond(jax.lax.stop_gradient(matrix))
    singular = ~(rcond >= _SINGULAR * jnp.finfo(dtype).eps)

    def apply_inverse(_: object, rhs: jax.Array) -> jax.Array:
        return jax.lax.cond(
            singular, lambda: _pseudo_solve(matrix, rhs), lambda: cho_solve(lower, rhs)
        )

    correction = jax.lax.custom_linear_solve(
        partial(dot, matrix), residual, apply_inverse, symmetric=True
    )
    info = SolveInfo(jnp.where(singular, Route.EIGH, Route.PRIMAL), rcond)
    return add(anchor, split_head(correction, has_bias)), info.as_arrays()


def _pseudo_solve(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    """The smallest solution of matrix x = rhs in the directions that rounding leaves standing."""
    diagonal = jnp.diagonal(matrix)
    scale = jnp.sqrt(jnp.where(diagonal == 0, jnp.ones((), matrix.dtype), diagonal))
    values, vectors = jnp.linalg.eigh(
        jax.lax.stop_gradient(matrix / scale[:, None] / scale[None, :])
    )
    scale = jax.lax.stop_gradient(scale)
    cut = 8 * matrix.shape[0] * jnp.finfo(matrix.dtype).eps
    inverse = jnp.where(values > cut, 1 / values, jnp.where(jnp.isnan(values), values, 0))
    rotated = dot(vectors.T, rhs / scale[:, None])
    return dot(vectors, inverse[:, None] * rotated) / scale[:, None]
