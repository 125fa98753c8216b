r"""networks, batch, predict: a confounder seen in proxies only (DFPV), by the stages of `cfll.iv`.

A hidden u moves the treatment a and the outcome y. Two proxies of it are seen: z, which tells
nothing more about y once a and u are known, and w, which a and z do not move. A bridge h with

.. math::
    E[y | a, z] = E[h(a, w) | a, z] \quad\text{has}\quad E[y | do(a)] = f(a) = E_w[h(a, w)].

The first equation *is* an instrumental-variable problem, of treatment w, instrument (a, z) and
observed covariate a. So `networks` and `batch` only put the parts into their places there, and
`cfll.iv.proximal`, `original` and `refit` do the rest, with products as features in both stages:

``stage 1``
    :math:`W^\top (\phi_1(a), 1) \otimes (\zeta(z), 1) \approx E[\omega(w) | a, z]`, which trains
    the networks :math:`\phi_1, \zeta`, by the ``instrument_optimizer``.
``stage 2``
    :math:`v^\top (\text{that}, 1) \otimes (\phi_2(a), 1) \approx E[y | a, z]`, which trains the
    networks :math:`\omega, \phi_2`, by the ``treatment_optimizer``.

What is new is `predict`: the bridge is linear in :math:`\omega(w)`, so its mean over w takes the
mean of those features. The bridge itself is ``cfll.iv.predict(networks, state, w, a)``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.iv.evaluation import head_of, with_covariates
from cfll.iv.state import (
    IVBatch,
    IVState,
    Networks,
    check_feature_rows,
    products,
    treatment_features,
)
from cfll.networks import Backbone


def networks(
    *,
    treatment1: Backbone,
    treatment_proxy: Backbone,
    outcome_proxy: Backbone,
    treatment2: Backbone,
) -> Networks:
    r"""Four backbones as those of an instrumental-variable problem.

    Args:
      treatment1: :math:`\phi_1`, features of the treatment a in stage 1.
      treatment_proxy: :math:`\zeta`, features of z.
      outcome_proxy: :math:`\omega`, features of w.
      treatment2: :math:`\phi_2`, features of a in stage 2.

    Returns:
      Networks for `cfll.iv.proximal` and `cfll.iv.original`.

    Examples:
      >>> import optax
      >>> from cfll import iv
      >>> net = Backbone(lambda w, stats, x, *, train: (jnp.tanh(x @ w), stats), jnp.ones((1, 4)))
      >>> nets = networks(
      ...     treatment1=net, treatment_proxy=net, outcome_proxy=net, treatment2=net)
      >>> u, z, w, a = jax.random.normal(jax.random.key(0), (4, 64, 1))
      >>> z, w, a = z + u, w + u, a + u
      >>> data = batch(treatment=a, treatment_proxy=z, outcome_proxy=w, outcome=a + 2 * u)
      >>> method = iv.proximal(
      ...     nets, treatment_optimizer=optax.sgd(0.01), instrument_optimizer=optax.sgd(0.01),
      ...     lam1=1.0, lam2=1.0)
      >>> state, losses = jax.jit(method.round)(method.init(data), data, data)
      >>> refitted = iv.refit(nets, state, [data], [data])
      >>> predict(nets, state, a, w, stage2=refitted.stage2).shape
      (64, 1)

    References:
      Xu, Kanagawa, Gretton: Deep Proxy Causal Learning and its Application to Confounded Bandit
      Policy Evaluation, NeurIPS 2021, arXiv:2106.03907.
    """
    pair = _pair(treatment1, treatment_proxy, ("treatment1", "treatment_proxy"))
    return Networks(treatment=outcome_proxy, instrument=pair, covariate=treatment2)


def batch(
    *, treatment: Any, treatment_proxy: Any, outcome_proxy: Any, outcome: Any = None
) -> IVBatch:
    """Samples for the functions of `cfll.iv`, all with the same leading axis.

    Args:
      treatment: a, (n, ...).
      treatment_proxy: z, (n, ...).
      outcome_proxy: w, (n, ...); ``None`` where only stage 2 will see the batch.
      outcome: y, (n, o), floats; not needed in stage 1.

    Returns:
      An `cfll.iv.IVBatch`.

    Examples:
      >>> a, z, w = jnp.zeros((3, 8, 1))
      >>> batch(treatment=a, treatment_proxy=z, outcome_proxy=w).instrument[1].shape
      (8, 1)
    """
    return IVBatch((treatment, treatment_proxy), outcome_proxy, outcome, treatment)


def predict(
    networks: Networks,
    state: IVState,
    treatment: Any,
    outcome_proxy: Any,
    *,
    stage2: LinearHead | None = None,
) -> jax.Array:
    r"""The structural function: the mean over w of the bridge, at every treatment.

    .. math:: f(a) = v^\top (\textstyle\frac1m \sum_j \omega(w_j), 1) \otimes (\phi_2(a), 1)

    Args:
      networks: made by `networks`.
      state: what was trained; networks are evaluated, ``train=False``.
      treatment: a, (n, ...).
      outcome_proxy: w of the population, (m, ...), seldom of the same samples. If they are too
        many for one pass: f of all is the mean of the f of equal parts.
      stage2: another head than the current one, e.g. that of `cfll.iv.refit`.

    Returns:
      Mean outcomes (n, o).

    Raises:
      ValueError, TypeError: if the state or the samples do not fit.

    Examples:
      See `networks`.
    """
    if networks.covariate is None:
        raise ValueError("there is no treatment2: make the networks with cfll.iv.proxy.networks.")
    mean = jnp.mean(treatment_features(networks, state, outcome_proxy), axis=0, keepdims=True)
    head = head_of(state, stage2)
    return head(with_covariates(networks, state, mean, treatment))


def _pair(first: Backbone, second: Backbone, names: tuple[str, str]) -> Backbone:
    """A backbone of pairs of inputs, with all products of the two features and 1."""

    def apply(params: Any, stats: Any, inputs: Any, *, train: bool) -> tuple[jax.Array, Any]:
        left, stats1 = first.apply(params[0], stats[0], inputs[0], train=train)
        right, stats2 = second.apply(params[1], stats[1], inputs[1], train=train)
        for features, name in zip((left, right), names, strict=True):
            check_feature_rows(features, name)
        return products(left, right), (stats1, stats2)

    return Backbone(apply, (first.params, second.params), (first.stats, second.stats))
