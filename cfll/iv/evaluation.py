"""predict, refit: the structural function, and both heads on all data."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll.heads import LinearHead
from cfll.iv.state import (
    IVBatch,
    IVState,
    Networks,
    check_covariate,
    check_rows,
    check_state,
    instrument_features,
    outcome_of,
    products,
    treatment_features,
)
from cfll.samples import Samples, check_batch
from cfll.solve import SolveInfo, penalized_solve
from cfll.solve.problem import split_head, stack_head


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
      stage2: another head than the current one, e.g. that of `refit`. Current heads are several
        times worse where learning rates have not decayed, and where networks have batch norm: heads
        fit features of the batch's statistics, which are evaluated with running ones.

    Returns:
      Outcomes (n, o).

    Raises:
      ValueError, TypeError: if covariates are missing, or the state or they do not fit.
    """
    if networks.covariate is not None:
        check_rows("this call", treatment=treatment, covariate=covariate)
    psi = treatment_features(networks, state, treatment)
    head = head_of(state, stage2)
    return head(with_covariates(networks, state, psi, covariate))


def head_of(state: IVState, stage2: Any) -> LinearHead:
    """The current head of stage 2, or another one of the same features."""
    if stage2 is None:
        return state.stage2.anchor
    d = state.stage2.anchor.kernel.shape[0]
    if not isinstance(stage2, LinearHead) or stage2.kernel.shape[0] != d:
        raise TypeError(
            f"stage2 has to be a cfll.LinearHead of {d} features: write "
            "stage2=cfll.iv.refit(...).stage2."
        )
    return stage2


class Refitted(NamedTuple):
    """Both heads on all data, and how they were solved.

    Attributes:
      stage1: W.
      stage2: w; pass it to `predict` as ``stage2``.
      stage1_info: a `cfll.SolveInfo` of W. Where ``rcond`` is below 1e-5 in float32, its weakest
        directions are beyond rounding: a larger ``beta``, or float64.
      stage2_info: the same of w, given W.
    """

    stage1: LinearHead
    stage2: LinearHead
    stage1_info: SolveInfo
    stage2_info: SolveInfo


def refit(
    networks: Networks,
    state: IVState,
    stage1_data: Iterable[IVBatch],
    stage2_data: Iterable[IVBatch],
    beta: jax.typing.ArrayLike = 0.01,
    *,
    penalize_bias: bool = True,
) -> Refitted:
    """Both heads by ridge on all data: Xu et al.'s way of evaluating.

    Of the data the triangle R of a QR factorization is kept, updated batch by batch: d + o + 1 rows
    with the same solution. Sums would square the condition number of the features.

    Args:
      networks: the backbones.
      state: what was trained; networks are evaluated, ``train=False``.
      stage1_data: batches of instrument and treatment, of any sizes; read once.
      stage2_data: batches of instrument and outcome (and covariate); read once.
      beta: scalar, the penalty on a *sum* over samples, of both heads.
      penalize_bias: as in `cfll.ridge_solve`.

    Returns:
      W, w and their diagnostics.

    Raises:
      ValueError, TypeError: if data are missing from a batch or do not fit, or there are none.
    """
    if jnp.ndim(beta) != 0:
        raise ValueError(f"beta has shape {jnp.shape(beta)}: write a scalar, for both heads.")
    check_state(state)
    rows = _no_rows(state.stage1.anchor)
    for batch in _batches("stage1_data", stage1_data):
        check_rows("a batch of stage1_data", **batch._asdict())
        phi = instrument_features(networks, state, batch.instrument)
        psi = treatment_features(networks, state, batch.treatment)
        rows = _append(rows, state.stage1.anchor, phi, psi)
    stage1, stage1_info = _ridge(rows, state.stage1.anchor, beta, penalize_bias)
    rows = _no_rows(state.stage2.anchor)
    for batch in _batches("stage2_data", stage2_data):
        check_rows("a batch of stage2_data", **batch._asdict())
        psi = stage1(instrument_features(networks, state, batch.instrument))
        features = with_covariates(networks, state, psi, batch.covariate)
        rows = _append(rows, state.stage2.anchor, features, outcome_of(batch))
    stage2, stage2_info = _ridge(rows, state.stage2.anchor, beta, penalize_bias)
    return Refitted(stage1, stage2, stage1_info, stage2_info)


def _batches(name: str, data: Iterable[IVBatch]) -> Iterator[IVBatch]:
    """The batches; there must be one: without any the head would be zeros, and look sound."""
    if isinstance(data, IVBatch):
        raise TypeError(f"{name} is a batch: write [batch].")
    empty = True
    for batch in data:
        if not isinstance(batch, IVBatch):
            raise TypeError(f"{name} has a {type(batch).__name__}: write cfll.iv.IVBatch(...).")
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{name} has no batches; a generator is read once: write list(...) of it.")


def _no_rows(head: LinearHead) -> Samples:
    """No data for such a head: as many rows of zeros as `_append` keeps, with a ones column."""
    m, o = stack_head(head).shape
    zeros = jnp.zeros((m + o, m + o), head.kernel.dtype)
    return Samples(zeros[:, :m], zeros[:, m:], None)


def _append(rows: Samples, like: LinearHead, features: jax.Array, targets: jax.Array) -> Samples:
    """As many rows as before, with the same sums as these and the new ones: R of a QR."""
    m, dtype = rows.features.shape[1], rows.features.dtype
    features, targets = check_batch(features, targets, None)
    if (features.shape[1], targets.shape[1]) != like.kernel.shape:
        raise ValueError(
            f"features of shape {features.shape} and targets of shape {targets.shape} do not fit "
            f"the state's head, which has a kernel of shape {like.kernel.shape}."
        )
    ones = jnp.ones((len(features), m - features.shape[1]), dtype)
    new = jnp.concatenate([features.astype(dtype), ones, targets.astype(dtype)], axis=1)
    old = jnp.concatenate(rows[:2], axis=1)
    r = jnp.linalg.qr(jnp.concatenate([old, new]), mode="r")
    return Samples(r[:, :m], r[:, m:], None)


def _ridge(
    rows: Samples, like: LinearHead, beta: jax.typing.ArrayLike, penalize_bias: bool
) -> tuple[LinearHead, SolveInfo]:
    """The ridge head of such rows, whose last feature is the bias."""
    has_bias = like.bias is not None
    penalty = jnp.full(rows.features.shape[1], beta, rows.features.dtype)
    if has_bias and not penalize_bias:
        penalty = penalty.at[-1].set(0)
    options: Any = {"use_bias": False, "name": "beta"}
    stacked, info = penalized_solve(rows.features, rows.targets, None, penalty, **options)
    return split_head(stacked.kernel, has_bias), info


def with_covariates(
    networks: Networks, state: IVState, treatment_features: jax.Array, covariate: Any
) -> jax.Array:
    """What the head of stage 2 sees, all networks evaluated."""
    check_covariate(networks, covariate)
    if networks.covariate is None:
        return treatment_features
    if covariate is None:
        raise ValueError("there is a covariate network, but no covariate: write covariate=c.")
    xi, _ = networks.covariate.apply(
        state.treatment.params[1], state.treatment.stats[1], covariate, train=False
    )
    return products(treatment_features, xi)
