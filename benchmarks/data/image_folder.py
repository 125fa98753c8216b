"""Images in folders by class, the official layout of ImageNet, read by threads.

    train/<class>/*.JPEG        val/<class>/*.JPEG

A class is numbered by the alphabetical rank of its folder under `train`, for ImageNet of its
WordNet identifier.

What is read depends on the seed, the epoch and the image's number alone, not on the threads: a
resumed run sees the images that the interrupted one would have seen.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

LAYOUT = "train/<class>/*.JPEG and val/<class>/*.JPEG"
SUFFIXES = {".jpeg", ".jpg", ".png"}
PADDING = -1  # the label of rows that fill the last batch of an evaluation

# Which purpose a random stream serves: streams of different purposes must differ.
CROPS, ORDER, AUGMENTATION = range(3)

Batch = tuple[np.ndarray, np.ndarray]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
T = TypeVar("T")


class Images(NamedTuple):
    """The files of a split."""

    files: list[str]  # paths as strings; a million `Path`s would take half a gigabyte
    labels: np.ndarray  # numbers of their classes, int32, (files,)


class Splits(NamedTuple):
    """What a folder holds."""

    train: Images  # the two official splits
    val: Images
    classes: list[str]  # names by number


def open_image_folder(folder: Path | None) -> Splits:
    """Files and labels of the folders `train` and `val`, by class and name; reads no image.

    Raises FileNotFoundError, which names the place, the layout and `--data`, and ValueError if
    `val` has classes that `train` has not.
    """
    if folder is None:
        raise FileNotFoundError(f"No images given: pass --data FOLDER, where FOLDER has {LAYOUT}.")
    for needed in (folder, folder / "train", folder / "val"):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"There is no folder {needed}. Point --data at a folder with {LAYOUT}. (The "
                "official archive of the validation images is flat: sort them into a folder per "
                "class first.)"
            )
    classes = _subfolders(folder / "train")
    unknown = sorted(set(_subfolders(folder / "val")) - set(classes))
    if unknown:
        raise ValueError(
            f"{folder / 'val'} has {len(unknown)} classes that {folder / 'train'} has not, e.g. "
            f"{unknown[0]}: both need the same class folders. Point --data at a folder with "
            f"{LAYOUT}."
        )
    return Splits(_list(folder / "train", classes), _list(folder / "val", classes), classes)


def fingerprint(splits: Splits) -> dict[str, int | str]:
    """Numbers and a hash of the files' names: tells data sets apart without reading them."""
    names = hashlib.sha256()
    for images in (splits.train, splits.val):
        for file, label in zip(images.files, images.labels, strict=True):
            names.update(f"{label}/{Path(file).name}\n".encode())
    return {
        "classes": len(splits.classes),
        "train": len(splits.train.files),
        "val": len(splits.val.files),
        "names": names.hexdigest()[:12],
    }


def train_batches(
    images: Images, *, size: int, batch_size: int, seed: int, epoch: int, workers: int
) -> Iterator[Batch]:
    """One epoch, shuffled, randomly cropped and flipped; the remainder is left out.

    Pixels, uint8, (batch, size, size, 3), and labels, int32, (batch,); seed and epoch decide all.
    """

    def read(index: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch, CROPS, index])
        pixels = read_box(images.files[index], lambda w, h: random_box(w, h, rng), size)
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    order = np.random.default_rng([seed, epoch, ORDER]).permutation(len(images.files))
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield np.stack(list(pool.map(read, chosen.tolist()))), images.labels[chosen]


def eval_batches(images: Images, *, size: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """Every image once, its centre, in order.

    The last batch is filled with blank images of label `PADDING`, so that all have one shape.
    """
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images.files), batch_size):
            files = images.files[start : start + batch_size]
            pixels = np.zeros((batch_size, size, size, 3), np.uint8)
            labels = np.full(batch_size, PADDING, np.int32)
            pixels[: len(files)] = list(pool.map(lambda f: read_box(f, centre_box, size), files))
            labels[: len(files)] = images.labels[start : start + batch_size]
            yield pixels, labels


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Make the next items in a thread while the caller works on this one."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, iterator, end) for _ in range(ahead))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, iterator, end))
                yield item  # type: ignore[misc]  # not the sentinel
        finally:  # the caller may stop early
            for future in waiting:
                future.cancel()


def read_box(file: str, box_of: Callable[[int, int], Box], size: int) -> np.ndarray:
    """Cut a box out of an image and scale it, bicubically; uint8, (size, size, 3).

    box_of: width and height of the image, in pixels -> what to cut out. Raises OSError, with the
    file's name, if this is not an image.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            left, top, right, bottom = box_of(width, height)
            # JPEGs can be decoded at a half, a quarter or an eighth of their size, which is much
            # faster: as small as leaves a pixel of the box for each pixel of the result.
            shrink = min((right - left) / size, (bottom - top) / size)
            if shrink >= 2:
                image.draft("RGB", (math.ceil(width / shrink), math.ceil(height / shrink)))
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
            return np.asarray(resized)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNGs
        raise OSError(f"{file} cannot be read as an image: {error}") from error


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A box of 8 to 100 % of the area and of aspect ratio 3/4 to 4/3, anywhere in the image."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return centre_box(width, height)  # a long strip, in which few such boxes fit


def centre_box(width: int, height: int) -> Box:
    """The middle 8/9 of both sides.

    As the evaluation of NFNets, which scales images to 288 x 288 pixels, whatever their aspect
    ratio, and keeps the middle 256 x 256.
    """
    return width / 18, height / 18, width * 17 / 18, height * 17 / 18


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _list(folder: Path, classes: list[str]) -> Images:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            found = sorted(
                f.name for f in (folder / name).iterdir() if f.suffix.lower() in SUFFIXES
            )
            files += [f"{folder / name}/{file}" for file in found]
            labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(
            f"There are no images in {folder}. Point --data at a folder with {LAYOUT}."
        )
    return Images(files, np.array(labels, np.int32))
