"""Omniglot: handwritten characters of many alphabets, few drawings of each; a real many-class set.

Reads the official archives as they are, or extracted. Every character was drawn by 20 people;
drawings are split by drawer, so all classes occur in every part.
"""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.data.files import require

LAYOUT = (
    "the official .zip files (images_background.zip, images_background_small1.zip, ...) or "
    "extracted folders, images_*/Alphabet/characterNN/NNNN_DD.png"
)
SOURCE = "https://github.com/brendenlake/omniglot (python folder)"
SIDE = 28
NUM_DRAWERS = 20
DRAWING = re.compile(r"([^/]+)/([^/]+)/\d+_(\d+)\.png$")


class Drawings(NamedTuple):
    """Drawings with their class."""

    images: np.ndarray  # ink 1, paper 0, (n, 28, 28, 1) float32
    labels: np.ndarray  # class, (n,) int32
    drawer: np.ndarray  # 0 .. 19 within an alphabet, (n,) int32.


class Omniglot(NamedTuple):
    """The three parts."""

    train: Drawings  # 12 drawings of each class
    validation: Drawings  # 4 drawings of each class
    test: Drawings  # 4 drawings of each class
    names: tuple[str, ...]  # of the classes, "Alphabet/characterNN"; their number is o


def load_omniglot(path: Path, seed: int = 0) -> Omniglot:
    """All characters in a .zip, an extracted folder or a folder of several, split by drawer."""
    drawings, names = read_omniglot(path)
    order = np.random.default_rng(seed).permutation(NUM_DRAWERS)

    def part(drawers: np.ndarray) -> Drawings:
        chosen = np.isin(drawings.drawer, drawers)
        return Drawings(*(values[chosen] for values in drawings))

    return Omniglot(part(order[:12]), part(order[12:16]), part(order[16:]), names)


def read_omniglot(path: Path) -> tuple[Drawings, tuple[str, ...]]:
    """All drawings found, by class and drawer, and the names of the classes.

    The official sets overlap: small1 and small2 share two alphabets, Greek and Latin, file by file.
    A character is known by its alphabet and number, so it is one class however often it is found.
    """
    require(path, LAYOUT, SOURCE)
    # By class and drawer: a drawing that two archives have is decoded once.
    found: dict[tuple[str, int], np.ndarray] = {}
    for name, content in _png_files(path):
        match = DRAWING.search(name)
        if match is not None:
            key = f"{match[1]}/{match[2]}", int(match[3]) - 1
            if key not in found:
                found[key] = _decode(content)
    if not found:
        raise FileNotFoundError(
            f"No drawings in {path}. Expected: {LAYOUT}. Public copy: {SOURCE}. "
            "Get it once and say where it is with --data FOLDER; nothing is downloaded here."
        )
    keys = sorted(found)
    names = tuple(sorted({name for name, _ in keys}))
    label = {name: index for index, name in enumerate(names)}
    drawings = Drawings(
        images=np.stack([found[key] for key in keys])[..., None],
        labels=np.array([label[name] for name, _ in keys], np.int32),
        drawer=np.array([drawer for _, drawer in keys], np.int32),
    )
    return drawings, names


def _png_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the drawings in an archive, or in a folder of archives and folders."""
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    yield name, archive.read(name)
        return
    for archive_path in sorted(path.glob("*.zip")):
        if "omniglot" in archive_path.name or archive_path.name.startswith("images_"):
            yield from _png_files(archive_path)
    for file in sorted(path.rglob("*.png")):
        yield file.as_posix(), file.read_bytes()


def _decode(content: bytes) -> np.ndarray:
    """Ink as the mean over the area of a pixel, (28, 28) float32."""
    image = Image.open(io.BytesIO(content)).convert("L")
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return 1 - np.asarray(small, np.float32) / 255
