"""predict, refit: the structural function, and both heads on all data."""

from collections.abc import Iterable
from typing import Any

import jax

from cfll.heads import LinearHead
from cfll.iv.state import (
    IVBatch,
    IVState,
    Networks,
    instrument_features,
    outcome_of,
    products,
    treatment_features,
)
from cfll.stats import GramStats


def predict(
    networks: Networks,
    state: IVState,
    treatment: Any,
    covariate: Any = None,
    *,
    stage2: LinearHead | None = None,
) -> jax.Array:
    r"""The structural function :math:`f(x) = w^\top \psi(x)`, or :math:`f(x, c)`.

    Args:
      networks: the backbones.
      state: what was trained; networks are evaluated, ``train=False``.
      treatment: x, (n, ...).
      covariate: c, (n, ...), if there is a covariate network.
      stage2: another head than the current one, e.g. that of `refit`.

    Returns:
      Outcomes (n, o).

    Raises:
      ValueError: if covariates are missing.
    """
    psi = treatment_features(networks, state, treatment)
    head = state.stage2.anchor if stage2 is None else stage2
    return head(_with_covariates(networks, state, psi, covariate))


def refit(
    networks: Networks,
    state: IVState,
    stage1_data: Iterable[IVBatch],
    stage2_data: Iterable[IVBatch],
    beta: jax.typing.ArrayLike = 0.01,
    *,
    penalize_bias: bool = True,
) -> tuple[LinearHead, LinearHead]:
    """Both heads by ridge on all data, through `cfll.GramStats`: Xu et al.'s way of evaluating.

    Args:
      networks: the backbones.
      state: what was trained; networks are evaluated, ``train=False``.
      stage1_data: batches of instrument and treatment, of any sizes; read once.
      stage2_data: batches of instrument and outcome (and covariate); read once.
      beta: penalty on a *sum* over samples, of both heads.
      penalize_bias: as in `cfll.ridge_solve`.

    Returns:
      W and w; pass w to `predict` as ``stage2``.

    Raises:
      ValueError: if there are no batches, or data are missing from one.
    """
    sums1, sums2 = _no_sums(state.stage1.anchor), _no_sums(state.stage2.anchor)
    for batch in stage1_data:
        phi = instrument_features(networks, state, batch.instrument)
        sums1 = sums1.add(phi, treatment_features(networks, state, batch.treatment))
    stage1 = sums1.ridge(beta, penalize_bias=penalize_bias)
    for batch in stage2_data:
        psi = stage1(instrument_features(networks, state, batch.instrument))
        features = _with_covariates(networks, state, psi, batch.covariate)
        sums2 = sums2.add(features, outcome_of(batch))
    return stage1, sums2.ridge(beta, penalize_bias=penalize_bias)


def _no_sums(head: LinearHead) -> GramStats:
    d, o = head.kernel.shape
    return GramStats.zeros(d, o, head.bias is not None, head.kernel.dtype)


def _with_covariates(
    networks: Networks, state: IVState, treatment_features: jax.Array, covariate: Any
) -> jax.Array:
    """What the head of stage 2 sees, all networks evaluated."""
    if networks.covariate is None:
        return treatment_features
    if covariate is None:
        raise ValueError("there is a covariate network, but no covariate: write covariate=c.")
    xi, _ = networks.covariate.apply(
        state.treatment.params[1], state.treatment.stats[1], covariate, train=False
    )
    return products(treatment_features, xi)
