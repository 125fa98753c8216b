"""Optimizers that the benchmarks compare, each from one learning rate.

All decay their rate to zero on a cosine.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


def cosine_decay(rate: jax.typing.ArrayLike, num_steps: jax.typing.ArrayLike) -> Schedule:
    """`rate` at the first step, zero after the last.

    Optax has this schedule, too, but for a number of steps that is known while tracing; here one
    compiled step serves all rates and lengths.
    """
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1)))


def _matrices(params: Any) -> Any:
    """Which leaves are stacks of matrices, over their last two axes.

    Muon's own default takes 2-D leaves alone and among them the output layer. Both cost the
    gradient head accuracy: the Fourier layers hold their matrices in 4-D leaves, and Muon's authors
    give output layers to Adam.
    """

    def choose(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim < 2 or name.startswith("head/"):
            return None
        return MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    return jax.tree_util.tree_map_with_path(choose, params)


OPTIMIZERS: Mapping[str, Callable[[Schedule], optax.GradientTransformation]] = {
    "SGD": partial(optax.sgd, momentum=0.9, nesterov=True),  # the optimizer of the paper
    "Adam": optax.adam,
    # Muon on the stacks of matrices, Adam on the biases and on the output layer.
    "Muon": partial(optax.contrib.muon, muon_weight_dimension_numbers=_matrices),
}
