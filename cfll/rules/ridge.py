"""ridge, averaged_ridge: the best head of the batch, alone or averaged with those before."""

import jax
import jax.numpy as jnp

from cfll.heads import widest_dtype
from cfll.rules.penalized import penalized_rule
from cfll.rules.rule import AxisName, Penalty, Rule
from cfll.solve import CG


def ridge(
    beta: Penalty,
    *,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
    axis_name: AxisName | None = None,
) -> Rule:
    r"""The ridge rule: the best head of the current batch, forgetting the previous one.

    .. math:: W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \beta \|W\|_F^2

    For large batches: small ones are overfitted (Section 4 of the paper). The backbone descends on
    this loss, divided by the number of samples.

    Args:
      beta: the penalty, multiplying a *sum* over samples: scalar, (d,) or (d, d), or a schedule.
      penalize_bias, solver: as in `cfll.ridge_solve`.
      axis_name: as in `cfll.prox`.

    Returns:
      A `cfll.Rule`.

    Examples:
      >>> rule = ridge(beta=1.0)

    References:
      Closed-Form Last Layer Optimization, Eq. (9) and (11).
    """
    return penalized_rule("beta", beta, penalize_bias, solver, axis_name)


def averaged_ridge(
    beta: Penalty,
    decay: float,
    *,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
    axis_name: AxisName | None = None,
) -> Rule:
    r"""The averaging baseline of Barboni et al. (2025): a moving average of ridge heads.

    .. math::
        W_{t+1} = \mu W_t + (1 - \mu) \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \beta \|W\|_F^2

    Backbone and head then minimize different losses; see the paper's Section 1.1.

    Args:
      beta: the penalty, multiplying a *sum* over samples: scalar, (d,) or (d, d), or a schedule.
      decay: mu, in [0, 1); 0 is `ridge`.
      penalize_bias, solver: as in `cfll.ridge_solve`.
      axis_name: as in `cfll.prox`.

    Returns:
      A `cfll.Rule`.

    Raises:
      ValueError: if a concrete decay is outside [0, 1).

    Examples:
      >>> rule = averaged_ridge(beta=1.0, decay=0.5)

    References:
      Barboni, Peyré, Vialard: Ultra-fast feature learning for the training of two-layer neural
      networks in the two-timescale regime, arXiv:2504.18208.
    """
    if not isinstance(decay, jax.core.Tracer) and not 0 <= float(decay) < 1:
        raise ValueError(f"decay is {decay}; write 0 <= decay < 1, e.g. 0.5.")

    rule = penalized_rule("beta", beta, penalize_bias, solver, axis_name)

    def solve(features, targets, state, *, sample_weight=None):
        new = rule.solve(features, targets, state, sample_weight=sample_weight)
        dtype = widest_dtype(new.head.kernel, state.anchor.kernel)
        mu = jnp.asarray(decay, dtype)
        head = jax.tree.map(
            lambda new, old: mu * jnp.asarray(old, dtype) + (1 - mu) * jnp.asarray(new, dtype),
            new.head,
            state.anchor,
        )
        return new._replace(head=head)

    return rule._replace(solve=solve)
