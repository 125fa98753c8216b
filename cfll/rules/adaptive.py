"""adaptive_prox: stay near the previous head, as near as the batch itself says."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfll import samples
from cfll.heads import LinearHead, widest_dtype
from cfll.losses import penalized_loss
from cfll.rules.prox import prox
from cfll.rules.rule import AxisName, Rule
from cfll.solve import CG, penalized_solve

# Of the descent on log lam: its rate, and the decay of the running means of slope and square.
_RATE, _MEAN_DECAY, _SQUARE_DECAY, _SMALL = 0.3, 0.8, 0.95, 3e-3
# A larger lam has to lower the error by this share per factor of e: where it hardly matters for the
# batch a small one is better for the run, since the backbone then learns what the head cannot.
_PULL = 0.01
# What the first batch chooses from, in units of the mean of |phi|^2, largest first: the first one
# whose score is close to the least. The score is the error times a power of |W| |phi| / |r|, with r
# the residuals at the anchor: how much larger a head is than what it has to explain, because its
# features cancel. The backbone's gradient is a multiple of W. So a head that fits one batch of a
# random backbone a little better by being ten times larger spoils the run.
_CANDIDATES, _TOLERANCE, _POWER = 300.0 * 4.0 ** -np.arange(12), 1.05, 0.25


class AdaptiveState(NamedTuple):
    r"""The state of `cfll.adaptive_prox`.

    Attributes:
      lam: the penalty of the last update; 0 before the first.
      slope: d log(error) / d log(lam) of the last update, on samples held out; 0 where there was
        nothing to learn from. Below zero the head should have stayed nearer.
      mean_slope: running mean of the slope and what pulls lam down, 0.01 where it does.
      mean_square: running mean of its square; 0 until a batch has set lam.
    """

    lam: jax.Array
    slope: jax.Array
    mean_slope: jax.Array
    mean_square: jax.Array


def adaptive_prox(
    *, penalize_bias: bool = True, solver: str | CG = "auto", axis_name: AxisName | None = None
) -> Rule:
    r"""The proximal rule with a penalty that tunes itself.

    .. math::
        W_{t+1} = \arg\min_W \sum_i \|y_i - W^\top \phi_i\|^2 + \lambda_t \|W - W_t\|_F^2, \quad
        \log \lambda_t = \log \lambda_{t-1} - \eta \, \frac{m}{\sqrt{v}}

    One half of the batch is solved for by itself; with g the slope, by log lam, of the log error on
    the other half, m and v are running means of g + 0.01 and its square. The halves are the even
    and odd samples of the *first* axis (functions, not their grid points) that have weight, and
    take turns with every update that is counted.

    The first batch sets lam to the largest of twelve, from 300 to 7e-5 times the mean of
    :math:`\|\phi\|^2`, whose score is within 5 % of the least: there is no start to choose. The
    score is the error on the other half, times the fourth root of
    :math:`\|W\|_F \|\phi\| / \|y - W_0^\top \phi\|` (root mean squares) where that is above one: a
    head is large where features cancel, and makes the backbone's gradient large.

    The 0.01, added where lam is above the mean of :math:`\|\phi\|^2`, lets it rise only as long as
    that lowers the error by more than 2.3 % a decade. Without it lam rises for ever on data that
    were seen before, and on new ones beyond what is good for the run.

    Keep to `cfll.prox` where a classifier of many classes sees few samples many times, or a run has
    but some dozens of steps, too few to tune in.

    Args:
      penalize_bias, solver, axis_name: as in `cfll.prox`. Devices validate on their own samples,
        and share the slope.

    Returns:
      A `cfll.Rule`; ``state.lam`` and ``state.rule_state.slope`` show what it does.

    Raises:
      ValueError: while tracing, for batches whose first axis has a single sample.

    Examples:
      >>> import jax.numpy as jnp
      >>> from cfll.rules.rule import initial_state
      >>> rule, x, y = adaptive_prox(), jnp.eye(4), jnp.ones((4, 1))
      >>> loss, solution = rule.loss(x, y, initial_state(rule, LinearHead.zeros(4, 1)))
      >>> print(solution.rule_state.lam > 0)
      True
    """
    options: Any = {"penalize_bias": penalize_bias, "solver": solver}
    base = prox(1.0, axis_name=axis_name, **options)  # for what is wrong with the options

    def init(anchor):
        return AdaptiveState(*(jnp.zeros((), anchor.kernel.dtype) for _ in range(4)))

    def solve(features, targets, state, *, sample_weight=None):
        features, targets = samples.check_batch(features, targets, sample_weight, per_output=True)
        if len(features) < 2:
            raise ValueError(
                f"features has shape {features.shape}: adaptive_prox learns lam from one half of "
                "the first axis about the other. Write batches of two and more there, or cfll.prox."
            )

        batch = features, targets, sample_weight
        keywords = tuple(options.items()), axis_name
        rule_state = _tune(keywords, *jax.lax.stop_gradient((batch, state[:3])))
        rule = prox(rule_state.lam, axis_name=axis_name, **options)
        solution = rule.solve(features, targets, state, sample_weight=sample_weight)
        return solution._replace(rule_state=rule_state)

    return Rule(init, solve, base.objective, axis_name=axis_name)


# Compiled itself, as the kernels are: outside of jit a cond compiles at every call.
@partial(jax.jit, static_argnums=0, inline=True)
def _tune(keywords: Any, batch: Any, head: Any) -> AdaptiveState:
    """The next state of the rule, from count, anchor and rule state of the head."""
    specs = jax.tree.map(lambda _: jax.P(), head[2])
    return samples.let_xla_shard(partial(_descend, *keywords), batch[0], specs)(batch, head)


def _descend(options: Any, axis_name: Any, batch: Any, head: Any) -> AdaptiveState:
    """A step on log lam."""
    count_of_updates, anchor, old = head
    dtype = anchor.kernel.dtype

    def shared(measured: Any) -> Any:
        measured = jax.tree.map(lambda x: jnp.asarray(x, dtype), measured)
        return jax.lax.pmean(measured, axis_name) if axis_name else measured

    squares, count = shared(_squared_norms(batch))
    seen = (squares > 0) & jnp.isfinite(squares)
    norm = jnp.where(seen, squares / jnp.where(count > 0, count, 1), 1)
    turn = count_of_updates % 2
    halves = _half(batch, turn), _half(batch, 1 - turn)

    def validate(lam: jax.Array) -> Any:
        return shared(_validate(*halves, anchor, lam, options))

    def search() -> jax.Array:
        candidates = norm * jnp.asarray(_CANDIDATES, dtype)
        at_anchor = shared(penalized_loss(anchor, *batch[:2], sample_weight=batch[2]))

        def score(lam: jax.Array) -> jax.Array:
            error, _, size = validate(lam)
            return error * jnp.maximum(size * norm / at_anchor, 1) ** (_POWER / 2)

        scores = jax.lax.map(score, candidates)
        scores = jnp.where(jnp.isfinite(scores), scores, jnp.inf)
        return candidates[jnp.argmax(scores <= _TOLERANCE * jnp.min(scores))]

    first = old.mean_square == 0
    lam = jax.lax.cond(first, search, lambda: old.lam)
    error, change, _ = validate(lam)
    slope = change / jnp.where(error > 0, error, 1)
    usable = seen & jnp.isfinite(slope) & (slope != 0) & (error > 0)
    pulled = slope + jnp.where(lam > norm, jnp.asarray(_PULL, dtype), 0)
    mean = _MEAN_DECAY * old.mean_slope + (1 - _MEAN_DECAY) * pulled
    square = _SQUARE_DECAY * old.mean_square + (1 - _SQUARE_DECAY) * jnp.square(pulled)
    factor = jnp.exp(-_RATE * mean / (jnp.sqrt(square) + _SMALL))
    eps = jnp.finfo(dtype).eps
    new = AdaptiveState(jnp.clip(lam * factor, eps * norm, norm / eps), slope, mean, square)
    lam = jnp.where(seen | (old.lam == 0), lam, old.lam)
    kept = old._replace(lam=lam, slope=jnp.zeros_like(slope))
    return jax.tree.map(lambda new, kept: jnp.where(usable, new, kept), new, kept)


def _half(batch: Any, k: jax.Array) -> Any:
    """The even or the odd samples; of those with weight, if there are weights."""

    def choose(array: jax.Array) -> jax.Array:
        # Pairs, so that devices keep the samples that they have.
        pairs = array[: len(array) // 2 * 2].reshape(-1, 2, *array.shape[1:])
        return jax.lax.dynamic_index_in_dim(pairs, k, axis=1, keepdims=False)

    features, targets, weights = batch
    if weights is None:
        return jax.tree.map(choose, batch)
    # Every other sample may be without, which would leave one half empty. So that no sample leaves
    # its device all of them stay, with a weight of zero in one half.
    weights = jnp.asarray(weights)
    present = ~jnp.all(jnp.logical_not(weights).reshape(len(weights), -1), axis=1)
    count = jnp.cumsum(present, dtype=k.dtype)
    chosen = present & (count % 2 != k) & (count <= count[-1] // 2 * 2)
    chosen = chosen.reshape(-1, *(1,) * (weights.ndim - 1))
    return features, targets, jnp.where(chosen, weights, jnp.zeros_like(weights))


def _validate(
    batch: Any, unseen: Any, anchor: LinearHead, lam: jax.Array, options: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the head of the batch: error on unseen samples, its derivative by log lam, and |W|^2."""
    features, targets, weights = batch
    unseen_features, unseen_targets, unseen_weights = unseen

    def solve(targets: jax.Array, near: LinearHead) -> LinearHead:
        return penalized_solve(
            features, targets, near, lam, sample_weight=weights, **dict(options)
        )[0]

    def error(head: LinearHead) -> jax.Array:
        return penalized_loss(head, unseen_features, unseen_targets, sample_weight=unseen_weights)

    # The derivative of the step A^{-1} Phi^T R by log lam is -lam A^{-1} step: what a head that
    # starts at minus the step keeps of it where all targets are zero. XLA makes one factor of both.
    head = solve(targets, anchor)
    step_back = jax.tree.map(lambda old, new: jnp.asarray(old, new.dtype) - new, anchor, head)
    by_log_lam = solve(jnp.zeros_like(targets), step_back)
    return *jax.jvp(error, (head,), (by_log_lam,)), jnp.sum(jnp.square(head.kernel))


def _squared_norms(batch: Any) -> tuple[jax.Array, jax.Array]:
    """The sum of the features' squared norms, and how many those are."""
    features, targets, weights = batch
    rows = samples.flatten(features, targets, weights, widest_dtype(features))
    norms = jnp.sum(jnp.square(rows.features), axis=1, keepdims=True)
    outputs = rows.targets.shape[1]
    weighted = rows.weigh(jnp.broadcast_to(norms, rows.targets.shape))
    return jnp.sum(weighted) / outputs, rows.total()
