"""A gated recurrent network, as a feature extractor with a linear head.

No state.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class GRU(nn.Module):
    """Its states are the features: every time after the first few is a sample of the head."""

    num_features: int = 64  # d, the inputs of the head
    num_outputs: int = 3  # o, the outputs of the head
    warm_up: int = 16  # times at the beginning without an output

    def setup(self) -> None:
        self.recurrent = nn.RNN(nn.GRUCell(self.num_features))
        self.head = nn.Dense(self.num_outputs)

    def features(self, inputs: jax.Array) -> jax.Array:
        """What the head sees, (batch, times - warm_up, d), of inputs (batch, times, channels)."""
        states = jnp.asarray(self.recurrent(inputs))
        return states[:, self.warm_up :]

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Predictions of shape (batch, times - warm_up, num_outputs)."""
        return self.head(self.features(inputs))
