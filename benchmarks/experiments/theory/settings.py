"""Sizes of everything, and float64."""

from collections import namedtuple
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

Preset = Literal["cpu", "paper"]
P = ParamSpec("P")
Found = dict[str, Any]  # of a check


class Settings(NamedTuple):
    """Everything that determines the numbers; with a check's name it is the key of its record."""

    seed: int = 0  # of everything random
    num_networks: int = 7  # networks of the gradient identities
    num_draws: int = 400  # random features and targets of the pointwise identities
    num_starts: int = 40  # flows of the eigenvalues' course
    betas: tuple[float, ...] = (0.0, 1e-3, 0.1, 1.0)  # ridge penalties of the flows; the first is 0
    horizon: float = 1e5  # end of the flows with beta > 0
    horizon_zero: float = 30.0  # end of those with beta = 0, which are fast, and stiff at their end
    widths: tuple[int, ...] = (128, 512, 2048)  # hidden units of the finite networks
    num_nets: int = 12  # networks per width
    num_steps: int = 2000  # gradient steps of the finite networks
    step_size: float = 1e-3  # of those steps; their time is `num_steps * step_size`


PRESETS: dict[str, Settings] = {
    "cpu": Settings(),
    "paper": Settings(
        num_networks=40,
        num_draws=4000,
        num_starts=512,
        horizon=1e6,
        widths=(128, 512, 2048, 8192, 32768),
        num_nets=16,
        num_steps=4000,
        step_size=5e-4,
    ),
}

# Sizes of the flows: d < n, because otherwise beta = 0 leaves nothing to do, and o = 2, because
# with o = 1 the matrices of Eq. (40) commute.
NUM_SAMPLES, NUM_FEATURES, NUM_OUTPUTS, NUM_INPUTS = 8, 4, 2, 3
NUM_TIMES = 81  # of every flow: one shape, one compilation


def in_float64(check: Callable[P, Found]) -> Callable[P, Any]:
    """Run in float64, and return what was found as a named tuple of NumPy arrays.

    Outside, JAX would make float32 of them.
    """

    @wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        with jax.enable_x64(True):
            found = {name: np.asarray(value) for name, value in check(*args, **kwargs).items()}
        return namedtuple("Found", found)(**found)

    return run


def relative(difference: Any, reference: Any) -> jax.Array:
    """Norm of a difference over the norm of what it should be, of trees."""

    def norm(tree: Any) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))

    return norm(jax.tree.map(jnp.subtract, difference, reference)) / norm(reference)
