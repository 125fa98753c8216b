"""The Fourier neural operator of the notebook that the paper cites, as features and a linear head.

A model of the benchmarks, beside `fno.py` and made of its layers. It differs in that the outputs of
the last Fourier layer, after a ReLU, are the features: d is the width, no feature is negative, and
the pointwise projection to the output is the head.

Its size is usually given as 541,185 parameters: real numbers, a complex weight counted twice.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models.fno import Pointwise, SpectralConv


class KoehlerFNO1d(nn.Module):
    """Pointwise lifting, `depth` times relu(spectral + pointwise), linear head."""

    width: int = 64  # channels throughout, and d, the inputs of the head
    modes: int = 16  # Fourier modes that each layer acts on
    depth: int = 4  # number of Fourier layers
    num_outputs: int = 1  # o, the outputs of the head

    def setup(self) -> None:
        self.lift = Pointwise(self.width)
        self.spectral = [SpectralConv(self.width, self.modes) for _ in range(self.depth)]
        self.skip = [Pointwise(self.width) for _ in range(self.depth)]
        self.head = nn.Dense(self.num_outputs)

    def features(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """What the head sees, (batch, points, width), none negative, on any periodic grid."""
        x = self.lift(jnp.swapaxes(inputs, 0, 1))  # grid points lead, as in fno.py
        for spectral, skip in zip(self.spectral, self.skip, strict=True):
            x = nn.relu(spectral(x) + skip(x))
        return jnp.swapaxes(x, 0, 1)

    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Predictions of shape (batch, points, num_outputs)."""
        features = self.features(inputs, train)
        outputs = self.head(features.reshape(-1, self.width))
        return outputs.reshape(*features.shape[:-1], self.num_outputs)
