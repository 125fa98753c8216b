r"""softmax, logistic, poisson, huber: losses that are not squared, by working targets.

A loss :math:`\ell(z, y)` of the outputs :math:`z = W^\top \phi + b` is replaced by a parabola that
touches it, with slope g, at the outputs :math:`\bar z` of the current head:

.. math::
    \ell(\bar z, y) + g^\top (z - \bar z) + c \|z - \bar z\|^2
    = c \, \|(\bar z - g / 2c) - z\|^2 + \mathrm{const}.

So least squares on *working targets* :math:`\bar z - g / 2c` with weights c give the next head, and
so on. The step to it is halved or doubled to the length, zero among them, at which the penalized
loss is smallest: no inner step lets the loss rise.

* softmax: :math:`\ell = -y^\top \log p`, slope p - y. Its Hessian diag(p) - p p^T has no eigenvalue
  above 1/2 (Böhning), so that c = 1/4 puts the parabola above the loss: targets z + 2 (y - p).
* logistic: log(1 + e^z) - y z, slope p - y, curvature p (1 - p) <= 1/4: c = 1/8, z + 4 (y - p).
* huber: r^2 for r = |y - z| <= delta, else delta (2 r - delta). c = min(1, delta / r) puts the
  parabola above, and the working target is y itself: reweighted least squares.
* poisson: e^z - y z has no parabola above it. Newton's c is e^z / 2; c = (e^z + y) / 4 is the same
  on average over y, and asks for -g / 2c = 2 tanh((log y - z) / 2), never beyond log y - z.

A constant c is a penalty of lam / c, 4 lam or 8 lam; the other two have a matrix per output.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.heads import LinearHead, as_plain, check_anchor, widest_dtype
from cfll.rules.rule import Penalty, Rule, Solution, penalty_state
from cfll.solve import CG, SolveInfo, penalized_solve
from cfll.solve.problem import Problem, as_penalty, bias_penalty_of, check_penalty, check_value


class Loss(NamedTuple):
    """A loss of outputs and targets, (n, o); targets outside of [smallest, largest] become NaN."""

    value: Callable[[jax.Array, jax.Array], jax.Array]  # (n, o), to be summed
    curvature: float | Callable[[jax.Array, jax.Array], jax.Array]  # c, constant or (n, o)
    smallest: float = 0.0
    largest: float = jnp.inf


SOFTMAX = Loss(lambda z, y: -y * jax.nn.log_softmax(z), 1 / 4)
LOGISTIC = Loss(lambda z, y: jax.nn.softplus(z) - y * z, 1 / 8, largest=1.01)  # bfloat16 rounds
POISSON = Loss(lambda z, y: jnp.exp(z) - y * z, lambda z, y: (jnp.exp(z) + y) / 4)
LENGTHS = [*(2.0**k for k in range(3, -13, -1)), 0.0]  # of an inner step, 1 is least squares


def softmax(
    lam: Penalty, *, steps: int = 1, penalize_bias: bool = True, solver: str | CG = "auto"
) -> Rule:
    r"""Cross entropy of a softmax, near the previous head.

    .. math:: \min_W -\sum_i y_i^\top \log \mathrm{softmax}(W^\top \phi_i) + \lambda \|W - W_t\|_F^2

    `cfll.prox` with another loss, approached from :math:`W_t` by inner steps, none of which lets it
    rise. The backbone descends on this loss, divided by the number of samples, at the fixed new
    head, as by the envelope theorem: which asks for the minimizer, and few steps are only near it.

    Args:
      lam: as in `cfll.prox`, multiplying a *sum* over samples.
      steps: number of inner steps, each a `cfll.prox_solve`. Training seldom gains by more than 1.
      penalize_bias, solver: as in `cfll.prox_solve`. There is no ``axis_name``: on several devices
        shard the batch and jit; inside ``pmap`` and ``shard_map`` the rule is refused.

    Returns:
      A `cfll.Rule`; targets (..., o), one-hot or probabilities. With targets out of range or a loss
      that overflows the head is NaN: rejected. ``state.info.solve`` is of the worst solve.

    Raises:
      ValueError: if ``steps`` is not a positive whole number.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from cfll.rules.rule import initial_state
      >>> rule, x, y = softmax(lam=0.01), jnp.eye(3), jax.nn.one_hot(jnp.array([2, 0, 1]), 3)
      >>> loss, solution = rule.loss(x, y, initial_state(rule, LinearHead.zeros(3, 3)))
      >>> print(solution.head(x).argmax(-1))
      [2 0 1]

    References:
      Böhning: Multinomial logistic regression algorithm, AISM 44, 1992.
    """
    return _rule(SOFTMAX, lam, steps, penalize_bias, solver)


def logistic(
    lam: Penalty, *, steps: int = 1, penalize_bias: bool = True, solver: str | CG = "auto"
) -> Rule:
    r"""Binary cross entropy per output, for one or several labels that do not exclude each other.

    .. math:: \min_W \sum_{ik} \log(1 + e^{z_{ik}}) - y_{ik} z_{ik} + \lambda \|W - W_t\|_F^2

    Args, Returns, Raises: as `softmax`; targets (..., o) in [0, 1]; :math:`z_i = W^\top \phi_i`.
    Reference: Böhning, Lindsay, AISM 40, 1988.

    Examples:
      >>> rule = logistic(lam=10.0)
    """
    return _rule(LOGISTIC, lam, steps, penalize_bias, solver)


def poisson(
    lam: Penalty, *, steps: int = 1, penalize_bias: bool = True, solver: str | CG = "auto"
) -> Rule:
    r"""Counts, whose logarithmic rates are the outputs.

    .. math:: \min_W \sum_{ik} e^{z_{ik}} - y_{ik} z_{ik} + \lambda \|W - W_t\|_F^2

    Args, Returns, Raises: as `logistic`; targets (..., o), floats >= 0. A solve per output and
    inner step. A head whose outputs overflow in e^z stays, rejected for ever: start from zeros.
    Reference: McCullagh, Nelder: Generalized Linear Models, 1989, Section 2.5.

    Examples:
      >>> rule = poisson(lam=10.0)
    """
    return _rule(POISSON, lam, steps, penalize_bias, solver)


def huber(
    lam: Penalty,
    delta: float = 1.0,
    *,
    steps: int = 1,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
) -> Rule:
    r"""Regression with outliers: `cfll.prox` for residuals up to delta, linear beyond.

    .. math:: \min_W \sum_{ik} h(y_{ik} - z_{ik}) + \lambda \|W - W_t\|_F^2, \quad
        h(r) = r^2 \text{ or } \delta (2 |r| - \delta)

    Args, Returns, Raises: as `logistic`; delta > 0, in units of the targets. A solve per output and
    inner step. Reference: Huber, Ronchetti: Robust Statistics, 2009, Section 7.8.

    Examples:
      >>> rule = huber(lam=10.0, delta=1.35)
    """
    if jnp.ndim(delta) != 0:
        raise ValueError(f"delta has shape {jnp.shape(delta)}; write a scalar.")
    if not isinstance(delta, jax.core.Tracer) and not float(delta) > 0:
        raise ValueError(f"delta is {delta}; write delta > 0 in units of the targets, e.g. 1.0.")

    def value(z: jax.Array, y: jax.Array) -> jax.Array:
        r = jnp.abs(y - z)
        return jnp.where(r <= delta, jnp.square(r), delta * (2 * r - delta))

    loss = Loss(value, lambda z, y: delta / jnp.maximum(jnp.abs(y - z), delta), smallest=-jnp.inf)
    return _rule(loss, lam, steps, penalize_bias, solver)


def _rule(loss: Loss, lam: Penalty, steps: int, penalize_bias: bool, solver: str | CG) -> Rule:
    if not (isinstance(steps, Integral) and type(steps) is not bool and steps > 0):
        raise ValueError(f"steps is {steps!r}; write a positive whole number, e.g. 1.")
    lam = as_plain(lam)  # an nnx.Variable is callable, but no schedule
    if not callable(lam):
        check_value("lam", lam)

    def prepare(features, targets, state, sample_weight, penalty) -> Any:
        """Problem, and targets (n, o) and anchor, in one dtype."""
        features, targets = samples.check_batch(features, targets, sample_weight)
        if loss is SOFTMAX and targets.shape[-1] == 1:
            raise ValueError(
                "the softmax of one output is 1, whatever it is. Write one-hot targets and a head "
                "of as many outputs, jax.nn.one_hot(labels, num_classes), or cfll.logistic."
            )
        has_bias, d = state.anchor.bias is not None, features.shape[-1]
        check_anchor(state.anchor, d, targets.shape[-1])
        check_penalty("lam", penalty, d, features.size // d, has_bias and not penalize_bias)
        dtype = widest_dtype(features, targets, state.anchor.kernel)
        valid = (targets >= loss.smallest) & (targets <= loss.largest)
        targets = jnp.where(valid, targets, jnp.full((), jnp.nan, targets.dtype))
        rows = samples.flatten(features, targets, sample_weight, dtype)
        penalty = as_penalty(penalty, dtype)
        bias_penalty = bias_penalty_of(penalty, has_bias, penalize_bias)
        anchor = jax.tree.map(lambda x: jnp.asarray(x, dtype), state.anchor)
        return Problem(rows.features, rows.weights, penalty, bias_penalty), (rows.targets, anchor)

    def solve(features, targets, state, *, sample_weight=None):
        rule_state = penalty_state(lam, state.count, state.anchor)
        penalty = rule_state.lam if callable(lam) else lam
        problem, batch = prepare(features, targets, state, sample_weight, penalty)

        head, info = _descend((loss, steps, penalize_bias, solver), problem, batch)
        return Solution(head, rule_state, info)

    def objective(solution, features, targets, state, *, sample_weight=None):
        penalty = solution.rule_state.lam
        problem, batch = prepare(features, targets, state, sample_weight, penalty)
        head = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), solution.head, batch[1])

        def run(problem: Problem, batch: Any, head: LinearHead) -> jax.Array:
            return _penalized(loss, problem, batch, head, head(problem.features))

        return samples.let_xla_shard(run, problem.features, jax.P())(problem, batch, head)

    return Rule(
        lambda anchor: penalty_state(lam, jnp.zeros((), jnp.int32), anchor),
        solve,
        objective,
        lambda state: penalty_state(lam, state.count, state.anchor),
    )


@partial(jax.jit, static_argnums=0, inline=True)  # as `cfll.solve._solve`
def _descend(options: Any, problem: Problem, batch: Any) -> tuple[LinearHead, SolveInfo]:
    """The head after the inner steps; of its solves the worst."""
    loss, steps, *_ = options

    def one(problem: Problem, batch: Any) -> Any:
        start = samples.varying_like(batch[1], *jax.tree.leaves((problem, batch)))
        return jax.lax.scan(partial(_step, options, problem, batch), start, length=steps)

    def run(problem: Problem, batch: Any) -> Any:
        if callable(loss.curvature):  # output by output: vmap would run every fallback
            batch = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0)[..., None], batch)
            head, infos = jax.lax.map(partial(one, problem), batch)
            head = jax.tree.map(lambda x: jnp.moveaxis(x[..., 0], 0, -1), head)
        else:
            head, infos = one(problem, batch)
        return head, infos.worst()

    head_specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, batch[1])
    specs = head_specs, jax.tree.map(lambda _: jax.P(), SolveInfo(0, 0))
    return samples.let_xla_shard(run, problem.features, specs)(problem, batch)


def _step(options: Any, problem: Problem, batch: Any, head: LinearHead, _: Any) -> Any:
    """Least squares on the working targets at a head, and how far to go there."""
    loss, _, penalize_bias, solver = options
    targets, anchor = batch
    outputs = _seen(loss, problem, targets, head(problem.features))
    slope = jax.grad(lambda z: jnp.sum(loss.value(z, targets)))(outputs)
    c, penalty, weights = loss.curvature, problem.penalty, problem.weights
    if callable(c):
        c = jnp.maximum(c(outputs, targets), jnp.finfo(outputs.dtype).tiny ** 0.5)
        weights = problem.weigh(c)[:, 0]
    else:
        penalty = penalty / c
    keywords: Any = {"penalize_bias": penalize_bias, "sample_weight": weights, "solver": solver}
    working = outputs - slope / (2 * c)
    new, info = penalized_solve(problem.features, working, anchor, penalty, **keywords)
    step = jax.tree.map(jnp.subtract, new, head)
    change = new(problem.features) - outputs

    def at(length: jax.Array) -> LinearHead:
        return jax.tree.map(lambda old, step: old + length * step, head, step)

    lengths, total = jnp.asarray(LENGTHS, outputs.dtype), partial(_penalized, loss, problem, batch)
    losses = jax.vmap(lambda length: total(at(length), outputs + length * change))(lengths)
    best = lengths[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
    return at(jnp.where(jnp.any(jnp.isfinite(losses)), best, jnp.nan)), info


def _seen(loss: Loss, problem: Problem, targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """The outputs, zero where a row of weight zero has an infinite loss: 0 e^z would be NaN."""
    if problem.weights is None:
        return outputs
    absent = (problem.weights == 0).reshape(-1, 1) & ~jnp.isfinite(loss.value(outputs, targets))
    return jnp.where(absent, jnp.zeros_like(outputs), outputs)


def _penalized(loss, problem, batch, head, outputs) -> jax.Array:
    """What the rule minimizes, divided by the number of samples."""
    targets, anchor = batch
    outputs = _seen(loss, problem, targets, outputs)
    step, total = jax.tree.map(jnp.subtract, head, anchor), problem.total()
    distance = jax.tree.map(lambda x, y: jnp.sum(x * y), step, problem.penalize(step))
    summed = jnp.sum(problem.weigh(loss.value(outputs, targets))) + sum(jax.tree.leaves(distance))
    return summed / jnp.where(total == 0, jnp.ones_like(total), total)
