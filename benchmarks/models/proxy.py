"""Backbones of deep feature proxy variables, after Xu et al. (2021).

Models of the benchmarks: Flax only, they know neither data nor cfll. They have no head: both heads
are solved outside. `__call__(x, train)` returns the features.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models.dfiv import Stack


class Perceptron(nn.Module):
    """Dense layers with ReLU between them, initialized as PyTorch does.

    Kernels and biases are uniform within 1 / sqrt(inputs): with biases of zero the kinks of a layer
    of one input would all lie at one point.

    Attributes:
      widths: outputs of the layers.
      last: activation of the last layer.
    """

    widths: tuple[int, ...]
    last: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Features of shape (batch, widths[-1]) for inputs of shape (batch, inputs)."""
        del train
        for index, width in enumerate(self.widths):
            if index:
                x = nn.relu(x)
            uniform = nn.initializers.uniform(2 / x.shape[-1] ** 0.5)

            def centred(key, shape, dtype=jnp.float32, uniform=uniform, bound=x.shape[-1] ** -0.5):
                return uniform(key, shape, dtype) - bound

            x = nn.Dense(width, kernel_init=centred, bias_init=centred)(x)
        return x if self.last is None else self.last(x)


def modules(design: str, width_factor: float = 1.0) -> dict[str, nn.Module]:
    """The networks of a design by their names in `cfll.iv.proxy.networks`.

    Args:
      design: "demand": 8 features of any sign, as in the updated code; "dsprites": 32 features of
        images or latents, none negative.
      width_factor: scales the hidden widths of image networks; 1 is the published network.
    """
    names = ("treatment1", "treatment_proxy", "outcome_proxy", "treatment2")
    if design == "demand":
        return dict.fromkeys(names, Perceptron((32, 16, 8)))
    hidden = tuple(max(1, round(width * width_factor)) for width in (1024, 512, 128))
    image = Stack((*hidden, 32), (nn.relu,) * 4, ("", "after", "", ""), spectral=True)
    latents = Perceptron((128, 64, 32), last=nn.relu)
    return {**dict.fromkeys(names, image), "treatment_proxy": latents}
