"""every: solve at every k-th update only."""

from functools import wraps
from numbers import Integral

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.rules.rule import Rule, Solution


def every(update_interval: int, rule: Rule) -> Rule:
    """Solve by a rule at every k-th update, the first among them; keep the head in between.

    Where the solve is what a step costs. It is inside a `jax.lax.cond`; the features are computed
    in every update. In between ``state.info.solve`` shows the last solve.

    Args:
      update_interval: k, a whole number of updates.
      rule: any `cfll.Rule`.

    Returns:
      A `cfll.Rule`.

    Raises:
      ValueError: if the interval is not a positive whole number.

    Examples:
      >>> import cfll
      >>> rule = every(4, cfll.prox(lam=10.0))
    """
    if not (
        isinstance(update_interval, Integral)
        and type(update_interval) is not bool
        and update_interval > 0
    ):
        raise ValueError(f"update_interval is {update_interval!r}; write a whole number, e.g. 4.")

    @wraps(rule.solve)  # so that its keywords are known
    def solve(features, targets, state, **keywords):
        kept = Solution(state.anchor, state.rule_state, state.info.solve)

        due = state.count % update_interval == 0
        if samples.concrete(due) is not None:  # outside of jit a cond compiles at every call
            return rule.solve(features, targets, state, **keywords) if due else kept

        def solved() -> Solution:
            new = rule.solve(features, targets, state, **keywords)
            return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), new, kept)

        def typed(solution: Solution) -> Solution:  # devices without an axis differ
            batch = (jnp.asarray(x, jnp.float32) for x in (features, targets, state.anchor.kernel))
            return solution if rule.axis_name else samples.varying_like(solution, *batch)

        return jax.lax.cond(due, lambda: typed(solved()), lambda: typed(kept))

    return rule._replace(solve=solve)
