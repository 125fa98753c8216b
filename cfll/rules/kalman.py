r"""kalman: the head of all batches so far, and how sure it is, by a Kalman filter.

The weights, kernel over bias, are believed to have the covariance :math:`\sigma_k^2 R R^\top` for
output k. In units of the root R a batch with weights S is least squares with a penalty of one,

.. math::
    F = S^{1/2} (\Phi, 1) R, \qquad
    z = \arg\min_z \|S^{1/2} (Y - \hat Y) - F z\|^2 + \|z\|^2, \qquad
    R R^\top \leftarrow R (I + F^\top F)^{-1} R^\top,

and :math:`R z` is added to the weights. Only the root is kept: what it stands for is symmetric and
positive after any number of steps in any precision. The new root, with fewer samples than weights
(Andrews 1968) and with more, is

.. math::
    R - R F^\top L^{-\top} (L + I)^{-1} F, \quad L L^\top = I + F F^\top, \qquad
    R T^{-1}, \quad T^\top T = I + F^\top F.

Where I would lose its digits in the sum, T comes from a QR of both. The noise variance of largest
evidence is the sum of the minima, divided by the number of samples.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.heads import LinearHead, as_plain, widest_dtype
from cfll.posterior import Posterior
from cfll.rules.rule import Rule, Solution
from cfll.solve import SolveInfo, penalized_solve
from cfll.solve.cholesky import cholesky, dot, lower_gram
from cfll.solve.problem import add, check_value, split_head

_solve_triangular = jax.lax.linalg.triangular_solve


class KalmanState(NamedTuple):
    r"""The state of `cfll.kalman`.

    Attributes:
      covariance_root: (m, m), R; the covariance of kernel over bias (m = d + 1; d without a bias)
        is :math:`R R^\top` in units of the noise variance.
      noise_variance: (o,), the most likely; zero before the first update.
      weight_sum: (), how many samples it is the mean of.
    """

    covariance_root: jax.Array
    noise_variance: jax.Array
    weight_sum: jax.Array

    def posterior(self, anchor: LinearHead) -> Posterior:
        """What is believed of this head: ``state.rule_state.posterior(state.anchor)``."""
        shape = (len(self.covariance_root), len(self.noise_variance))
        variances = jnp.broadcast_to(self.noise_variance[None], shape)
        return Posterior(anchor, self.covariance_root, variances, self.noise_variance)


def kalman(
    beta: jax.typing.ArrayLike,
    *,
    process_noise: jax.typing.ArrayLike = 0.0,
    forgetting: jax.typing.ArrayLike = 1.0,
) -> Rule:
    r"""A Kalman filter on the head: all batches count, and predictions know their error.

    .. math::
        \Sigma^{-1} \leftarrow f (\Sigma + q I)^{-1} + (1 - f) \beta I, \qquad
        W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2
        + \mathrm{tr} \, (W - W_t)^\top \Sigma^{-1} (W - W_t), \qquad
        \Sigma^{-1} \leftarrow \Sigma^{-1} + \sum_i \phi_i \phi_i^\top

    For frozen and slowly moving backbones: without q and f the head, from zeros, is the ridge head
    of all samples seen, each counted once. While a backbone trains fast this is *worse* than
    `cfll.prox`, several times where noise is small: it trusts what the features of long ago have
    said. (Only where noise is what limits a network may it be ahead, too.) `cfll.prox` is this rule
    with the covariance forgotten at every step, :math:`\Sigma = I / \lambda` (Appendix A).
    The state has m^2 numbers, m = d + 1; an update takes O(m^2 n) with n < m samples, and O(m^3)
    more with q or f. There is no ``axis_name``: on several devices shard the batch and jit;
    inside ``pmap`` and ``shard_map`` the rule is refused.

    Args:
      beta: the penalty of the first head, in units of features squared times samples: variances of
        1 / beta for each weight, the bias among them, in units of the noise variance.
      process_noise: q, the variance by which each weight moves between updates, in the same units.
      forgetting: f, in (0, 1]: the share of what is known that an update keeps. What is not seen
        again returns to the variance 1 / beta and no further, its mean stays.

    Returns:
      A `cfll.Rule`; its state is a `KalmanState`, whose ``posterior`` predicts mean and variance.

    Raises:
      ValueError: for concrete values out of range, and for weights per output.

    Examples:
      >>> from cfll.rules.rule import initial_state
      >>> rule, x = kalman(beta=1e-3), jnp.array([[1.0], [2.0], [3.0]])
      >>> state = initial_state(rule, LinearHead.zeros(1, 1))
      >>> loss, solution = rule.loss(x, 2 * x + 1, state)
      >>> print(solution.rule_state.posterior(solution.head).predict(x)[0].round(1).ravel())
      [3. 5. 7.]

    References:
      Closed-Form Last Layer Optimization, Appendix A. Andrews: A square root formulation of the
      Kalman covariance equations, AIAA Journal 6, 1968.
    """
    beta, process_noise, forgetting = map(as_plain, (beta, process_noise, forgetting))
    for name, value, low, high in (
        ("beta", beta, 1e-30, jnp.inf),
        ("process_noise", process_noise, 0, jnp.inf),
        ("forgetting", forgetting, 1e-30, 1),
    ):
        check_value(name, value)
        known = samples.concrete(value)
        if known is not None and not (known.shape == () and low <= known <= high):
            raise ValueError(
                f"{name} is {value}; write numbers with beta > 0, process_noise >= 0 and "
                "0 < forgetting <= 1, e.g. beta=1.0, forgetting=0.99."
            )

    def init(anchor):
        d, o = anchor.kernel.shape
        dtype = anchor.kernel.dtype
        root = jnp.eye(d + (anchor.bias is not None), dtype=dtype)
        root = root / jnp.sqrt(jnp.asarray(beta, dtype))
        return KalmanState(root, jnp.zeros((o,), dtype), jnp.zeros((), dtype))

    def solve(features, targets, state, *, sample_weight=None):
        features, targets = samples.check_batch(features, targets, sample_weight)
        drift = None if samples.concrete(process_noise) == 0 else process_noise
        memory = None if samples.concrete(forgetting) == 1 else (forgetting, beta)
        return _update(drift, memory, features, targets, sample_weight, state[1:3])

    return Rule(init, solve)


@partial(jax.jit, inline=True)
def _update(
    process_noise: Any, memory: Any, features: Any, targets: Any, sample_weight: Any, belief: Any
) -> Solution:
    dtype = widest_dtype(features, targets, belief[0].kernel)
    rows = samples.flatten(features, targets, sample_weight, dtype)
    process_noise, memory, belief = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (process_noise, memory, belief)
    )
    run = partial(_filter, process_noise, memory)
    replicated = jax.tree.map(lambda _: jax.P(), (*belief, SolveInfo(0, 0)))
    return Solution(*samples.let_xla_shard(run, rows.features, replicated)(rows, *belief))


def _filter(
    process_noise: Any, memory: Any, rows: samples.Samples, anchor: LinearHead, old: KalmanState
) -> tuple[LinearHead, KalmanState, SolveInfo]:
    """Predict, then correct."""
    root, seen, has_bias = old.covariance_root, old.weight_sum, anchor.bias is not None
    if process_noise is not None:
        unit = jnp.sqrt(jnp.maximum(process_noise, jnp.finfo(root.dtype).tiny))  # zero if traced
        root = unit * _triangle(root.T / unit).T
    if memory is not None:
        forgetting, beta = memory
        root = _condition(root, jnp.sqrt(beta * (1 / forgetting - 1)) * root)
        root, seen = root / jnp.sqrt(forgetting), seen * forgetting

    features = jnp.pad(rows.features, ((0, 0), (0, int(has_bias))), constant_values=1)
    in_units, residual = dot(features, root), rows.targets - anchor(rows.features)
    weights: Any = {"use_bias": False, "sample_weight": rows.weights}
    step, info = penalized_solve(in_units, residual, None, jnp.ones_like(seen), **weights)
    left = rows.weigh(jnp.square(residual - dot(in_units, step.kernel)))
    smallest = jnp.sum(left, axis=0) + jnp.sum(jnp.square(step.kernel), axis=0)
    weighted = in_units if rows.weights is None else in_units * jnp.sqrt(rows.weights)[:, None]
    count = seen + rows.total()
    noise = (seen * old.noise_variance + smallest) / jnp.where(count == 0, 1, count)

    # Squares overflow before heads do. A head that is NaN is rejected, and the state with it.
    change = jnp.where(jnp.isfinite(noise), dot(root, step.kernel), jnp.nan)
    head = add(anchor, split_head(change, has_bias))
    return head, KalmanState(_condition(root, weighted), noise, count), info


def _condition(root: jax.Array, rows: jax.Array) -> jax.Array:
    """A root of R (I + F^T F)^{-1} R^T, for R (m, m) and F (n, m)."""
    (n, m), dtype = rows.shape, root.dtype
    if n >= m:
        return _solve_triangular(_triangle(rows), root)

    def by_qr() -> jax.Array:
        return _solve_triangular(_qr(rows), root)

    def by_cholesky() -> jax.Array:
        one = jnp.eye(n, dtype=dtype)
        lower = cholesky(dot(rows, rows.T) + one)
        along = dot(rows, root.T)
        left = _solve_triangular(lower, along, left_side=True, lower=True)
        right = _solve_triangular(lower + one, rows, left_side=True, lower=True)
        return root - dot(left.T, right)

    return jax.lax.cond(_is_small(rows), by_cholesky, by_qr)


def _triangle(rows: jax.Array) -> jax.Array:
    """Upper T with T^T T = I + F^T F, for F (n, m)."""
    one = jnp.eye(rows.shape[1], dtype=rows.dtype)
    return jax.lax.cond(
        _is_small(rows), lambda: cholesky(lower_gram(rows, rows) + one).T, lambda: _qr(rows)
    )


def _qr(rows: jax.Array) -> jax.Array:
    one = jnp.eye(rows.shape[1], dtype=rows.dtype)
    return jnp.linalg.qr(jnp.concatenate([one, rows]), mode="r")


def _is_small(rows: jax.Array) -> jax.Array:
    """Whether the sum I + F^T F keeps half of the digits of I; the first batches may need a QR."""
    return jnp.sum(jnp.square(rows)) < jnp.finfo(rows.dtype).eps ** -0.5
