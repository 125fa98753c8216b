"""The methods that the experiments compare: one training step each, for any network with a head.

A network is what `cfll.flax.backbone` makes of a module with a dense layer called "head": its
features come from there, its outputs are made here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import cfll
from benchmarks.core.optimizers import OPTIMIZERS, cosine_decay
from cfll.networks import ApplyFn

HEAD = "head"

GRADIENT, TWO_TIMESCALE = "gradient", "two-timescale"
RIDGE, AVERAGE, PROXIMAL = "ridge", "average of ridge", "proximal"
ADAPTIVE, ADAPTIVE_FROM, SOFTMAX = "self-tuned", "self-tuned from a start", "softmax"
ALGORITHM_1, ALGORITHM_2, EQUATION_17 = "Alg. 1", "Alg. 2", "Eq. (17)"

OF_NETWORK = "network"  # an initialization

AVERAGE_DECAY = 0.5  # of Barboni et al.


def adaptive_from(lam: jax.typing.ArrayLike) -> cfll.Rule:
    """`cfll.adaptive_prox` that starts at a lam instead of one that the first batch chooses."""
    rule = cfll.adaptive_prox()

    def init(anchor: cfll.LinearHead) -> Any:
        state, dtype = rule.init(anchor), anchor.kernel.dtype
        not_first = jnp.full((), jnp.finfo(dtype).tiny, dtype)
        return state._replace(lam=jnp.asarray(lam, dtype), mean_square=not_first)

    return rule._replace(init=init)


# Of the heads in closed form; called with a method's strength.
RULES: Mapping[str, Callable[..., cfll.Rule]] = {
    RIDGE: cfll.ridge,
    AVERAGE: partial(cfll.averaged_ridge, decay=AVERAGE_DECAY),
    PROXIMAL: cfll.prox,
    ADAPTIVE: lambda strength: cfll.adaptive_prox(),
    ADAPTIVE_FROM: adaptive_from,
    SOFTMAX: cfll.softmax,
}

STRENGTH_NAMES: Mapping[str, str] = {
    PROXIMAL: "lam",
    ADAPTIVE_FROM: "lam",
    SOFTMAX: "lam",
    RIDGE: "beta",
    AVERAGE: "beta",
    TWO_TIMESCALE: "ratio",
}


class Method(NamedTuple):
    """A row of a comparison."""

    optimizer: str  # of the backbone, and of a gradient head: a key of `OPTIMIZERS`
    # How the head is found: GRADIENT, TWO_TIMESCALE, RIDGE, AVERAGE, PROXIMAL, ADAPTIVE or SOFTMAX.
    head: str
    # Of backbone and head within a step, for those in closed form; AVERAGE has but Eq. (17).
    order: str = ""
    loss: str = "l2"  # "l2", or "cross entropy" with a gradient head
    use_bias: bool = True  # whether the head has an intercept
    # Of the head's kernel: "zeros", "lecun", "xavier", "he", or OF_NETWORK, as the network was
    # made. `None`: zeros for closed-form heads, the paper's best; LeCun for the others.
    init: str | None = None

    @property
    def name(self) -> str:
        """How a row is called where the optimizer is named elsewhere."""
        if self.loss != "l2":
            return self.loss
        head = "l2" if self.head == GRADIENT else self.head
        parts = [head, self.order, "" if self.use_bias else "no bias", self.init or ""]
        return ", ".join(part for part in parts if part)

    @property
    def strength(self) -> str | None:
        """What the second hyperparameter is called, if there is one."""
        return STRENGTH_NAMES.get(self.head)


class Hyper(NamedTuple):
    """What is tuned. Traced: one compiled step serves all values."""

    rate: jax.typing.ArrayLike  # learning rate at the first step; it decays to zero on a cosine
    # `lam`, `beta` (on a *sum* over samples) or the ratio of the head's rate to the backbone's;
    # ignored by methods without one.
    strength: jax.typing.ArrayLike
    num_steps: jax.typing.ArrayLike  # of the whole run, for the decay


class State(NamedTuple):
    """What a step carries."""

    params: Any  # of backbone and head
    stats: Any  # running statistics of the network, or an empty dictionary
    opt_state: Any  # of the optimizer


class Batch(NamedTuple):
    """Samples of one step."""

    inputs: Any  # (n, ...)
    targets: Any  # (n, ..., o), one-hot for classification


INITIALIZERS: Mapping[str, jax.nn.initializers.Initializer] = {
    "zeros": jax.nn.initializers.zeros,
    "lecun": jax.nn.initializers.lecun_normal(),
    "xavier": jax.nn.initializers.glorot_normal(),
    "he": jax.nn.initializers.he_normal(),
}


def init(method: Method, hyper: Hyper, params: Any, stats: Any, seed: int) -> State:
    """The first state of a run; the head's parameters are replaced, by a seed of their own."""
    shape = params[HEAD]["kernel"].shape
    name = method.init or ("lecun" if method.head in (GRADIENT, TWO_TIMESCALE) else "zeros")
    if name != OF_NETWORK:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        head = {"kernel": INITIALIZERS[name](key, shape, jnp.float32)}
        if method.use_bias:
            head["bias"] = jnp.zeros(shape[-1:], jnp.float32)
        params = {**params, HEAD: head}
    return State(params, stats, transformation(method, hyper).init(params))


def transformation(method: Method, hyper: Hyper) -> Any:
    """The optimizer of a method, alone or with a rule for the head."""
    optimizer = OPTIMIZERS[method.optimizer](cosine_decay(hyper.rate, hyper.num_steps))
    if method.head == GRADIENT:
        return optimizer
    if method.head == TWO_TIMESCALE:
        return optax.chain(optimizer, optax.masked(optax.scale(hyper.strength), _only_head))
    return cfll.closed_form(optimizer, rule_of(method, hyper), head=HEAD)


def rule_of(method: Method, hyper: Hyper) -> cfll.Rule:
    """How a method with a closed-form head finds it."""
    return RULES[method.head](hyper.strength)


def step(
    method: Method, apply: ApplyFn, hyper: Hyper, state: State, batch: Batch, following: Batch
) -> tuple[State, jax.Array]:
    """One step of a method: the next state and the loss. Jit it with the first two arguments fixed.

    `following` is the next batch, which Algorithm 2 solves the head on; others ignore it.
    """
    tx = transformation(method, hyper)
    solve_first = method.head == AVERAGE or method.order == EQUATION_17

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        features, stats = apply(params, state.stats, batch.inputs, train=True)
        if solve_first:
            head = cfll.get_state(state.opt_state)
            loss, solution = rule_of(method, hyper).loss(features, batch.targets, head)
            return loss, (stats, solution)
        outputs = cfll.get_head(params, HEAD)(features)
        return LOSSES[method.loss](outputs, batch.targets), (stats, None)

    (loss, (stats, solution)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    keywords: dict[str, Any] = {}
    if solve_first:
        keywords = {"solution": solution}
    elif method.head in RULES:
        solved_on = following if method.order == ALGORITHM_2 else batch

        def feature_fn(params: Any) -> jax.Array:
            return apply(params, state.stats, solved_on.inputs, train=True)[0]

        keywords = {"targets": solved_on.targets, "feature_fn": feature_fn}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **keywords)
    return State(optax.apply_updates(state.params, updates), stats, opt_state), loss


def first_head(method: Method, apply: ApplyFn, hyper: Hyper, state: State, batch: Batch) -> State:
    """Lines 3 and 4 of Algorithm 2: fit the head on the first batch, before the first step."""
    features, _ = apply(state.params, state.stats, batch.inputs, train=True)
    head = cfll.get_state(state.opt_state)
    solution = rule_of(method, hyper).solve(features, batch.targets, head)
    params = cfll.set_head(state.params, HEAD, solution.head)
    return State(params, state.stats, transformation(method, hyper).init(params))


def outputs(apply: ApplyFn, state: State, inputs: Any) -> jax.Array:
    """What a trained network says, in evaluation mode."""
    features, _ = apply(state.params, state.stats, inputs, train=False)
    return cfll.get_head(state.params, HEAD)(features)


def l2_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over samples, sum over outputs."""
    return jnp.mean(jnp.sum(jnp.square(targets - outputs), axis=-1))


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over samples; targets one-hot."""
    return jnp.mean(optax.safe_softmax_cross_entropy(outputs, targets))


LOSSES = {"l2": l2_loss, "cross entropy": cross_entropy}


def _only_head(params: Any) -> Any:
    return {name: name == HEAD for name in params}
