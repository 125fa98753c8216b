"""Small networks, or a ResNet-18, on CIFAR-10, CIFAR-100 and Omniglot.

The preset "cpu" puts Omniglot's characters in the place of CIFAR-100: real images of many classes,
few drawings of each.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.core import tuner
from benchmarks.core.methods import AVERAGE, GRADIENT, PROXIMAL, RIDGE, Batch, Method
from benchmarks.core.problem import Data, Problem, network, starts
from benchmarks.data import cifar, omniglot
from benchmarks.models.cnn import CNN
from benchmarks.models.resnet import ResNet18

Preset = Literal["cpu", "paper"]
DataSet = Literal["cifar10", "cifar100", "omniglot"]


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset means for a data set."""

    model: Any  # the network
    epochs: int  # passes over the training images
    batch_sizes: tuple[int, ...]  # images per step
    # Of initialization and shuffling; the search runs on the first.
    seeds: tuple[int, ...] = (0, 1, 2)
    num_train: int | None = None  # training images, the first of the shuffled set; `None`: all
    # Test and validation images that curves and selection use; `None`: all.
    num_curve: int | None = None
    augmented: bool = False  # shifts and mirror images


PAPER_BATCH_SIZES = (32, 128, 1024, 4096)
SIZES: dict[tuple[str, str], Size] = {
    ("cifar10", "cpu"): Size(
        CNN(widths=(32, 64), patch=4), 8, (32, 128, 1024), num_train=10_000, num_curve=2500
    ),
    ("omniglot", "cpu"): Size(CNN(widths=(32, 64), patch=4, num_outputs=242), 20, (32, 128, 1024)),
    ("cifar10", "paper"): Size(ResNet18(), 100, PAPER_BATCH_SIZES, augmented=True),
    ("cifar100", "paper"): Size(ResNet18(num_outputs=100), 100, PAPER_BATCH_SIZES, augmented=True),
}

# Where searches begin, in the middle of the best rates of both data sets, as trials found them:
# gradient heads are good if they are slow, and stand lower rates if they are not.
START_RATES = {"SGD": 1.0, "Adam": 0.01, "Muon": 0.03}
START_RATES_LOW = {"SGD": 0.03, "Adam": 1e-3, "Muon": 1e-2}


def start_of(method: Method) -> tuple[float, ...]:
    """Where the search for a method's hyperparameters begins; it walks on from there."""
    rates = START_RATES_LOW if method.head in (GRADIENT, AVERAGE) else START_RATES
    return starts(rates, lam=100.0, beta=10.0, ratio=0.01)(method)


def start_by_axes(method: Method) -> tuple[float, ...]:
    """The same for the older search, of which the records of CIFAR-10 are."""
    rates = START_RATES_LOW | ({"SGD": 0.3} if method.head in (PROXIMAL, RIDGE) else {})
    return starts(rates, lam=100.0, beta=10.0, ratio=3.0)(method)


def searched(name: DataSet) -> str:
    """How the paper's comparisons were tuned, as a sentence."""
    return (tuner.BY_AXES if name == "cifar10" else tuner.JOINTLY).words


def load(name: DataSet, size: Size, folder: Path) -> Data:
    """Images, standardized, with one-hot classes."""
    parts: Any
    if name == "omniglot":
        parts = omniglot.load_omniglot(folder)
        prepare: Callable[[np.ndarray], np.ndarray] = np.asarray
    else:
        parts = {"cifar10": cifar.load_cifar10, "cifar100": cifar.load_cifar100}[name](folder)
        prepare = cifar.normalize
    num_classes = len(parts.names)
    if num_classes != size.model.num_outputs:
        raise SystemExit(
            f"{folder} has {num_classes} classes, this preset expects {size.model.num_outputs}."
        )

    def batch(images: Any, at_most: int | None) -> Batch:
        targets = np.eye(num_classes, dtype=np.float32)[images.labels[:at_most]]
        pictures = images.images[:at_most]
        return Batch(pictures if size.augmented else prepare(pictures), targets)

    def evaluated(images: Any, at_most: int | None) -> Batch:
        part = batch(images, at_most)
        return part._replace(inputs=prepare(part.inputs)) if size.augmented else part

    return Data(
        train=batch(parts.train, size.num_train),
        validation=evaluated(parts.validation, size.num_curve),
        test=evaluated(parts.test, size.num_curve),
        final=evaluated(parts.test, None) if size.num_curve else None,
    )


def augment(batch: Batch, rng: np.random.Generator) -> Batch:
    """Shift and mirror, then standardize."""
    return batch._replace(inputs=cifar.normalize(cifar.augment(batch.inputs, rng)))


def make_problem(name: DataSet, size: Size, folder: Path | None) -> Problem:
    """A data set as a `Problem`."""

    def read() -> Data:
        if folder is None:
            raise SystemExit(
                f"{name} is read from the folder of its official files: say where with --data."
            )
        return load(name, size, folder)

    return Problem(
        settings={
            "experiment": name,
            "model": repr(size.model),
            "num_train": size.num_train,
            "augmented": size.augmented,
        },
        epochs=lambda batch_size: size.epochs,
        load=read,
        network=partial(network, size.model),
        metric="accuracy",
        start=start_of,
        augment=augment if size.augmented else None,
    )


def many_classes(preset: str) -> DataSet:
    """The data set that stands for CIFAR-100."""
    return "omniglot" if preset == "cpu" else "cifar100"


def setup_of(name: DataSet, size: Size) -> str:
    """What was run, and what differs from the paper."""
    what = {
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
        "omniglot": "Omniglot in the place of CIFAR-100: 242 characters (small1 and small2 without "
        "their common ones), 12 / 4 / 4 drawings of each to train, validate and test",
    }[name]
    images = f", {size.num_train} training images" if size.num_train else ""
    return (
        f"{what}{images}, {size.epochs} epochs, `{type(size.model).__name__}` with "
        f"{256 if isinstance(size.model, CNN) else 8 * size.model.width} features, "
        f"{'shifts and mirror images' if size.augmented else 'no augmentation'}, Nesterov momentum "
        f"0.9, cosine decay, no weight decay. {searched(name)}; the best on seeds "
        f"{', '.join(map(str, size.seeds))}."
    )
