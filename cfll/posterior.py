r"""Posterior: a head that knows its error. bayesian_ridge: the most likely one, from sums.

For each output, with noise of variance :math:`\sigma^2` and a prior in units of it,

.. math::
    y = w^\top \phi + b + \varepsilon, \qquad \varepsilon \sim N(0, \sigma^2), \qquad
    w \sim N(0, \sigma^2 \beta^{-1} I), \qquad b \text{ flat},

the mean of w is the ridge kernel of beta with a free bias, and its covariance is :math:`\sigma^2
(G + \beta I)^{-1}`, G the centered Gram matrix. Outputs are independent: no (o d x o d) matrix, and
all share G's eigenvectors. With its eigenvalues :math:`s_j`, the squares :math:`e_j` of the targets
that direction j explains, and r that none does,

.. math::
    m(\beta) = \min_w \|y - \Phi w\|^2 + \beta \|w\|^2 = r + \sum_j e_j \frac{\beta}{s_j + \beta},
    \qquad \sigma^2 = \frac{m}{\nu}, \qquad
    -2 \log p = \nu \log m + \sum_j \log(1 + s_j / \beta) + \mathrm{const}

for :math:`\nu` samples, one less with a bias. The slope of the last by log beta is zero at MacKay's
fixed point, :math:`\beta \|w\|^2 / \sigma^2 = \sum_j s_j / (s_j + \beta)`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead, check_anchor, widest_dtype
from cfll.samples import check_batch
from cfll.solve.cholesky import dot
from cfll.solve.problem import add
from cfll.stats import GramStats, center, share_rounded

# Beta is sought where a slope changes its sign, on grids of so many cells, one inside the other.
_CELLS, _GRIDS = 32, 13


class Posterior(NamedTuple):
    """A Gaussian belief about a head: of `bayesian_ridge`, or of `cfll.kalman` at any step.

    Attributes:
      head: the mean.
      directions: (m, r), kernel over bias: combinations of the weights of which nothing is known
        together (m = d + 1; d without a bias). The same for all outputs.
      variances: (r, o), of the weights along them, for each output.
      noise_variance: (o,), of a sample of weight one, in units of the targets squared.

    Examples:
      >>> import jax.numpy as jnp
      >>> head = LinearHead.zeros(2, 1, use_bias=False)
      >>> belief = Posterior(head, jnp.eye(2), jnp.ones((2, 1)), jnp.ones(1))
      >>> mean, variance = belief.predict(jnp.array([[0.0, 3.0]]))
      >>> print(mean[0, 0], variance[0, 0])
      0.0 10.0
    """

    head: LinearHead
    directions: jax.Array
    variances: jax.Array
    noise_variance: jax.Array

    def covariance(self, output: int) -> jax.Array:
        """Of the weights of one output, kernel over bias, (m, m)."""
        return dot(self.directions * self.variances[None, :, output], self.directions.T)

    def head_variance(self, features: jax.Array) -> jax.Array:
        """The variance (..., o) of the head's outputs for features (..., d)."""
        d, given = len(self.head.kernel), jnp.shape(features)
        if given[-1:] != (d,):
            raise ValueError(f"features has shape {given}, but the head has {d}: write (..., {d}).")
        # A sum of squares, so that no rounding makes it negative.
        kernel = self.directions[: features.shape[-1]]
        bias = None if self.head.bias is None else self.directions[-1]
        along = LinearHead(kernel, bias)(features)
        return dot(jnp.square(along), jnp.asarray(self.variances, along.dtype))

    def predict(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of new targets, both (..., o), for features (..., d).

        The variance is that of a target: `head_variance` and noise.
        """
        variance = self.head_variance(features)
        noise = jnp.asarray(self.noise_variance, variance.dtype)
        return self.head(features), variance + noise.reshape((1,) * (variance.ndim - 1) + (-1,))

    def rescaled(self, features: jax.Array, targets: jax.Array) -> "Posterior":
        """The same, with all variances of an output times one factor: right on rows held out.

        A backbone that fits noise leaves residuals on its training rows that are too small. The
        factor is the mean of (target - mean)^2 / variance over features (..., d), targets (..., o).
        """
        features, targets = check_batch(features, targets, None)
        mean, variance = self.predict(features)
        if targets.shape != mean.shape:
            raise ValueError(
                f"targets has shape {targets.shape}, but the head has {mean.shape[-1]} outputs: "
                f"write targets of shape {mean.shape}."
            )
        factor = jnp.square(jnp.asarray(targets, mean.dtype) - mean) / variance
        factor = jnp.mean(factor.reshape(-1, factor.shape[-1]), axis=0)
        noise = self.noise_variance * factor
        return self._replace(variances=self.variances * factor[None], noise_variance=noise)


class EvidenceInfo(NamedTuple):
    """What `bayesian_ridge` found.

    Attributes:
      beta: (o,), the most likely penalties. At an end of their range, eps^2 or 1 / eps times the
        largest eigenvalue of the Gram matrix, there is no noise, or nothing that features explain.
      num_effective: (o,), how many directions of the features the data determine, of d.
      rcond: (o,), smallest over largest eigenvalue of the penalized Gram matrix. Below 1e-6 float32
        sums have lost directions that count: sum in float64.
      noise_rcond: (o,), the squares that no head explains, by the size of what was subtracted to
        find them. The noise variance errs by about 1e-7 / noise_rcond in float32: below 1e-5 it is
        unknown. Then sum residuals, see ``anchor``.
    """

    beta: jax.Array
    num_effective: jax.Array
    rcond: jax.Array
    noise_rcond: jax.Array


def bayesian_ridge(
    stats: GramStats, anchor: LinearHead | None = None
) -> tuple[Posterior, EvidenceInfo]:
    r"""The Bayesian last layer of all samples added, its prior and noise by maximal evidence.

    For a backbone after training. Each output is ``stats.ridge(beta, penalize_bias=False)`` at its
    most likely beta, and what is uncertain about it. Where noise is small, float32 cannot find it
    as a difference of large sums: add what a head leaves of the targets, and say which head. The
    result is the same, with its digits:

    >>> import jax, jax.numpy as jnp
    >>> x, noise = jax.random.normal(jax.random.key(0), (2, 100, 3))
    >>> y = x @ jnp.ones((3, 1)) + 1e-3 * noise[:, :1]
    >>> head = GramStats.zeros(3, 1).add(x, y).ridge(1e-3)
    >>> residuals = GramStats.zeros(3, 1).add(x, y - head(x))
    >>> posterior, info = bayesian_ridge(residuals, anchor=head)
    >>> mean, variance = posterior.predict(x)
    >>> bool(jnp.all(jnp.abs(y - mean) < 4 * jnp.sqrt(variance)))
    True

    Args:
      stats: the sums, of one pass over the data. Weights count samples (a sample of weight two is
        there twice): their sum is taken for the number of samples, d + 2 of them at the least.
      anchor: the head whose residuals, ``targets - anchor(features)``, the sums have for targets.

    Returns:
      The `Posterior` and an `EvidenceInfo`; NaN or infinite where sums are not finite or without
      samples.

    Raises:
      ValueError, TypeError: while tracing, for an anchor that does not fit.

    References:
      MacKay: Bayesian interpolation, Neural Computation 4, 1992.
    """
    d, o = stats.cross.shape
    if anchor is None:
        anchor = LinearHead.zeros(d, o, stats.feature_sum is not None, stats.gram.dtype)
    anchor = check_anchor(anchor, d, o)
    if (anchor.bias is None) != (stats.feature_sum is None):
        raise ValueError(
            "anchor and statistics disagree about a bias: write GramStats.zeros(d, o, "
            f"use_bias={anchor.bias is not None})."
        )
    return _bayesian_ridge(stats, anchor)


@partial(jax.jit, inline=True)
def _bayesian_ridge(stats: GramStats, anchor: LinearHead) -> tuple[Posterior, EvidenceInfo]:
    dtype = widest_dtype(stats.gram, anchor.kernel)
    stats, anchor = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (stats, anchor))
    d, count = len(stats.gram), stats.weight_sum
    gram, cross, squares = stats.gram, stats.cross, stats.target_squares
    if anchor.bias is not None:
        means, _, around, squares = center(stats, count)
        gram, cross, count = around[:, :d], around[:, d:], count - 1
    values, vectors = jnp.linalg.eigh(gram)
    values, info = values[:, None], jnp.finfo(dtype)
    rcond = jnp.maximum(values[0], 0) / values[-1]
    unseen = values <= info.eps * values[-1:]  # rounding
    values = jnp.where(unseen, 0, values)
    divisors = jnp.where(unseen, 1, values)

    # Directions without any data, which rounding does not tell from weak ones: features that are
    # constant, and as many as the samples are too few. The anchor, which was found in more digits
    # than these sums have, stays in weak ones; in empty ones the mean of the prior, zero, does.
    constant = jnp.diagonal(gram) <= info.eps**1.5 * jnp.diagonal(stats.gram)
    empty = jnp.where(constant[:, None], anchor.kernel, 0)
    null = unseen & (jnp.arange(d, dtype=dtype)[:, None] < d - count)
    weights = dot(vectors.T, anchor.kernel - empty)
    products = jnp.where(unseen, 0, dot(vectors.T, cross))
    explained = jnp.square(values * weights + products) / divisors
    # What least squares leaves. The difference has the rounding of the sums it is made of.
    correction = products / divisors
    left = squares - jnp.sum(products * correction, axis=0)
    share = share_rounded(stats)
    sizes = jnp.diagonal(gram + share * stats.gram)
    rounded = dot(sizes, jnp.square(dot(vectors, correction)))
    rounded = jnp.maximum(rounded + squares + share * stats.target_squares, info.tiny)
    noise_rcond, left = left / rounded, jnp.maximum(left, info.eps * rounded)
    one = partial(_most_likely_beta, values[:, 0], count)
    beta = jax.lax.map(one, (explained.T, left))[None]

    # The correction of the anchor, which keeps the digits of both.
    correction = jnp.where(unseen & ~null, 0, (products - beta * weights) / (values + beta))
    kernel, bias = dot(vectors, correction) - empty, None
    kept = beta / (values + beta)  # of a direction, what the penalty keeps from the head
    noise = (left + jnp.sum(kept * explained, axis=0)) / count
    variances = noise[None] / (values + beta)
    if anchor.bias is not None:
        mean = means[:, :d]
        bias = (means[:, d:] - dot(mean, kernel))[0]
        corner, zeros = jnp.ones((1, 1), dtype), jnp.zeros((d, 1), dtype)
        vectors = jnp.block([[vectors, zeros], [-dot(mean, vectors), corner]])
        variances = jnp.concatenate([variances, noise[None] / stats.weight_sum])
    head = add(anchor, LinearHead(kernel, bias))
    rcond = rcond + beta[0] / jnp.max(values)
    found = EvidenceInfo(beta[0], jnp.sum(1 - kept, axis=0), rcond, noise_rcond)
    return Posterior(head, vectors, variances, noise), found


def _most_likely_beta(
    values: jax.Array, count: jax.Array, output: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The beta of the largest evidence among those where its slope turns negative."""
    (explained, left), eps = output, jnp.finfo(values.dtype).eps
    largest = jnp.log(jnp.where(values[-1] == 0, 1, values[-1]))

    def in_one_cell(_: jax.Array, ends: jax.Array) -> jax.Array:
        grid = ends[0] + (ends[1] - ends[0]) * jnp.arange(_CELLS + 1, dtype=ends.dtype) / _CELLS
        beta = jnp.exp(grid)[:, None]
        kept, determined = beta / (values[None] + beta), values[None] / (values[None] + beta)
        squares = left + dot(kept, explained)
        evidence = jnp.sum(jnp.log(kept), axis=1) - count * jnp.log(squares)
        shares = dot(kept * determined, explained) / squares
        slope = jnp.sum(determined, axis=1) - count * shares
        rises = jnp.append(True, slope[1:-1] > 0)  # an end may be the best, too
        falls = jnp.append(slope[1:-1] <= 0, True)
        peaks = jnp.where(rises & falls, jnp.maximum(evidence[:-1], evidence[1:]), -jnp.inf)
        return jax.lax.dynamic_slice(grid, (jnp.argmax(peaks),), (2,))

    ends = largest + jnp.array([2, -1], values.dtype) * jnp.log(eps)
    return jnp.exp(jax.lax.fori_loop(0, _GRIDS, in_one_cell, ends)[0])
