"""RandAugment, mixup, cutmix and label smoothing, as NFNet-F0 is trained with.

Pure functions of their inputs and of a random generator.

The order is that of the reference: images are mixed first, then each mixed image goes through
RandAugment, then pixels are normalized. All but the last is uint8, so that a quarter of the bytes
waits in queues and travels to the device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Of ImageNet's pixels, red, green, blue, in units of 0 to 255.
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
STD = np.array([0.229, 0.224, 0.225], np.float32) * 255

LABEL_SMOOTHING = 0.1
MIXUP_ALPHA = 0.2
RAND_AUGMENT_LAYERS, RAND_AUGMENT_MAGNITUDE = 4, 5

_GREY = (128, 128, 128)  # where an operation leaves pixels without a value
_LARGEST_MAGNITUDE = 10


def normalize(images: Any) -> Any:
    """uint8 pixels (..., 3), of NumPy or JAX, as float32 of about zero mean and variance one."""
    return (images.astype(np.float32) - MEAN) / STD


def soft_targets(
    labels: np.ndarray, num_classes: int, smoothing: float = LABEL_SMOOTHING
) -> np.ndarray:
    """One-hot targets (n, o) that leave a share `smoothing` to all classes alike."""
    targets = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return targets


def mix(
    images: np.ndarray, targets: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mixup on the first half of a batch, cutmix on the second; images are uint8, targets (n, o).

    Partners come from the same half. (The reference draws a second batch for them: the same
    distribution of pairs, at twice the reading.)
    """
    half = len(images) // 2
    halves = mixup(images[:half], targets[:half], rng), cutmix(images[half:], targets[half:], rng)
    mixed_images, mixed_targets = zip(*halves, strict=True)
    return np.concatenate(mixed_images), np.concatenate(mixed_targets)


def mixup(
    images: np.ndarray, targets: np.ndarray, rng: np.random.Generator, alpha: float = MIXUP_ALPHA
) -> tuple[np.ndarray, np.ndarray]:
    """Blend every image, and its target, with the next one's, each with a share from Beta(a, a).

    Args and returns as `mix`.
    """
    share = rng.beta(alpha, alpha, size=len(images)).astype(np.float32)
    pixel_share = share[:, None, None, None]
    blend = pixel_share * images + (1 - pixel_share) * np.roll(images, -1, axis=0)
    return np.rint(blend).astype(np.uint8), _blend_targets(targets, share)


def cutmix(
    images: np.ndarray, targets: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paste a rectangle of the next image into every image; targets mix by area.

    The rectangle has the image's aspect ratio and an area from 0 to 1, uniformly, before it is cut
    at the image's border.

    Args and returns as `mix`.
    """
    n, height, width, _ = images.shape
    side = np.sqrt(rng.random(n))  # as a share of the image's
    centres = rng.integers(0, (height, width), (n, 2))
    partners, mixed = np.roll(images, -1, axis=0), images.copy()
    share = np.empty(n, np.float32)
    for i in range(n):
        rows = _window(centres[i, 0], int(side[i] * height), height)
        columns = _window(centres[i, 1], int(side[i] * width), width)
        mixed[i, rows, columns] = partners[i, rows, columns]
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
        share[i] = 1 - pasted / (height * width)
    return mixed, _blend_targets(targets, share)


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    layers: int = RAND_AUGMENT_LAYERS,
    magnitude: float = RAND_AUGMENT_MAGNITUDE,
) -> Image.Image:
    """Apply operations drawn from a list, one after the other (Cubuk et al., 2020).

    The magnitude is from 0 to 10. Color, contrast, brightness and sharpness change nothing at 5, as
    in the reference.
    """
    for index in rng.integers(len(OPERATIONS), size=layers):
        image = OPERATIONS[index](image, magnitude / _LARGEST_MAGNITUDE, rng)
    return image


def _blend_targets(targets: np.ndarray, share: np.ndarray) -> np.ndarray:
    return share[:, None] * targets + (1 - share[:, None]) * np.roll(targets, -1, axis=0)


def _window(centre: int, length: int, limit: int) -> slice:
    return slice(max(0, centre - length // 2), min(limit, centre + length // 2))


# The operations: (image, strength from 0 to 1, generator) -> image. Lengths are those of the
# reference at its 192 pixels, in proportion to the image.

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]

_SHEAR, _ROTATION = 0.3, 30.0  # pixels per pixel; degrees
_SHIFT, _HALF_CUTOUT = 100 / 192, 40 / 192  # of the side


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=_GREY)


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda image, strength, rng: kind(image).enhance(0.1 + 1.8 * strength)


def _rotate(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    return image.rotate(_signed(_ROTATION * strength, rng), fillcolor=_GREY)


def _shear_x(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, _signed(_SHEAR * strength, rng), 0, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, _signed(_SHEAR * strength, rng), 1, 0))


def _translate_x(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, _signed(_SHIFT * strength, rng) * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _signed(_SHIFT * strength, rng) * image.height))


def _cutout(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    x, y = rng.integers(image.width), rng.integers(image.height)
    half = int(_HALF_CUTOUT * strength * image.width)
    copy = image.copy()
    copy.paste(_GREY, (int(x) - half, int(y) - half, int(x) + half, int(y) + half))
    return copy


def _solarize_add(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    added = int(110 * strength)
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, rng: ImageOps.autocontrast(image),
    lambda image, strength, rng: ImageOps.equalize(image),
    lambda image, strength, rng: ImageOps.invert(image),
    lambda image, strength, rng: ImageOps.posterize(image, max(1, int(4 * strength))),
    lambda image, strength, rng: ImageOps.solarize(image, int(256 * strength)),
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _rotate,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _cutout,
)
