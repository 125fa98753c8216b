"""A rule of one's own, in one file and touching no other: lam halves whenever the loss falls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import cfll


class HalvingState(NamedTuple):
    """What the rule carries from step to step."""

    lam: jax.Array
    loss: jax.Array  # of the batch before, at the head that it began with


def halving(lam: float) -> cfll.Rule:
    """The proximal rule with a penalty that is halved whenever the batch's loss has fallen."""

    def init(anchor):
        dtype = anchor.kernel.dtype
        return HalvingState(jnp.asarray(lam, dtype), jnp.asarray(jnp.inf, dtype))

    def solve(features, targets, state, *, sample_weight=None):
        before = state.rule_state
        loss = jnp.mean(jnp.sum(jnp.square(targets - state.anchor(features)), axis=-1))
        lam = jnp.where(loss < before.loss, before.lam / 2, before.lam)
        head, info = cfll.penalized_solve(
            features, targets, state.anchor, lam, sample_weight=sample_weight
        )
        return cfll.Solution(head, HalvingState(lam, loss), info)

    return cfll.Rule(init, solve)
