"""prox: stay near the previous head."""

from cfll.rules.penalized import penalized_rule
from cfll.rules.rule import AxisName, Penalty, Rule
from cfll.solve import CG


def prox(
    lam: Penalty,
    *,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
    axis_name: AxisName | None = None,
) -> Rule:
    r"""The proximal rule: stay near the previous head.

    .. math:: W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \lambda \|W - W_t\|_F^2

    Large ``lam`` averages over more batches, small ``lam`` follows the current one. See the README
    for how to choose it. The backbone descends on this loss, divided by the number of samples.

    Args:
      lam: the proximal coefficient, multiplying a *sum* over samples: scalar, (d,) or (d, d), or an
        Optax schedule of the number of updates.
      penalize_bias, solver: as in `cfll.prox_solve`.
      axis_name: inside ``pmap`` or ``shard_map``, the mapped axis (or axes) whose devices share the
        batch, as in batch norm: the head is then that of all samples, from their `GramStats`, in
        two all-reduces (means, and sums around them); the mean of the losses over the axis is the
        loss of all samples, and the mean of the gradients its gradient (in ``shard_map`` those of
        parameters that vary, see the guide "scale": of others JAX takes the sum). ``()``: every
        device has a network of its own. None is refused there, since replicas would part.

    Returns:
      A `cfll.Rule`.

    Raises:
      ValueError: for a ``solver`` beside ``axis_name``.

    Examples:
      >>> import optax
      >>> rule = prox(lam=optax.linear_schedule(1.0, 100.0, transition_steps=1000))

    References:
      Closed-Form Last Layer Optimization, Eq. (13), (14) and (17).
    """
    return penalized_rule("lam", lam, penalize_bias, solver, axis_name)
