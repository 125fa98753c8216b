"""prox, ridge, ema: how the next head follows from a batch and the previous head.

A rule is a pair of pure functions, in the spirit of Optax's own pairs. A new rule is one function
that returns a `Rule`; nothing else changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cfll import solve
from cfll.cg import CG
from cfll.heads import LinearHead, widest_dtype

Penalty = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


class SolveFn(Protocol):
    """The signature of `Rule.solve`."""

    def __call__(
        self,
        features: jax.Array,
        targets: jax.Array,
        anchor: LinearHead,
        rule_state: Any,
        *,
        count: jax.Array,
        sample_weight: jax.Array | None,
    ) -> tuple[LinearHead, Any, solve.SolveInfo]:
        """The next head, the next rule state and how the head was solved."""
        ...


class Rule(NamedTuple):
    """How the next head follows from a batch and the previous head.

    Attributes:
      init: ``init(anchor) -> rule_state``, a pytree of arrays.
      solve: ``solve(features, targets, anchor, rule_state, *, count, sample_weight) ->
        (head, rule_state, info)``; ``count`` is the number of updates before this one, what a
        schedule takes. A head that is not finite is rejected by the transformation.

    Examples:
      A rule that solves only the first head and keeps it:

      >>> import jax.numpy as jnp
      >>> first = ridge(beta=1.0)
      >>> def solve_once(features, targets, anchor, rule_state, *, count, sample_weight):
      ...     head, rule_state, info = first.solve(
      ...         features, targets, anchor, rule_state, count=count, sample_weight=sample_weight)
      ...     keep = lambda new, old: jnp.where(count == 0, new, old)
      ...     return jax.tree.map(keep, head, anchor), rule_state, info
      >>> once = Rule(first.init, solve_once)
    """

    init: Callable[[LinearHead], Any]
    solve: SolveFn


class PenaltyState(NamedTuple):
    """The state of the rules of this module.

    Attributes:
      lam: the penalty of the last solve (`ridge` and `ema`: their beta), in float32 or float64. A
        record: change it through a schedule or ``optax.inject_hyperparams``, not here.
    """

    lam: jax.Array


def prox(lam: Penalty, *, penalize_bias: bool = True, solver: str | CG = "auto") -> Rule:
    r"""The proximal rule: stay near the previous head.

    .. math:: W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \lambda \|W - W_t\|_F^2

    Large ``lam`` averages over more batches, small ``lam`` follows the current one. See the README
    for how to choose it.

    Args:
      lam: the proximal coefficient, multiplying a *sum* over samples: scalar, (d,) or (d, d), or an
        Optax schedule of the number of updates.
      penalize_bias: as in `cfll.prox_solve`.
      solver: as in `cfll.prox_solve`.

    Returns:
      A `Rule`.

    Examples:
      >>> import optax
      >>> rule = prox(lam=optax.linear_schedule(1.0, 100.0, transition_steps=1000))

    References:
      Closed-Form Last Layer Optimization, Eq. (13) and (17).
    """

    def solve_fn(features, targets, anchor, rule_state, *, count, sample_weight):
        del rule_state
        head, info = solve.penalized_solve(
            features,
            targets,
            anchor,
            _at(lam, count),
            penalize_bias=penalize_bias,
            sample_weight=sample_weight,
            solver=solver,
        )
        return head, _record(lam, count, anchor), info

    return Rule(lambda anchor: _record(lam, jnp.zeros((), jnp.int32), anchor), solve_fn)


def ridge(beta: Penalty, *, penalize_bias: bool = True, solver: str | CG = "auto") -> Rule:
    r"""The ridge rule: the best head of the current batch, forgetting the previous one.

    .. math:: W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \beta \|W\|_F^2

    For large batches: small ones are overfitted (Section 4 of the paper).

    Args:
      beta: the penalty, multiplying a *sum* over samples: scalar, (d,) or (d, d), or a schedule.
      penalize_bias: as in `cfll.ridge_solve`.
      solver: as in `cfll.ridge_solve`.

    Returns:
      A `Rule`.

    Examples:
      >>> rule = ridge(beta=1.0)

    References:
      Closed-Form Last Layer Optimization, Eq. (9) and (11).
    """
    return ema(beta, decay=0.0, penalize_bias=penalize_bias, solver=solver)


def ema(
    beta: Penalty, decay: float, *, penalize_bias: bool = True, solver: str | CG = "auto"
) -> Rule:
    r"""The averaging baseline of Barboni et al. (2025): a moving average of ridge heads.

    .. math::
        W_{t+1} = \mu W_t + (1 - \mu) \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \beta \|W\|_F^2

    Backbone and head then minimize different losses; see the paper's Section 1.1.

    Args:
      beta: the penalty, multiplying a *sum* over samples: scalar, (d,) or (d, d), or a schedule.
      decay: mu, in [0, 1); 0 is `ridge`.
      penalize_bias: as in `cfll.ridge_solve`.
      solver: as in `cfll.ridge_solve`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: if a concrete decay is outside [0, 1).

    Examples:
      >>> rule = ema(beta=1.0, decay=0.5)

    References:
      Barboni, Peyré, Vialard: Ultra-fast feature learning for the training of two-layer neural
      networks in the two-timescale regime, arXiv:2504.18208.
    """
    if not isinstance(decay, jax.core.Tracer) and not 0 <= float(decay) < 1:
        raise ValueError(f"decay is {decay}; write 0 <= decay < 1, e.g. 0.5.")

    def solve_fn(features, targets, anchor, rule_state, *, count, sample_weight):
        del rule_state
        head, info = solve.penalized_solve(
            features,
            targets,
            None,
            _at(beta, count),
            use_bias=anchor.bias is not None,
            penalize_bias=penalize_bias,
            sample_weight=sample_weight,
            solver=solver,
            name="beta",
        )
        dtype = widest_dtype(head.kernel, anchor.kernel)  # the anchor's type is the state's
        mu = jnp.asarray(decay, dtype)
        head = jax.tree.map(
            lambda new, old: mu * jnp.asarray(old, dtype) + (1 - mu) * jnp.asarray(new, dtype),
            head,
            anchor,
        )
        return head, _record(beta, count, anchor), info

    return Rule(lambda anchor: _record(beta, jnp.zeros((), jnp.int32), anchor), solve_fn)


def _at(penalty: Penalty, count: jax.Array) -> jax.typing.ArrayLike:
    return penalty(count) if callable(penalty) else penalty


def _record(penalty: Penalty, count: jax.Array, anchor: LinearHead) -> PenaltyState:
    return PenaltyState(jnp.array(_at(penalty, count), anchor.kernel.dtype))
