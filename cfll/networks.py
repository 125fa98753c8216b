"""Backbone: a network without head, as a function and its values; knows no framework.

`cfll.flax.backbone` makes one of a Flax module; `cfll.iv` trains them.
"""

from typing import Any, NamedTuple, Protocol

import jax


class ApplyFn(Protocol):
    """The signature of `Backbone.apply`."""

    def __call__(
        self, params: Any, stats: Any, inputs: Any, *, train: bool
    ) -> tuple[jax.Array, Any]:
        """Features (n, d) of the inputs, and the statistics after this pass."""
        ...


class Backbone(NamedTuple):
    """A network without head: its function and its initial values.

    Attributes:
      apply: ``apply(params, stats, inputs, *, train) -> (features, stats)``, features (n, d).
      params: what the optimizer trains.
      stats: what the forward pass updates (batch norm, spectral norm); ``None`` or a pytree.

    Examples:
      >>> import jax.numpy as jnp
      >>> def apply(params, stats, inputs, *, train):
      ...     return jnp.tanh(inputs @ params), stats
      >>> backbone = Backbone(apply, params=jnp.ones((3, 8)))
    """

    apply: ApplyFn
    params: Any
    stats: Any = None
