"""prox: stay near the previous head."""

from typing import Any

import jax.numpy as jnp

from cfll.losses import penalized_loss
from cfll.rules.rule import Penalty, Rule, Solution, penalty_state
from cfll.solve import CG, penalized_solve


def prox(lam: Penalty, *, penalize_bias: bool = True, solver: str | CG = "auto") -> Rule:
    r"""The proximal rule: stay near the previous head.

    .. math:: W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \lambda \|W - W_t\|_F^2

    Large ``lam`` averages over more batches, small ``lam`` follows the current one. See the README
    for how to choose it. The backbone descends on this loss, divided by the number of samples.

    Args:
      lam: the proximal coefficient, multiplying a *sum* over samples: scalar, (d,) or (d, d), or an
        Optax schedule of the number of updates.
      penalize_bias, solver: as in `cfll.prox_solve`.

    Returns:
      A `cfll.Rule`.

    Examples:
      >>> import optax
      >>> rule = prox(lam=optax.linear_schedule(1.0, 100.0, transition_steps=1000))

    References:
      Closed-Form Last Layer Optimization, Eq. (13), (14) and (17).
    """

    def init(anchor):
        return penalty_state(lam, jnp.zeros((), jnp.int32), anchor)

    def solve(features, targets, state, *, sample_weight=None):
        rule_state = penalty_state(lam, state.count, state.anchor)
        head, info = penalized_solve(
            features,
            targets,
            state.anchor,
            rule_state.lam if callable(lam) else lam,
            penalize_bias=penalize_bias,
            sample_weight=sample_weight,
            solver=solver,
        )
        return Solution(head, rule_state, info)

    def objective(solution, features, targets, state, *, sample_weight=None):
        keywords: dict[str, Any] = {"penalize_bias": penalize_bias, "sample_weight": sample_weight}
        penalty = solution.rule_state.lam
        return penalized_loss(solution.head, features, targets, state.anchor, penalty, **keywords)

    return Rule(init, solve, objective)
