"""The recipe of NFNet-F0 on ImageNet, and the four training steps: read `make_step` first.

Everything but the head is the same for a squared loss by SGD, cross entropy by SGD, and the squared
loss with a closed-form head, by ridge and by the proximal rule (Algorithm 1). Two presets: "paper"
needs an accelerator per few hundred images of the batch; "cpu" has a small network on small images,
but features and outputs, and so the solve, of the true size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

import cfll
from benchmarks.core.methods import LOSSES
from benchmarks.core.records import Record
from benchmarks.data import augment
from benchmarks.models.nfnet import NFNet

SQUARED, CROSS_ENTROPY = "l2", "cross entropy"
RIDGE, PROXIMAL = "ridge", "proximal"
Method = Literal["l2", "cross entropy", "ridge", "proximal"]
METHODS: tuple[Method, ...] = get_args(Method)
CLOSED_FORM = (RIDGE, PROXIMAL)

# The best of the paper's sweep (Appendix E), for batches of 4096 images. For others, rates are
# scaled in proportion, as NFNets do, and lam, because it competes with a sum over the batch. Not
# beta: at 2e-5 instead of 0.01, a batch of 8 images was singular to float32, and the solve took the
# QR route (measured on two busy cores, d = 3072: 11 s per step instead of 0.07 s).
RATES = {SQUARED: 1.0, CROSS_ENTROPY: 1.6, RIDGE: 1.6, PROXIMAL: 1.6}
REFERENCE_BATCH = 4096

MOMENTUM, WEIGHT_DECAY = 0.9, 2e-5
CLIPPING, CLIPPING_EPS = 0.01, 1e-3  # of a gradient's norm to its unit's; floor of the latter
EMA_DECAY = 0.99999

PresetName = Literal["cpu", "paper"]


class Preset(NamedTuple):
    """Sizes."""

    model: NFNet  # the network; its head has one output per class
    train_size: int  # of images, in pixels; likewise `eval_size`
    eval_size: int
    batch_size: int  # images per step
    epochs: int  # passes over the training images
    warmup_epochs: int  # of them with a growing rate, before the cosine decay


PRESETS: dict[str, Preset] = {
    "paper": Preset(NFNet(), 192, 256, batch_size=4096, epochs=360, warmup_epochs=5),
    "cpu": Preset(
        NFNet(depths=(1, 1, 2, 1), widths=(32, 64, 128, 128), group_width=16, stem=(8, 8, 16, 16)),
        train_size=64,
        eval_size=64,
        batch_size=64,
        epochs=10,
        warmup_epochs=1,
    ),
}


class Config(NamedTuple):
    """A row of the table at one rate."""

    method: str  # of `METHODS`
    rate: float  # peak learning rate for a batch of `REFERENCE_BATCH` images


class Plan(NamedTuple):
    """Everything that determines the results."""

    name: str  # of the preset
    preset: Preset  # sizes
    lam: float  # for a batch of `REFERENCE_BATCH` images
    beta: float  # for every batch
    seed: int  # of initialization, order, crops and augmentation
    data: dict[str, int | str]  # a fingerprint of the images

    @property
    def scale(self) -> float:
        return self.preset.batch_size / REFERENCE_BATCH

    @property
    def steps_per_epoch(self) -> int:
        return int(self.data["train"]) // self.preset.batch_size

    @property
    def num_steps(self) -> int:
        return self.preset.epochs * self.steps_per_epoch

    def key(self, config: Config) -> Record:
        """Of a finished run."""
        preset = self.preset._asdict()
        penalty = {RIDGE: {"beta": self.beta}, PROXIMAL: {"lam": self.lam}}
        return {
            "what": "imagenet",
            "preset": self.name,
            **config._asdict(),
            **penalty.get(config.method, {}),
            **preset,
            "model": repr(preset["model"]),
            "seed": self.seed,
            "data": self.data,
            "sgd": [MOMENTUM, WEIGHT_DECAY, CLIPPING, CLIPPING_EPS, EMA_DECAY],
            "augmentation": [
                augment.RAND_AUGMENT_LAYERS,
                augment.RAND_AUGMENT_MAGNITUDE,
                augment.MIXUP_ALPHA,
                augment.LABEL_SMOOTHING,
            ],
        }


class TrainState(NamedTuple):
    """What a step carries."""

    params: Any  # as everywhere, and `opt_state`
    opt_state: Any
    ema: Any  # moving average of the parameters
    step: jax.Array  # number of steps taken, int32


Step = Callable[..., tuple[TrainState, jax.Array]]  # state, images, targets


def make_step(model: NFNet, method: str, tx: Any, seed: int) -> Step:
    """The jitted training step of a method: (state, images, targets) -> (state, loss).

    Images are uint8, (n, size, size, 3), targets float32, (n, classes). Both closed-form methods
    are Algorithm 1: the backbone moves with the old head, then the transformation solves for the
    head on the new features, in float32. It sees them as the loss does, with the same features
    dropped and the same branches left out: it minimizes that loss.
    """
    loss_of = LOSSES["cross entropy" if method == CROSS_ENTROPY else "l2"]

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, targets):
        pixels = augment.normalize(images)
        rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), state.step)}
        apply = partial(model.apply, train=True, rngs=rngs)

        def features_of(params):
            return apply({"params": params}, pixels, method="features")

        def loss_fn(params):
            outputs: Any = apply({"params": params}, pixels)
            return loss_of(outputs, targets)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        closed_form = {"targets": targets, "feature_fn": features_of}
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, **(closed_form if method in CLOSED_FORM else {})
        )
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, params, state.step)
        return TrainState(params, opt_state, ema, state.step + 1), loss

    return step


def moving_average(average: Any, params: Any, step: jax.Array) -> Any:
    """Exponential, with a decay that grows from 0.1 to `EMA_DECAY` over the first steps."""
    decay = jnp.minimum(EMA_DECAY, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def sgd(schedule: optax.Schedule) -> optax.GradientTransformation:
    """NFNet's optimizer: clip per unit, decay kernels, Nesterov's momentum.

    Optax clips as NFNets ask: the norms of a convolution are per output channel, over height, width
    and inputs; of a dense layer per output; of a gain, a bias or a scalar over the whole leaf. The
    head is not clipped, gains and biases do not decay. In a closed-form method neither sees the
    head: `cfll.closed_form` hides it.
    """
    return optax.chain(
        optax.masked(optax.adaptive_grad_clip(CLIPPING, CLIPPING_EPS), _is_backbone),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_is_kernel),
        optax.sgd(schedule, MOMENTUM, nesterov=True),
    )


def transformation(plan: Plan, config: Config) -> Any:
    """The optimizer of a run: SGD with warm-up and cosine decay, alone or with a rule."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.rate * plan.scale,
        warmup_steps=plan.preset.warmup_epochs * plan.steps_per_epoch,
        decay_steps=plan.num_steps,
    )
    rules = {RIDGE: cfll.ridge(plan.beta), PROXIMAL: cfll.prox(plan.lam * plan.scale)}
    optimizer = sgd(schedule)
    if config.method not in CLOSED_FORM:
        return optimizer
    return cfll.closed_form(optimizer, rules[config.method], head="head")


def init_state(params: Any, method: str, tx: Any) -> TrainState:
    """The state before the first step; closed-form heads start at zero, as in the paper."""
    if method in CLOSED_FORM:
        head = jax.tree.map(jnp.zeros_like, cfll.get_head(params, "head"))
        params = cfll.set_head(params, "head", head)
    # A copy: the step gives its arrays away, and each can be given away only once.
    return TrainState(params, tx.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0))


def _is_backbone(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: _name(keys[0]) != "head", tree)


def _is_kernel(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: _name(keys[-1]) == "kernel", tree)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
