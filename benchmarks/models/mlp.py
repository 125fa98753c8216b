"""Multi-layer perceptron with layer norms, as a feature extractor with a linear head.

No state.
"""

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Hidden layers of dense, layer norm and gelu; linear head."""

    # Of the hidden layers; the last one is d, the inputs of the head.
    widths: tuple[int, ...] = (256, 256)
    num_outputs: int = 1  # o, the outputs of the head

    def setup(self) -> None:
        self.hidden = [nn.Dense(width) for width in self.widths]
        self.norms = [nn.LayerNorm() for _ in self.widths]
        self.head = nn.Dense(self.num_outputs)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        """What the head sees, (batch, d); all axes of the inputs but the first are flattened."""
        x = x.reshape(len(x), -1)
        for hidden, norm in zip(self.hidden, self.norms, strict=True):
            x = nn.gelu(norm(hidden(x)))
        return x

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Outputs of shape (batch, num_outputs)."""
        return self.head(self.features(x, train))
