"""Networks, IVBatch, IVState, IVMethod: what two-stage methods are made of, and checks of it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll.networks import Backbone
from cfll.rules import ClosedFormState


class Networks(NamedTuple):
    r"""The backbones of the two stages.

    Attributes:
      treatment: :math:`\psi`, features of the treatment x.
      instrument: :math:`\phi`, features of the instrument z.
      covariate: :math:`\xi`, features of the observed covariates c, or ``None``.
    """

    treatment: Backbone
    instrument: Backbone
    covariate: Backbone | None = None


class IVBatch(NamedTuple):
    """Samples, all with the same leading axis. Stage 1 needs no outcome, stage 2 no treatment.

    Attributes:
      instrument: z, (n, ...).
      treatment: x, (n, ...), or ``None``.
      outcome: y, (n, o), floats, or ``None``.
      covariate: c, (n, ...), or ``None``. If the instrument is only valid given c, c is part of
        the instrument, too.
    """

    instrument: Any
    treatment: Any = None
    outcome: Any = None
    covariate: Any = None


class NetState(NamedTuple):
    """One network during training.

    Attributes:
      params: its parameters.
      stats: its running statistics, or ``None``.
      opt_state: the state of its optimizer.
    """

    params: Any
    stats: Any
    opt_state: Any


class IVState(NamedTuple):
    """All that training changes; one pytree, so it checkpoints.

    Attributes:
      treatment: of the treatment network (with covariates, of the pair of both networks).
      instrument: of the instrument network.
      stage1: a `cfll.ClosedFormState`: W is ``stage1.anchor``, from instrument features to
        treatment features; ``stage1.info`` says how it was solved last and how often it was not
        finite and therefore not used. A batch with NaN moves the networks all the same: protect
        them with ``optax.apply_if_finite``.
      stage2: the same of w, from treatment features (with covariates: products) to outcomes.
    """

    treatment: NetState
    instrument: NetState
    stage1: ClosedFormState
    stage2: ClosedFormState


class IVMethod(NamedTuple):
    """A method as pure functions over an `IVState`. Losses are means over samples.

    Attributes:
      init: ``init(batch) -> state``; the batch (all four fields that are used) sets the shapes.
      stage1: ``stage1(state, batch1) -> (state, loss)``, one update of instrument network and W.
      stage2: ``stage2(state, batch1, batch2) -> (state, loss)``, one update of the treatment
        network and w; W is solved on ``batch1``, the outcome predicted on ``batch2``.
      round: ``round(state, batch1, batch2) -> (state, (loss1, loss2))``, T_1 updates of stage 1 and
        T_2 of stage 2 on the same two batches; the losses are those before the last update.
    """

    init: Callable[[IVBatch], IVState]
    stage1: Callable[[IVState, IVBatch], tuple[IVState, jax.Array]]
    stage2: Callable[[IVState, IVBatch, IVBatch], tuple[IVState, jax.Array]]
    round: Callable[[IVState, IVBatch, IVBatch], tuple[IVState, tuple[jax.Array, jax.Array]]]


def check_rows(owner: str, **fields: Any) -> None:
    """Refuse arrays of unequal numbers of samples."""
    shapes = {
        name: [jnp.shape(leaf) for leaf in jax.tree.leaves(field)] for name, field in fields.items()
    }
    if len({shape[:1] for leaves in shapes.values() for shape in leaves}) > 1:
        found = ", ".join(f"{name} {shape}" for name, leaves in shapes.items() for shape in leaves)
        raise ValueError(
            f"the arrays of {owner} have unequal numbers of samples: {found}. The first axis must "
            "be the same samples in all of them: take the same rows of each."
        )


def features_shape(backbone: Backbone, inputs: Any, name: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a backbone's features."""
    features, _ = jax.eval_shape(
        partial(backbone.apply, train=False), backbone.params, backbone.stats, given(inputs, name)
    )
    check_feature_rows(features, name)
    return features


def given(inputs: Any, name: str) -> Any:
    """A field of a batch that has to be there."""
    if inputs is None:
        raise ValueError(f"the batch has no {name}: write IVBatch(..., {name}=...).")
    return inputs


def check_covariate(networks: Networks, covariate: Any) -> None:
    """Refuse covariates that no network sees: f(x, c) without c is another function."""
    if networks.covariate is None and covariate is not None:
        raise TypeError(
            "there is a covariate, but no network for it: write Networks(..., covariate=backbone), "
            "or leave the covariate out."
        )


def check_feature_rows(features: Any, name: str) -> None:
    """Refuse what is no matrix of one row per sample."""
    if len(features.shape) != 2:
        raise ValueError(
            f"the {name} network returned features of shape {features.shape}; expected (n, d): "
            "one row per sample."
        )


def outcome_of(batch: IVBatch) -> jax.Array:
    """The outcomes of a batch, (n, o)."""
    if batch.outcome is None:
        raise ValueError(
            "stage 2 needs outcomes: write IVBatch(..., outcome=y), y of shape (n, o)."
        )
    outcome = jnp.asarray(batch.outcome)
    if outcome.ndim != 2:
        raise ValueError(f"outcome has shape {outcome.shape}; expected (n, o): write y[:, None].")
    return outcome


def products(treatment: jax.Array, covariate: jax.Array) -> jax.Array:
    """(psi, 1) x (xi, 1) without the last product, 1: that one is the bias. One psi serves all."""
    pairs = treatment[:, :, None] * covariate[:, None, :]
    treatment = jnp.broadcast_to(treatment, (len(covariate), treatment.shape[1]))
    return jnp.concatenate([pairs.reshape(len(covariate), -1), treatment, covariate], axis=1)


def check_state(state: Any) -> None:
    """Refuse a state that was restored as plain containers."""
    parts: list[tuple[str, Any, type]] = [("state", state, IVState)]
    if isinstance(state, IVState):
        kinds = (NetState, NetState, ClosedFormState, ClosedFormState)
        names = [f"state.{name}" for name in state._fields]
        parts = list(zip(names, state, kinds, strict=True))
    for name, part, kind in parts:
        if not isinstance(part, kind):
            raise TypeError(
                f"{name} is a {type(part).__name__}, not a {kind.__name__}: restored without a "
                "target? Restore into a state: with orbax checkpointer.restore(path, "
                "method.init(batch)), with flax serialization.from_bytes(method.init(batch), data)."
            )


def instrument_features(networks: Networks, state: IVState, instrument: Any) -> jax.Array:
    """phi(z), (n, d), evaluated."""
    check_state(state)
    net, inputs = state.instrument, given(instrument, "instrument")
    return networks.instrument.apply(net.params, net.stats, inputs, train=False)[0]


def treatment_features(networks: Networks, state: IVState, treatment: Any) -> jax.Array:
    """psi(x), (n, d), evaluated."""
    check_state(state)
    net, inputs = state.treatment, given(treatment, "treatment")
    return networks.treatment.apply(net.params[0], net.stats[0], inputs, train=False)[0]
