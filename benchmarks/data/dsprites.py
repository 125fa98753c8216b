"""Instrumental variables on dSprites (Appendix E): what a heart's image does to an outcome.

    Y = f(X) + confounder(posY) + eps,   X = image + pixel noise,   Z = (scale, orientation, posX)

The vertical position moves both the image and the outcome, and is hidden. It is not in Z, so Z is
an instrument: regression of Y on X is biased, two stages through Z are not.

The images are the official ones (`read_hearts`) or drawn here (`render_hearts`), behind one
interface.

Units: latents as in dSprites (scale .5 to 1, orientation in radians, positions 0 to 1); one unit of
position is 32 pixels; outcomes are dimensionless.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.data.files import require

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
SOURCE = "https://github.com/google-deepmind/dsprites-dataset"
SIDE = 64
PIXELS = SIDE * SIDE
CLASSES = (6, 40, 32, 32)
"""Number of scales, orientations, horizontal and vertical positions."""

HEART = 2
NOISE = 0.1
NUM_VALIDATION = 100
PATCH = 24  # the largest heart is 22 pixels across, whatever its orientation

Hearts = Callable[[np.ndarray], np.ndarray]
"""Images by latent classes (scale, orientation, posX, posY): (n, 4) ints -> (n, 4096) float32.

They are 0 or 1. Pixels are in reading order (row * 64 + column, rows from the top)."""


class Train(NamedTuple):
    """What is observed, all float32."""

    treatment: np.ndarray  # X, noisy images, (n, 4096)
    instrument: np.ndarray  # Z, values of scale, orientation and posX, (n, 3)
    outcome: np.ndarray  # Y, (n, 1)


class Grid(NamedTuple):
    """Clean images and the truth, float32."""

    treatment: np.ndarray  # images, (n, 4096)
    structural: np.ndarray  # f of the images, (n, 1)


class IVData(NamedTuple):
    """Observations to train on, 100 points of the grid to select by, 488 to report."""

    train: Train
    validation: Grid
    test: Grid


def latent_values(classes: np.ndarray) -> np.ndarray:
    """Values of the latents of classes (scale, orientation, posX, posY), (n, 4), float64.

    Scale .5 to 1, orientation 0 to 2 pi (both ends are classes), positions 0 to 1.
    """
    lowest = np.array([0.5, 0, 0, 0])
    highest = np.array([1, 2 * np.pi, 1, 1])
    return lowest + classes / (np.array(CLASSES) - 1) * (highest - lowest)


def render_hearts() -> Hearts:
    """Hearts drawn from their equation, for want of the official file.

    The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, upright at orientation 0
    and turned counter-clockwise. Compared with published panels, 59 of 1101 pixels differ.
    """
    return _render


def _render(classes: np.ndarray) -> np.ndarray:
    images = np.zeros((len(classes), SIDE, SIDE), np.float32)
    for start in range(0, len(classes), 1024):  # bounds the memory of the float64 coordinates
        part = slice(start, start + 1024)
        scale, angle, x, y = latent_values(classes[part]).T[:, :, None, None]
        centre_x, centre_y = 16 + 32 * x, 16 + 32 * y
        # Only a patch around the centre is looked at: a seventh of the pixels.
        rows = np.floor(centre_y).astype(int) - PATCH // 2 + np.arange(PATCH)[:, None]
        columns = np.floor(centre_x).astype(int) - PATCH // 2 + np.arange(PATCH)
        right, up = columns + 0.5 - centre_x, centre_y - (rows + 0.5)
        unit = 0.63 * scale
        inside = _inside(
            (np.cos(angle) * right + np.sin(angle) * up) / unit,
            (np.cos(angle) * up - np.sin(angle) * right) / unit - 2.538,
        )
        which = np.arange(start, start + len(inside))[:, None, None]
        images[which, rows, columns] = inside
    return images.reshape(-1, PIXELS)


def _inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie inside the curve.

    A vertical line meets it at t and pi - t, that is at one sin t and at cos t = +-c. With the
    multiple angles written in cos t, the two heights are (4 - 2 c^2 - 8 c^4) +- (19 c - 8 c^3).
    """
    square = 1 - np.cbrt((x / 16) ** 2)
    c = np.sqrt(np.maximum(square, 0))
    return (square > 0) & (np.abs(y - 4 + 2 * c**2 + 8 * c**4) < 19 * c - 8 * c**3)


def read_hearts(path: Path) -> Hearts:
    """Hearts of the official .npz, or of the folder that it is in.

    The images are streamed and kept as bits, 126 MB: unpacked, the file is 3 GB. Raises
    FileNotFoundError; the returned function ValueError if the images asked for are not there.
    """
    if path.suffix != ".npz":
        path = path / FILE
    require(path, "the official .npz with imgs, latents_classes and latents_values", SOURCE)
    with np.load(path) as arrays:  # no pickles: the metadata is the only pickled member
        latents = arrays["latents_classes"]
    are_hearts = latents[:, 1] == HEART
    row = np.full(CLASSES, -1)
    row[tuple(latents[are_hearts, 2:].T)] = np.arange(are_hearts.sum())
    bits = np.empty((are_hearts.sum(), PIXELS // 8), np.uint8)

    filled = 0
    with zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        for start in range(0, len(latents), 4096):
            chosen = are_hearts[start : start + 4096]
            images = np.frombuffer(file.read(len(chosen) * PIXELS), np.uint8)
            packed = np.packbits(images.reshape(-1, PIXELS)[chosen], axis=1)
            bits[filled : filled + len(packed)] = packed
            filled += len(packed)

    def hearts(classes: np.ndarray) -> np.ndarray:
        rows = row[tuple(np.asarray(classes).T)]
        if (rows < 0).any():
            raise ValueError(
                f"{path} has no heart of (scale, orientation, posX, posY) classes "
                f"{classes[np.argmax(rows < 0)]}; take the complete official file."
            )
        return np.unpackbits(bits[rows], axis=1).astype(np.float32)

    return hearts


def structural(images: np.ndarray) -> np.ndarray:
    """Equation (46), what is to be learned: ((vec(B)^T X)^2 - 3000) / 500; (n, 4096) -> (n, 1)."""
    weights = np.abs(32 - np.arange(SIDE, dtype=np.float32)) / 32  # by column, equal in all rows
    return ((images @ np.tile(weights, SIDE))[:, None] ** 2 - 3000) / 500


def confounder_of(pos_y: np.ndarray) -> np.ndarray:
    """Equation (47), what the hidden variable adds: 32 (posY - 0.5), of the classes of posY."""
    return 32 * (pos_y / (CLASSES[3] - 1) - 0.5)


def make_iv(num_train: int, seed: int, hearts: Hearts) -> IVData:
    """Draw observations (the paper: 10,000); the grid and its split are the same for every seed.

    Hearts are `read_hearts(path)` or `render_hearts()`. The grid is 588 clean images: 100 to
    validate and 488 to test on.
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(CLASSES, size=(num_train, 4))
    treatment = hearts(classes)
    treatment += np.float32(NOISE) * rng.standard_normal(treatment.shape, np.float32)
    confounder = confounder_of(classes[:, 3:])
    noise = rng.normal(scale=0.5, size=(num_train, 1))  # 0.5 read as the standard deviation
    train = Train(
        treatment=treatment,
        instrument=latent_values(classes)[:, :3].astype(np.float32),
        # f of the noisy image: the treatment is what is seen, not what was drawn.
        outcome=(structural(treatment) + confounder + noise).astype(np.float32),
    )
    images = hearts(grid_classes())
    truth = structural(images).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    validation, test = (
        Grid(images[part], truth[part]) for part in np.split(order, [NUM_VALIDATION])
    )
    return IVData(train, validation, test)


def grid_classes() -> np.ndarray:
    """Latent classes of the 588 test images, (588, 4)."""
    positions = range(0, 32, 5)
    axes = np.meshgrid((0, 3, 5), (0, 10, 20, 30), positions, positions, indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 4)
