"""CIFAR-10 and CIFAR-100 from their official "python version" folders.

Images stay uint8 until a batch is made: augment it, then normalize it.

The official files are pickles, which can run code: read only those of the official archive.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.data.files import require

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html (python version)"
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2023, 0.1994, 0.2010], np.float32)
"""By channel, on a scale from 0 to 1: the usual recipe's for CIFAR-10, used for both sets. The
deviation is the mean of those within an image; that of all pixels is 1.2 times as much."""


class Images(NamedTuple):
    """Images with their class."""

    images: np.ndarray  # (n, 32, 32, 3) uint8, red, green, blue
    labels: np.ndarray  # (n,) int32


class Cifar(NamedTuple):
    """The three parts."""

    train: Images  # 80 % of the official training set
    validation: Images  # the other 20 %
    test: Images  # the official test set
    names: tuple[str, ...]  # of the classes; their number is o


def load_cifar10(folder: Path, seed: int = 0) -> Cifar:
    """CIFAR-10: 40,000 / 10,000 / 10,000 images of 10 classes; the seed splits."""
    folder = _inner(folder, "cifar-10-batches-py")
    batches = [_read(folder / f"data_batch_{i}", b"labels") for i in range(1, 6)]
    train = Images(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    names = _names(folder / "batches.meta", b"label_names")
    return _split(train, _read(folder / "test_batch", b"labels"), names, seed)


def load_cifar100(folder: Path, seed: int = 0) -> Cifar:
    """CIFAR-100 with its fine labels: 40,000 / 10,000 / 10,000 images of 100 classes."""
    folder = _inner(folder, "cifar-100-python")
    train, test = (_read(folder / name, b"fine_labels") for name in ("train", "test"))
    return _split(train, test, _names(folder / "meta", b"fine_label_names"), seed)


def normalize(images: np.ndarray) -> np.ndarray:
    """Subtract the mean and divide by the deviation of each channel of uint8 images (..., 3)."""
    return images * (1 / (255 * STD)) - MEAN / STD


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift by up to 4 pixels in both directions, black from outside, and mirror half of them."""
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    top, left = rng.integers(0, 9, (2, n))
    mirrored = np.less(rng.random(n), 0.5)
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _inner(folder: Path, name: str) -> Path:
    return folder if folder.name == name else folder / name


def _load(path: Path) -> dict[bytes, list]:
    layout = "a pickled dict of the official archive, extracted and not renamed"
    with require(path, layout, SOURCE).open("rb") as file:
        return pickle.load(file, encoding="bytes")


def _read(path: Path, labels: bytes) -> Images:
    content = _load(path)
    rows = np.asarray(content[b"data"], np.uint8)  # channel by channel, each in reading order
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(images), np.asarray(content[labels], np.int32))


def _names(path: Path, key: bytes) -> tuple[str, ...]:
    return tuple(name.decode() for name in _load(path)[key])


def _split(train: Images, test: Images, names: tuple[str, ...], seed: int) -> Cifar:
    order = np.random.default_rng(seed).permutation(len(train.labels))
    num_train = len(order) * 4 // 5
    kept, held_out = (Images(*(v[part] for v in train)) for part in np.split(order, [num_train]))
    return Cifar(kept, held_out, test, names)
