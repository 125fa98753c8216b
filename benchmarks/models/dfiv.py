"""Backbones of deep-feature instrumental variables (Appendix D), after Xu et al. (2020).

They have no head: both heads are solved outside. `__call__(x, train)` returns the features.

Spectral norms and batch norms keep their state in the collection `batch_stats`: apply with
`train=True, mutable=["batch_stats"]` to train, and with `train=False` to evaluate.
"""

from collections.abc import Callable

import flax.linen as nn
import jax


class Stack(nn.Module):
    """Dense layers, each optionally followed by an activation and a batch norm."""

    widths: tuple[int, ...]  # outputs of the layers
    # One per layer; `None` for a linear one.
    activations: tuple[Callable[[jax.Array], jax.Array] | None, ...]
    # Per layer, `"before"` or `"after"` its activation, or `""` for no batch norm.
    normalized: tuple[str, ...]
    spectral: bool = False  # whether the kernels are divided by their largest singular value

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Features of shape (batch, widths[-1]) for inputs of shape (batch, inputs)."""

        def batch_norm(x: jax.Array) -> jax.Array:
            # 0.9 is what other frameworks call a momentum of 0.1, their default.
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        layers = zip(self.widths, self.activations, self.normalized, strict=True)
        for width, activation, normalized in layers:
            if self.spectral:
                x = nn.SpectralNorm(nn.Dense(width))(x, update_stats=train)
            else:
                x = nn.Dense(width)(x)
            if normalized == "before":
                x = batch_norm(x)
            if activation is not None:
                x = activation(x)
            if normalized == "after":
                x = batch_norm(x)
        return x


def _scaled(widths: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """Hidden widths by `factor`, at least 1; the number of features stays."""
    return (*(max(1, round(width * factor)) for width in widths[:-1]), widths[-1])


def dsprites_treatment(width_factor: float = 1.0) -> Stack:
    """Treatment features of images: 4096 pixels -> 32 features within -1 and 1."""
    return Stack(
        widths=_scaled((1024, 512, 128, 32), width_factor),
        activations=(nn.relu, nn.relu, nn.relu, nn.tanh),
        normalized=("", "after", "", "before"),
        spectral=True,
    )


def dsprites_instrument(width_factor: float = 1.0) -> Stack:
    """Instrument features of (scale, orientation, posX): 3 -> 32 features, none negative."""
    return Stack(
        widths=_scaled((256, 128, 128, 32), width_factor),
        activations=(nn.relu, nn.relu, nn.relu, nn.relu),
        normalized=("", "after", "after", "before"),
        spectral=True,
    )


def demand_treatment(width_factor: float = 1.0) -> Stack:
    """Treatment feature of the price: 1 -> 1 feature."""
    return Stack(
        widths=_scaled((16, 1), width_factor), activations=(nn.relu, None), normalized=("", "")
    )


def demand_instrument(width_factor: float = 1.0) -> Stack:
    """Instrument features of (cost, time, type): 3 -> 32 features."""
    return Stack(
        widths=_scaled((128, 64, 32), width_factor),
        activations=(nn.relu, nn.relu, None),
        normalized=("", "", "before"),
    )


def demand_covariate(width_factor: float = 1.0) -> Stack:
    """Covariate features of (time, type): 2 -> 16."""
    return Stack(
        widths=_scaled((128, 32, 16), width_factor),
        activations=(nn.relu, nn.relu, nn.relu),
        normalized=("", "before", ""),
    )
