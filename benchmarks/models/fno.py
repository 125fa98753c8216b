"""Fourier neural operator in one or two dimensions, as a feature extractor with a linear head.

The head acts on the features of every grid point, so all (sample, grid point) pairs are samples to
the closed-form solve.

Written to be fast on a few CPU cores, by measurement. Grid points lead inside the network: with 16
modes on 256 points the transforms are then plain matrix products and beat the FFT. Pointwise layers
flatten their leading axes: XLA's CPU backend runs the weight gradient of a dense layer on a 3-D
input outside its matrix-multiply library (a training step takes 1.5 times as long).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Pointwise(nn.Module):
    """Dense layer on flattened leading axes: (..., c) -> (..., width)."""

    width: int

    def setup(self) -> None:
        self.dense = nn.Dense(self.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.width)


class SpectralConv(nn.Module):
    """Multiply each of the lowest Fourier modes by its own complex (c, c) matrix.

    The weights are real (real and imaginary part are stacked in front), so that every optimizer can
    train them. As all layers here it computes in the dtype of inputs and weights.
    """

    width: int
    modes: int
    num_dims: int = 1

    def setup(self) -> None:
        bound = 1 / self.width**2
        num_waves = len(waves(self.modes, self.num_dims))
        self.kernel = self.param(
            "kernel",
            lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
            (2, num_waves, self.width, self.width),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x of shape (points, batch, c). Returns the same shape, on the same grid."""
        points, batch, width = x.shape
        analysis, synthesis = (
            jnp.asarray(m, x.dtype) for m in truncated_fourier(points, self.modes, self.num_dims)
        )
        modes = (analysis @ x.reshape(points, -1)).reshape(2, -1, batch, width)
        (real, imaginary), (kernel_real, kernel_imaginary) = modes, self.kernel
        product = jnp.stack(
            [
                real @ kernel_real - imaginary @ kernel_imaginary,
                real @ kernel_imaginary + imaginary @ kernel_real,
            ]
        )
        return (synthesis @ product.reshape(len(analysis), -1)).reshape(x.shape)


def waves(modes: int, num_dims: int) -> np.ndarray:
    """Wave vectors of components below `modes`, one of each pair k, -k: (number, num_dims)."""
    axis = np.arange(1 - modes, modes)
    grid = np.stack(np.meshgrid(*[axis] * num_dims, indexing="ij"), axis=-1)
    return grid.reshape(-1, num_dims)[len(axis) ** num_dims // 2 :]


def truncated_fourier(points: int, modes: int, num_dims: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Real Fourier transform of the lowest modes, and back, as matrices; of a grid of all points.

    Both scale with the grid such that the modes of one function are the same on every grid. (2
    waves, points): real parts, then imaginary parts of the modes; and its inverse.
    """
    k, side = waves(modes, num_dims), round(points ** (1 / num_dims))
    # Reduced modulo the grid in integers: angles of thousands of radians lose digits.
    angle = 2 * np.pi * (k @ np.indices((side,) * num_dims).reshape(num_dims, -1) % side) / side
    basis = np.concatenate([np.cos(angle), -np.sin(angle)])
    # Mode -k is the conjugate of mode k.
    multiplicity = np.tile(np.where((k == 0).all(axis=1), 1, 2), 2)
    analysis = basis / points
    synthesis = (multiplicity[:, None] * basis).T
    return analysis.astype(np.float32), synthesis.astype(np.float32)


class FNO1d(nn.Module):
    """Lifting, `depth` Fourier layers, pointwise projection to the features, linear head."""

    width: int = 32  # channels of the Fourier layers
    modes: int = 16  # Fourier modes that each layer acts on
    depth: int = 4  # number of Fourier layers
    num_features: int = 128  # d, the inputs of the head
    num_outputs: int = 1  # o, the outputs of the head

    num_dims = 1  # of space

    def setup(self) -> None:
        self.lift = Pointwise(self.width)
        self.spectral = [
            SpectralConv(self.width, self.modes, self.num_dims) for _ in range(self.depth)
        ]
        self.skip = [Pointwise(self.width) for _ in range(self.depth)]
        self.project = Pointwise(self.num_features)
        self.head = nn.Dense(self.num_outputs)

    def features(self, inputs: jax.Array) -> jax.Array:
        """What the head sees, (batch, points, d), of channels on any regular periodic grid."""
        flat = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        x = self.lift(jnp.swapaxes(flat, 0, 1))
        for layer, (spectral, skip) in enumerate(zip(self.spectral, self.skip, strict=True)):
            x = spectral(x) + skip(x)
            if layer < self.depth - 1:
                x = nn.gelu(x)
        # Back to samples first while the tensor is narrow.
        features = nn.gelu(self.project(jnp.swapaxes(x, 0, 1)))
        return features.reshape(*inputs.shape[:-1], self.num_features)

    def __call__(self, inputs: jax.Array) -> Any:
        """Predictions of shape (batch, points, num_outputs)."""
        features = self.features(inputs)
        outputs = self.head(features.reshape(-1, self.num_features))
        return outputs.reshape(*features.shape[:-1], self.num_outputs)


class FNO2d(FNO1d):
    """The same on a square periodic grid: inputs (batch, points, points, channels)."""

    num_dims = 2
