"""imagenet: NFNet-F0 on ImageNet, Figure 8 of the paper.

A thousand classes as one-hot targets: a squared loss by SGD, cross entropy by SGD, and the squared
loss with a closed-form head, by ridge and by the proximal rule (Algorithm 1). Everything else is
the recipe of NFNet-F0. `make_step` holds the four training steps: read it first.

Top of the benchmarks: one experiment, one command. Two presets run the same code. "paper" has the
sizes of the paper and needs an accelerator per few hundred images of the batch; "cpu" has a small
network on small images, but features and outputs, and so the solve, of the true size.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from rich.console import Console

import cfll
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Record, Records, name_of
from benchmarks.data import augment, image_folder
from benchmarks.data.image_folder import Batch, Splits
from benchmarks.models.nfnet import NFNet
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Claim, Summary, Table, show

# The recipe ---------------------------------------------------------------------------------------

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
    """Sizes.

    Attributes:
      model: the network; its head has one output per class.
      train_size, eval_size: of images, in pixels.
      batch_size: images per step.
      epochs: passes over the training images.
      warmup_epochs: of them with a growing rate, before the cosine decay.
    """

    model: NFNet
    train_size: int
    eval_size: int
    batch_size: int
    epochs: int
    warmup_epochs: int


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
    """A row of the table at one rate.

    Attributes:
      method: of `METHODS`.
      rate: peak learning rate for a batch of `REFERENCE_BATCH` images.
    """

    method: str
    rate: float


class Plan(NamedTuple):
    """Everything that determines the results.

    Attributes:
      name: of the preset.
      preset: sizes.
      lam: for a batch of `REFERENCE_BATCH` images.
      beta: for every batch.
      seed: of initialization, order, crops and augmentation.
      data: a fingerprint of the images.
    """

    name: str
    preset: Preset
    lam: float
    beta: float
    seed: int
    data: dict[str, int | str]

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


# Training steps -----------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """What a step carries.

    Attributes:
      params, opt_state: as everywhere.
      ema: moving average of the parameters.
      step: number of steps taken, int32.
    """

    params: Any
    opt_state: Any
    ema: Any
    step: jax.Array


Step = Callable[..., tuple[TrainState, jax.Array]]  # state, images, targets


def squared_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over images, sum over classes."""
    return jnp.mean(jnp.sum(jnp.square(outputs - targets), axis=-1))


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over images."""
    return jnp.mean(optax.softmax_cross_entropy(outputs, targets))


def make_step(model: NFNet, method: str, tx: Any, seed: int) -> Step:
    """The training step of a method, jitted.

    Both closed-form methods are Algorithm 1: the backbone moves with the old head, then the
    transformation solves for the head on the new features, in float32. It sees them as the loss
    does, with the same features dropped and the same branches left out: it minimizes that loss.

    Args:
      model: the network.
      method: of `METHODS`.
      tx: its optimizer, see `transformation`.
      seed: of dropout and stochastic depth.

    Returns:
      (state, images, targets) -> (state, loss); images uint8, (n, size, size, 3); targets float32,
      (n, classes).
    """
    loss_of = cross_entropy if method == CROSS_ENTROPY else squared_loss

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
    rules = {
        RIDGE: cfll.ridge(plan.beta),
        PROXIMAL: cfll.prox(plan.lam * plan.scale),
    }
    optimizer = sgd(schedule)
    if config.method not in CLOSED_FORM:
        return optimizer
    return cfll.closed_form(optimizer, rules[config.method], head="head")


def init_state(params: Any, method: str, tx: Any) -> TrainState:
    """The state before the first step.

    Args:
      params: the same for all methods; closed-form heads start at zero, as in the paper.
      method: of `METHODS`.
      tx: its optimizer.
    """
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


# Data ---------------------------------------------------------------------------------------------


def mixed_batches(
    batches: Iterator[Batch], plan: Plan, epoch: int, workers: int
) -> Iterator[Batch]:
    """Smooth labels to targets, mix images, then RandAugment every one of them.

    Args:
      batches: images and labels.
      plan: its seed and the epoch determine all draws.
      epoch: from 0.
      workers: threads.

    Yields:
      uint8 images, (n, size, size, 3), and float32 targets, (n, classes).
    """

    def augmented(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(augment.rand_augment(Image.fromarray(pixels), rng))

    with ThreadPoolExecutor(workers) as pool:
        for number, (images, labels) in enumerate(batches):
            rng = np.random.default_rng([plan.seed, epoch, image_folder.AUGMENTATION, number])
            targets = augment.soft_targets(labels, plan.preset.model.num_outputs)
            images, targets = augment.mix(images, targets, rng)
            yield np.stack(list(pool.map(augmented, images, rng.spawn(len(images))))), targets


def accuracies(
    count_correct: Callable[..., jax.Array], candidates: tuple[Any, ...], batches: Iterator[Batch]
) -> list[float]:
    """Top-1 accuracy of several parameter trees on the same images, each read once.

    Args:
      count_correct: (params, images, labels) -> number of hits.
      candidates: parameter trees.
      batches: images and labels, `image_folder.PADDING` where there is no image.
    """
    correct, total = np.zeros(len(candidates)), 0
    for images, labels in batches:
        # Not summed on the device: float32 would lose count of large sets.
        correct += [int(count_correct(params, images, labels)) for params in candidates]
        total += int((labels != image_folder.PADDING).sum())
    return (correct / total).tolist()


# Running ------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What is measured after every epoch, float64 arrays of shape (epochs,), NaN if not reached.

    Attributes:
      top1, ema_top1: accuracy on `val`, of the parameters and of their moving average.
      seconds: median seconds per step, reading not included.
    """

    top1: np.ndarray
    ema_top1: np.ndarray
    seconds: np.ndarray


class Runner:
    """Trains configurations on one data set, from the last checkpoint if there is one.

    Batches are split over all local devices, parameters are replicated.

    Args:
      plan: what.
      splits: the images.
      out: folder of the checkpoints.
      workers: reading threads.

    Raises:
      ValueError: if the batch does not fit the devices or the data, or the classes the head.
    """

    def __init__(self, plan: Plan, splits: Splits, out: Path, workers: int):
        devices = jax.local_devices()
        preset = plan.preset
        if preset.batch_size % len(devices):
            raise ValueError(
                f"--batch-size {preset.batch_size} cannot be split evenly over {len(devices)} "
                "devices: choose a multiple."
            )
        if plan.steps_per_epoch == 0:
            raise ValueError(
                f"{len(splits.train.files)} training images do not fill a batch: choose a "
                f"--batch-size below {preset.batch_size}."
            )
        if len(splits.classes) > preset.model.num_outputs:
            raise ValueError(
                f"{len(splits.classes)} classes in train, but the head has "
                f"{preset.model.num_outputs} outputs: point --data at ImageNet's thousand or fewer."
            )
        if not 0 <= preset.warmup_epochs < preset.epochs:
            raise ValueError(
                f"{preset.warmup_epochs} warm-up epochs of {preset.epochs}: choose fewer "
                "(--warmup-epochs) or more --epochs."
            )
        self._plan, self._splits, self._out, self._workers = plan, splits, out, workers
        mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("batch"))

        @jax.jit
        def init(key):
            images = jnp.zeros((1, preset.train_size, preset.train_size, 3))
            return preset.model.init(key, images)["params"]

        @jax.jit
        def count_correct(params, images, labels):
            outputs: Any = preset.model.apply({"params": params}, augment.normalize(images))
            return jnp.sum(jnp.argmax(outputs, axis=-1) == labels)

        self._init, self._count_correct = init, count_correct

    def run(self, config: Config, progress: SweepProgress) -> tuple[TrainState, Record]:
        """Train to the end, or until the loss is not finite.

        Args:
          config: what.
          progress: told about every step.

        Returns:
          The last state and what goes on record.
        """
        plan, preset = self._plan, self._plan.preset
        tx = transformation(plan, config)
        step = make_step(preset.model, config.method, tx, plan.seed)
        state = init_state(self._init(jax.random.key(plan.seed)), config.method, tx)
        state = jax.device_put(state, self._replicated)
        curve = Curve(*np.full((3, preset.epochs), np.nan))
        loss = 0.0
        with checkpoints(self._out / "checkpoints" / name_of(plan.key(config))) as manager:
            state, curve, done = restore(manager, state, curve)
            progress.start(label_of(config, plan), plan.num_steps - done * plan.steps_per_epoch)
            for epoch in range(done, preset.epochs):
                seconds = []
                for images, targets in self._train_batches(epoch):
                    batch = jax.device_put((images, targets), self._split)
                    start = time.perf_counter()
                    state, device_loss = step(state, *batch)
                    loss = float(device_loss)  # waits for the step: dispatch is asynchronous
                    seconds.append(time.perf_counter() - start)
                    progress.step(loss)
                    if not math.isfinite(loss):
                        break
                if not math.isfinite(loss):
                    break
                measured = self._accuracies(state)
                # The first step of a process compiles.
                skipped = epoch == done and len(seconds) > 1
                for values, value in zip(
                    curve, (*measured, np.median(seconds[int(skipped) :])), strict=True
                ):
                    values[epoch] = value
                save(manager, state, curve, epoch + 1)
        reached = int(np.isfinite(curve.top1).sum())
        return state, {
            "steps": [plan.steps_per_epoch * (epoch + 1) for epoch in range(reached)],
            "top1": curve.top1[:reached].tolist(),
            "ema_top1": curve.ema_top1[:reached].tolist(),
            "seconds_per_step": float(np.median(curve.seconds[:reached])) if reached else None,
            "diverged": not math.isfinite(loss),
        }

    def _train_batches(self, epoch: int) -> Iterator[Batch]:
        preset = self._plan.preset
        batches = image_folder.train_batches(
            self._splits.train,
            size=preset.train_size,
            batch_size=preset.batch_size,
            seed=self._plan.seed,
            epoch=epoch,
            workers=self._workers,
        )
        return image_folder.prefetch(mixed_batches(batches, self._plan, epoch, self._workers))

    def _accuracies(self, state: TrainState) -> list[float]:
        batches = image_folder.eval_batches(
            self._splits.val,
            size=self._plan.preset.eval_size,
            batch_size=self._plan.preset.batch_size,
            workers=self._workers,
        )
        on_devices = (
            jax.device_put(batch, self._split) for batch in image_folder.prefetch(batches)
        )
        return accuracies(self._count_correct, (state.params, state.ema), on_devices)


def label_of(config: Config, plan: Plan) -> str:
    """A run in the progress bar."""
    return f"{config.method:<13} rate {config.rate:<5.4g} {plan.num_steps:>6} steps"


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, a context manager.

    Only the last is kept, and only a complete one counts. Saving waits until all is written: the
    next step gives the arrays' memory away.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, curve: Curve, epoch: int) -> None:
    """Write everything that the run needs to go on after `epoch` epochs."""
    tree = {**state._asdict(), "curve": curve._asdict(), "epoch": np.asarray(epoch)}
    manager.save(epoch, args=ocp.args.StandardSave(tree))


def restore(
    manager: ocp.CheckpointManager, state: TrainState, curve: Curve
) -> tuple[TrainState, Curve, int]:
    """What `save` has written last, or the arguments and 0."""
    if manager.latest_step() is None:
        return state, curve, 0
    like = {**state._asdict(), "curve": curve._asdict(), "epoch": np.asarray(0)}
    tree: Any = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    epoch, curve = int(tree.pop("epoch")), Curve(**tree.pop("curve"))
    return TrainState(**tree), curve, epoch


def imagenet(
    preset: PresetName = "cpu",
    data: Path | None = None,
    out: Path = Path("benchmarks/out/imagenet"),
    methods: tuple[Method, ...] = METHODS,
    rates: tuple[float, ...] = (),
    lam: float = 1e4,
    beta: float = 0.01,
    batch_size: int | None = None,
    epochs: int | None = None,
    warmup_epochs: int | None = None,
    seed: int = 0,
    workers: int = 2 * (os.cpu_count() or 1),
) -> None:
    """Train NFNet-F0 on ImageNet with cross entropy, a squared loss and closed-form heads (Fig. 8).

    Reads images from folders by class and prints a table of accuracies on the validation images.
    Stop it when you like: the same command goes on from the last epoch.

    Args:
      preset: "paper" for the sizes of the paper, "cpu" for a small network on small images.
      data: folder with train/<class>/*.JPEG and val/<class>/*.JPEG, the layout of ImageNet; sets of
        fewer classes in the same layout do as well.
      out: folder for results, checkpoints and figures.
      methods: rows of the table.
      rates: peak learning rates to try with every method, for a batch of 4096 images, e.g. the
        paper's 0.1 1 1.6 2 5; if none, the paper's best of each method.
      lam: proximal coefficient, for a batch of 4096 images.
      beta: penalty of ridge.
      batch_size: images per step; rates and lam are scaled with it.
      epochs: passes over the training images.
      warmup_epochs: of them with a growing rate.
      seed: of initialization, order and augmentation.
      workers: threads that read images.
    """
    console = Console()
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "epochs": epochs,
        "warmup_epochs": warmup_epochs,
    }
    sizes = PRESETS[preset]._replace(**{k: v for k, v in given.items() if v is not None})
    try:
        splits = image_folder.open_image_folder(data)
        plan = Plan(preset, sizes, lam, beta, seed, image_folder.fingerprint(splits))
        runner = Runner(plan, splits, out, workers)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error

    records = Records(out / "imagenet.jsonl")
    configs = [Config(method, r) for method in methods for r in rates or (RATES[method],)]
    announce(records, plan, configs)
    with SweepProgress(console, len(configs)) as progress:
        for config in configs:
            key = plan.key(config)
            record, note = records.get(key), "from disk"
            if record is None:
                _, record = runner.run(config, progress)
                records.add(key, record)
                note = "diverged" if record["diverged"] else "trained"
            top1 = _percent(record["top1"])
            progress.finish(f"{label_of(config, plan)}  top-1 {top1:<8} {note}")
    show(console, summarize(records, out, preset))


# Results ------------------------------------------------------------------------------------------


def announce(records: Records, plan: Plan, configs: list[Config]) -> None:
    """Note which runs belong to the preset's last call: `summarize` has no data to tell by."""
    key, runs = _announcement(plan.name), [plan.key(config) for config in configs]
    if records.get(key) != {"runs": json.loads(json.dumps(runs))}:
        records.add(key, {"runs": runs})


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """What the last call with a preset found, as far as its runs are finished.

    Args:
      records: of `imagenet`.
      figures: folder to draw into.
      preset: of which call.
    """
    keys = (records.get(_announcement(preset)) or {"runs": []})["runs"]
    runs = [(key, record) for key in keys if (record := records.get(key)) is not None]
    best = {
        method: max(
            (run for run in runs if run[0]["method"] == method), key=lambda run: _last(run[1])
        )
        for method in dict.fromkeys(key["method"] for key, _ in runs)
    }
    drawn = []
    curves = {method: record for method, (_, record) in best.items() if record["top1"]}
    if curves:
        drawn.append(draw(curves, figures / f"imagenet_{preset}.png"))
    return Summary(
        title="Figure 8: ImageNet, NFNet-F0",
        command=f"python -m benchmarks imagenet --preset {preset} --data FOLDER",
        setup=_setup(runs[0][0] if runs else None, preset),
        tables=[_table(best)] if best else [],
        claims=_claims(runs, best),
        figures=drawn,
    )


def draw(curves: dict[str, Record], path: Path) -> Path:
    """Accuracy against steps, one panel for the parameters and one for their average.

    Args:
      curves: method -> record.
      path: the .png to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    panels = {"top1": "parameters", "ema_top1": "moving average of the parameters"}
    # One style per method, whichever of them are there.
    styles = dict(zip((CROSS_ENTROPY, PROXIMAL, SQUARED, RIDGE), plots.LINES, strict=False))
    with mpl.rc_context(plots.STYLE):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(10.5, 3.8), sharey=True, layout="constrained"
        )
        for axes, (field, title) in zip(grid, panels.items(), strict=True):
            for method, record in curves.items():
                marker = "o" if len(record["steps"]) < 3 else None  # a point is no line
                percent = 100 * np.array(record[field])
                axes.plot(record["steps"], percent, label=method, marker=marker, **styles[method])
            axes.set(title=title, xlabel="training steps")
            axes.set_xlim(left=0)
        grid[0].set_ylabel("top-1 accuracy on val (%)")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.savefig(path)
        plt.close(figure)
    return path


def _announcement(preset: str) -> Record:
    return {"what": "imagenet, last call", "preset": preset}


def _last(record: Record) -> float:
    """Final accuracy; a run that diverged is worse than any other."""
    return -1.0 if record["diverged"] or not record["top1"] else record["top1"][-1]


def _percent(accuracy: list[float]) -> str:
    return f"{100 * accuracy[-1]:.2f} %" if accuracy else "none"


def _shown(record: Record, field: str) -> str:
    return "diverged" if record["diverged"] else _percent(record[field])


def _is_figure_8(key: Record) -> bool:
    """Whether a run is large enough to decide a sentence about ImageNet; the batch may differ."""
    paper = PRESETS["paper"]
    return (
        key["data"]["classes"] == paper.model.num_outputs
        and key["model"] == repr(paper.model)
        and (key["train_size"], key["eval_size"]) == (paper.train_size, paper.eval_size)
        and key["epochs"] == paper.epochs
    )


def _table(best: dict[str, tuple[Record, Record]]) -> Table:
    def row(method: str, key: Record, record: Record) -> tuple[str, ...]:
        seconds = record["seconds_per_step"]
        return (
            method,
            _shown(record, "top1"),
            _shown(record, "ema_top1"),
            f"{seconds:.3g}" if seconds else "none",
            f"{key['rate']:.4g}",
        )

    return Table(
        caption="Top-1 accuracy on val at the end, of the parameters and of their moving average "
        "(EMA); median seconds per step, reading not included; the best peak rate of those tried, "
        f"for a batch of {REFERENCE_BATCH}.",
        headings=("method", "top-1", "EMA top-1", "s/step", "rate"),
        rows=tuple(row(method, *best[method]) for method in METHODS if method in best),
    )


def _claims(
    runs: list[tuple[Record, Record]], best: dict[str, tuple[Record, Record]]
) -> list[Claim]:
    large = all(_is_figure_8(key) for key, _ in runs)

    def claim(sentence: str, holds: bool, evidence: str) -> Claim:
        if large:
            return Claim(sentence, holds, evidence)
        return Claim(sentence, None, f"runs far smaller than the paper's do not decide; {evidence}")

    def compare(sentence: str, other: str, better: bool) -> Claim:
        if PROXIMAL not in best or other not in best:
            return Claim(sentence, None, f"needs runs of {PROXIMAL} and {other}")
        (_, ours), (_, theirs) = best[PROXIMAL], best[other]
        higher, lower = (ours, theirs) if better else (theirs, ours)
        return claim(
            sentence,
            _last(higher) > _last(lower),
            f"top-1 {_shown(ours, 'top1')} ({PROXIMAL}) and {_shown(theirs, 'top1')} ({other}); "
            f"EMA {_shown(ours, 'ema_top1')} and {_shown(theirs, 'ema_top1')}",
        )

    tried = {
        method: {key["rate"]: _last(record) for key, record in runs if key["method"] == method}
        for method in METHODS
    }
    sentence = (
        'Appendix E: "all the methods performed the best with alpha = 1.6 except for l2 loss which '
        'performed the best with alpha = 1"'
    )
    if all({1.0, 1.6} <= set(rates) for rates in tried.values()):
        winners = {method: max(rates, key=lambda r: rates[r]) for method, rates in tried.items()}
        evidence = "; ".join(
            f"{method}: {winners[method]:.4g} of {', '.join(f'{r:.4g}' for r in sorted(rates))}"
            for method, rates in tried.items()
        )
        best_rate = claim(sentence, winners == RATES, f"best rates: {evidence}")
    else:
        best_rate = Claim(sentence, None, "needs all methods at --rates 0.1 1 1.6 2 5")
    return [
        compare('Section 6: "our method achieves better performance than l2 loss"', SQUARED, True),
        compare('Section 6: "but under-performs Cross Entropy"', CROSS_ENTROPY, False),
        best_rate,
    ]


def _setup(key: Record | None, preset: str) -> str:
    common = (
        "SGD with Nesterov's momentum 0.9, weight decay 2e-5 on kernels, adaptive clipping 0.01, "
        "warm-up and cosine decay to zero; label smoothing 0.1, mixup 0.2 and cutmix on half a "
        "batch each, RandAugment 4 x 5; bfloat16 backbone, float32 head. Closed-form heads: "
        "Algorithm 1, from zero, neither decayed nor clipped; lam = 1e4 at a batch of 4096 and in "
        "proportion to it, beta = 0.01, unless set otherwise. One seed. As in the paper, the rate "
        "is chosen on `val`, which is also what is reported."
    )
    small = (
        " The network, the images and the number of epochs are far below the paper's: this preset "
        "shows that the code runs with a solve of the true size, not which method is better."
    )
    if key is None:
        return "No runs yet. " + common
    data = key["data"]
    sizes = (
        f"Data: {data['train']} training and {data['val']} validation images of {data['classes']} "
        f"classes, {key['train_size']} and {key['eval_size']} pixels. {key['epochs']} epochs, "
        f"{key['warmup_epochs']} of warm-up, at a batch of {key['batch_size']}. "
    )
    return sizes + common + (small if preset == "cpu" else "")
