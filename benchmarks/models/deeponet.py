"""DeepONet: a network of the field times a network of the point, with a linear head.

No state.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


class DeepONet(nn.Module):
    """Features b_k(u) t_k(x) of a field u at the points x of a periodic grid."""

    width: int = 128  # of the hidden layers
    num_features: int = 64  # d, the inputs of the head
    num_waves: int = 8  # the trunk sees a point's sines and cosines up to this wave number
    num_outputs: int = 1  # o, the outputs of the head

    def setup(self) -> None:
        hidden = partial(nn.Dense, self.width)
        self.branch = nn.Sequential(
            [hidden(), nn.gelu, hidden(), nn.gelu, nn.Dense(self.num_features)]
        )
        self.trunk = nn.Sequential([hidden(), nn.gelu, nn.Dense(self.num_features), nn.gelu])
        self.head = nn.Dense(self.num_outputs)

    def features(self, inputs: jax.Array) -> jax.Array:
        """What the head sees, (batch, points, d), of channels u and x, the same x for all u."""
        field, points = inputs[..., 0], inputs[0, :, 1]
        angle = jnp.pi * points[:, None] * jnp.arange(1, self.num_waves + 1, dtype=points.dtype)
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
        products: jax.Array = self.branch(field)[:, None, :] * self.trunk(waves)
        return products

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Predictions of shape (batch, points, num_outputs)."""
        return self.head(self.features(inputs))
