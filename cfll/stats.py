"""GramStats: the same heads from accumulated sums.

For data larger than memory, micro-batches and several devices: the sums of a data set are the sums
of its parts, in any chunking. Uses the bordered system of `cfll.solve`, one layer below.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfll import _checks, solve
from cfll.cholesky import cho_solve, cholesky_with_rcond, dot
from cfll.heads import LinearHead, widest_dtype


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
        """The sums over no samples.

        Args:
          d: number of features.
          o: number of outputs.
          use_bias: whether the heads to be solved have a bias.
          dtype: float32 or float64; the sums are accumulated in it.

        Returns:
          Statistics of zeros.
        """
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
        """The statistics with more samples.

        Args:
          features: (..., d); all leading axes are samples.
          targets: (..., o).
          sample_weight: as in `cfll.ridge_solve`; weight zero is a sample that is not there.

        Returns:
          New statistics, in the dtype of these.

        Raises:
          ValueError, TypeError: while tracing, for shapes and dtypes that do not fit.
        """
        features, targets = jnp.asarray(features), jnp.asarray(targets)
        _checks.check_batch(features, targets)
        if (features.shape[-1], targets.shape[-1]) != self.cross.shape:
            raise ValueError(
                f"features {features.shape} and targets {targets.shape} do not fit statistics of "
                f"{self.cross.shape[0]} features and {self.cross.shape[1]} outputs: write "
                f"GramStats.zeros({features.shape[-1]}, {targets.shape[-1]})."
            )
        samples, dtype = features.shape[:-1], self.gram.dtype
        features = features.astype(dtype).reshape(-1, features.shape[-1])
        targets = targets.astype(dtype).reshape(-1, targets.shape[-1])
        weights = None
        if sample_weight is not None:
            _checks.check_weights(sample_weight, samples)
            weights = solve.expand_weights(jnp.asarray(sample_weight, dtype), samples)
            features = solve.drop_absent(features, weights)
            targets = solve.drop_absent(targets, weights)
        replicated = jax.tree.map(lambda _: jax.P(), self)
        more = solve.in_auto_mode(self._of, features, replicated)(features, targets, weights)
        return self.merge(more)

    def _of(
        self, features: jax.Array, targets: jax.Array, weights: jax.Array | None
    ) -> "GramStats":
        """The sums over these rows alone."""
        count = jnp.full((), features.shape[0], features.dtype)
        weighted, weighted_targets = features, targets
        if weights is not None:
            weighted, weighted_targets = features * weights[:, None], targets * weights[:, None]
            count = jnp.sum(weights)
        with_bias = self.feature_sum is not None
        return GramStats(
            gram=dot(features.T, weighted),
            cross=dot(weighted.T, targets),
            feature_sum=jnp.sum(weighted, axis=0) if with_bias else None,
            target_sum=jnp.sum(weighted_targets, axis=0) if with_bias else None,
            weight_sum=count,
        )

    def merge(self, other: "GramStats") -> "GramStats":
        """The statistics of both sets of samples.

        Args:
          other: statistics of the same d, o and use_bias.

        Returns:
          The sums of the sums.
        """
        return jax.tree.map(jnp.add, self, other)

    def decay(self, factor: jax.typing.ArrayLike) -> "GramStats":
        """Forget: multiply all sums, so that older samples weigh less.

        Args:
          factor: scalar in [0, 1].

        Returns:
          The scaled statistics.
        """
        return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), self)

    def psum(self, axis_name: str | tuple[str, ...]) -> "GramStats":
        """The statistics of all devices, inside ``shard_map``, ``pmap`` or ``vmap``.

        Args:
          axis_name: name of the mapped axis (or axes).

        Returns:
          The sums over that axis: one all-reduce of d^2 + d o + d + o + 1 numbers.
        """
        return jax.lax.psum(self, axis_name)

    def ridge(self, beta: jax.typing.ArrayLike, *, penalize_bias: bool = True) -> LinearHead:
        """`cfll.ridge_solve` of all samples added.

        Args:
          beta: penalty on a *sum* over samples: scalar, (d,) or (d, d).
          penalize_bias: as in `cfll.ridge_solve`.

        Returns:
          The head.
        """
        d, o = self.cross.shape
        zero = LinearHead.zeros(d, o, self.feature_sum is not None, self.gram.dtype)
        return self.solve(zero, beta, penalize_bias=penalize_bias, name="beta")[0]

    def prox(
        self, anchor: LinearHead, lam: jax.typing.ArrayLike, *, penalize_bias: bool = True
    ) -> LinearHead:
        """`cfll.prox_solve` of all samples added.

        Args:
          anchor: the head to stay near; has a bias if and only if these statistics do.
          lam: penalty on a *sum* over samples: scalar, (d,) or (d, d).
          penalize_bias: as in `cfll.prox_solve`.

        Returns:
          The head.
        """
        return self.solve(anchor, lam, penalize_bias=penalize_bias)[0]

    def solve(
        self,
        anchor: LinearHead,
        penalty: jax.typing.ArrayLike,
        *,
        penalize_bias: bool = True,
        name: str = "lam",
    ) -> tuple[LinearHead, solve.SolveInfo]:
        """`prox` with its diagnostics.

        Cholesky; where it is singular to working precision, an eigendecomposition of the scaled
        Gram matrix that leaves the anchor alone in the directions that the sums do not determine.

        Args:
          anchor: the head to stay near.
          penalty: scalar, (d,) or (d, d).
          penalize_bias: as in `cfll.prox_solve`.
          name: what the caller calls the penalty, for messages.

        Returns:
          The head and a `cfll.solve.SolveInfo` with route "primal" or "eigh".

        Raises:
          ValueError, TypeError: while tracing, for an anchor or a penalty that does not fit.
        """
        d, o = self.cross.shape
        _checks.check_anchor(anchor, d, o)
        has_bias = self.feature_sum is not None
        if (anchor.bias is not None) != has_bias:
            raise ValueError(
                "anchor and statistics disagree about a bias: write GramStats.zeros(d, o, "
                f"use_bias={anchor.bias is not None})."
            )
        dtype = widest_dtype(self.gram, anchor.kernel)
        stats, anchor = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (self, anchor))
        # How many samples there were is data here, not a shape: d + 1 switches that check off.
        _checks.check_penalty(name, penalty, d, d + 1, False)
        penalty = solve.as_penalty(penalty, dtype)
        bias_penalty = solve.bias_share(penalty, has_bias, penalize_bias)

        matrix = solve.border(
            stats.gram, stats.feature_sum, stats.weight_sum, penalty, bias_penalty
        )
        unpenalized = solve.border(
            stats.gram,
            stats.feature_sum,
            stats.weight_sum,
            jnp.zeros((), dtype),
            jnp.zeros((), dtype) if has_bias else None,
        )
        cross = solve.stack_head(LinearHead(stats.cross, stats.target_sum))
        residual = cross - dot(unpenalized, solve.stack_head(anchor))

        lower, rcond = cholesky_with_rcond(jax.lax.stop_gradient(matrix))
        singular = ~(rcond >= solve.SINGULAR * jnp.finfo(dtype).eps)

        def apply_inverse(_, rhs):
            return jax.lax.cond(
                singular, lambda: _pseudo_solve(matrix, rhs), lambda: cho_solve(lower, rhs)
            )

        correction = jax.lax.custom_linear_solve(
            partial(dot, matrix), residual, apply_inverse, symmetric=True
        )
        head = jax.tree.map(jnp.add, anchor, solve.split_head(correction, has_bias))
        route = jnp.where(singular, solve.ROUTES.index("eigh"), solve.ROUTES.index("primal"))
        return head, solve.SolveInfo(route.astype(jnp.int32), rcond.astype(jnp.float32))


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
