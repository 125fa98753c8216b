"""penalized_rule: what the proximal and the ridge rule share, on one device and on several."""

from typing import Any

import jax
import jax.numpy as jnp

from cfll.heads import as_plain, widest_dtype
from cfll.losses import penalized_loss
from cfll.rules.rule import AxisName, Penalty, Rule, Solution, penalty_state
from cfll.solve import CG, penalized_solve
from cfll.solve.problem import check_value
from cfll.stats import GramStats


def penalized_rule(
    name: str, penalty: Penalty, penalize_bias: bool, solver: str | CG, axis_name: AxisName | None
) -> Rule:
    """The rule with the penalty "lam", around the anchor, or "beta", around zero."""
    if axis_name and solver != "auto":
        raise ValueError(f"with axis_name heads are solved from sums: leave out solver={solver!r}.")
    penalty = as_plain(penalty)  # an nnx.Variable is callable, but no schedule
    if not callable(penalty):
        check_value(name, penalty)

    def anchor_of(state):
        return state.anchor if name == "lam" else None

    def init(anchor):
        return penalty_state(penalty, jnp.zeros((), jnp.int32), anchor)

    def unsolved(state):
        return penalty_state(penalty, state.count, state.anchor)

    def solve(features, targets, state, *, sample_weight=None):
        rule_state, anchor = unsolved(state), anchor_of(state)
        value = rule_state.lam if callable(penalty) else penalty
        use_bias = state.anchor.bias is not None
        options: Any = {"penalize_bias": penalize_bias, "name": name}
        if not axis_name:
            options |= {"use_bias": use_bias, "sample_weight": sample_weight, "solver": solver}
            head, info = penalized_solve(features, targets, anchor, value, **options)
        else:
            d, o = state.anchor.kernel.shape
            dtype = widest_dtype(features, targets, state.anchor.kernel)
            stats = GramStats.zeros(d, o, use_bias, dtype)
            stats = stats.add(features, targets, sample_weight).psum(axis_name)
            zero = jax.tree.map(jnp.zeros_like, state.anchor)
            head, info = stats.solve(zero if anchor is None else anchor, value, **options)
        return Solution(head, rule_state, info)

    def objective(solution, features, targets, state, *, sample_weight=None):
        options: Any = {"penalize_bias": penalize_bias, "sample_weight": sample_weight}
        batch = features, targets, anchor_of(state), solution.rule_state.lam
        return penalized_loss(solution.head, *batch, axis_name=axis_name or None, **options)

    return Rule(init, solve, objective, unsolved, axis_name)
