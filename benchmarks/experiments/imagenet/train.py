"""Training from a folder of images, checkpointed after every epoch."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from benchmarks.core import training
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Record, name_of
from benchmarks.data import augment, image_folder
from benchmarks.data.image_folder import Batch, Splits
from benchmarks.experiments.imagenet.recipe import (
    Config,
    Plan,
    TrainState,
    init_state,
    make_step,
    transformation,
)


def mixed_batches(
    batches: Iterator[Batch], plan: Plan, epoch: int, workers: int
) -> Iterator[Batch]:
    """Smooth labels to targets, mix images, then RandAugment every one of them.

    uint8 images, (n, size, size, 3), and float32 targets, (n, classes); the plan's seed and the
    epoch decide all draws.
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

    count_correct: (params, images, labels) -> hits; labels are `PADDING` where there is no image.
    """
    correct, total = np.zeros(len(candidates)), 0
    for images, labels in batches:
        # Not summed on the device: float32 would lose count of large sets.
        correct += [int(count_correct(params, images, labels)) for params in candidates]
        total += int((labels != image_folder.PADDING).sum())
    return (correct / total).tolist()


class Curve(NamedTuple):
    """What is measured after every epoch, float64 arrays of shape (epochs,), NaN if not reached."""

    # `top1`, `ema_top1`: accuracy on `val`, of the parameters and of their moving average.
    top1: np.ndarray
    ema_top1: np.ndarray
    seconds: np.ndarray  # median seconds per step, reading not included


class Trainer:
    """Trains configurations on one data set, from the last checkpoint if there is one.

    Batches are split over all local devices, parameters are replicated. Raises ValueError if the
    batch does not fit the devices or the data, or the classes the head.
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
        """Train until the end or divergence: the last state and what goes on record."""
        plan, preset = self._plan, self._plan.preset
        tx = transformation(plan, config)
        step = make_step(preset.model, config.method, tx, plan.seed)
        state = init_state(self._init(jax.random.key(plan.seed)), config.method, tx)
        state = jax.device_put(state, self._replicated)
        curve, diverged = Curve(*np.full((3, preset.epochs), np.nan)), False
        with checkpoints(self._out / "checkpoints" / name_of(plan.key(config))) as manager:
            state, curve, done = restore(manager, state, curve)
            progress.start(label_of(config, plan), plan.num_steps - done * plan.steps_per_epoch)
            for epoch in range(done, preset.epochs):
                state, part = training.train(
                    step,
                    state,
                    self._train_batches(epoch),
                    error=self._accuracies,
                    measure_at={plan.steps_per_epoch},
                    on_step=progress.step,
                )
                diverged = isinstance(part.errors[0], float)
                if diverged:
                    break
                measured = (*part.errors[0], part.seconds_per_step)
                for values, value in zip(curve, measured, strict=True):
                    values[epoch] = value
                save(manager, state, curve, epoch + 1)
        reached = int(np.isfinite(curve.top1).sum())
        return state, {
            "steps": [plan.steps_per_epoch * (epoch + 1) for epoch in range(reached)],
            "top1": curve.top1[:reached].tolist(),
            "ema_top1": curve.ema_top1[:reached].tolist(),
            "seconds_per_step": float(np.median(curve.seconds[:reached])) if reached else None,
            "diverged": diverged,
        }

    def record(self, config: Config, progress: SweepProgress) -> Record:
        """What goes on record of a run."""
        return self.run(config, progress)[1]

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
        mixed = mixed_batches(batches, self._plan, epoch, self._workers)
        return self._on_devices(image_folder.prefetch(mixed))

    def _accuracies(self, state: TrainState) -> list[float]:
        batches = image_folder.eval_batches(
            self._splits.val,
            size=self._plan.preset.eval_size,
            batch_size=self._plan.preset.batch_size,
            workers=self._workers,
        )
        batches = self._on_devices(image_folder.prefetch(batches))
        return accuracies(self._count_correct, (state.params, state.ema), batches)

    def _on_devices(self, batches: Iterator[Batch]) -> Iterator[Any]:
        return (jax.device_put(batch, self._split) for batch in batches)


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
