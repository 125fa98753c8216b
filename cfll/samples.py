"""Samples: a batch as kernels, sums and losses see it: checked, cast, flattened, weighted.

Above `heads`, below `solve`. Shapes and dtypes are checked while tracing, with messages that name
argument, shape and fix. Values (a negative weight) are checked where they are concrete; under
``jit`` they are not, and become NaN, which callers see.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Samples(NamedTuple):
    """The rows of a batch.

    Attributes:
      features: (n, d).
      targets: (n, o).
      weights: (n,), or None where every sample counts once.
    """

    features: jax.Array
    targets: jax.Array
    weights: jax.Array | None

    def weigh(self, rows: jax.Array) -> jax.Array:
        """Each row (of n) times its weight."""
        return rows if self.weights is None else rows * self.weights[:, None]

    def total(self) -> jax.Array:
        """The sum of the weights, ()."""
        if self.weights is None:
            return jnp.full((), self.features.shape[0], self.features.dtype)
        return jnp.sum(self.weights)


def check_batch(features: Any, targets: Any, sample_weight: Any) -> tuple[jax.Array, jax.Array]:
    """Features (..., d) and targets (..., o) as arrays, if rows and weights fit each other."""
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    if features.ndim < 2:
        raise ValueError(
            f"features has shape {features.shape}; expected (..., d) with at least one axis of "
            "samples. For a single sample write features[None, :]."
        )
    if features.shape[-1] == 0:
        raise ValueError(f"features has shape {features.shape}: there are no features to fit.")
    if targets.shape[-1:] == (0,):
        raise ValueError(f"targets has shape {targets.shape}: there are no outputs to predict.")
    for name, array in (("features", features), ("targets", targets)):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(
                f"{name} has dtype {array.dtype}; heads are real: stack real and imaginary parts, "
                f"jnp.concatenate([{name}.real, {name}.imag], axis=-1)."
            )
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(
            f"targets has dtype {targets.dtype} and shape {targets.shape}; a squared loss needs "
            "floats. Class labels: one-hot them, jax.nn.one_hot(labels, num_classes). "
            "Numbers: targets.astype(jnp.float32)."
        )
    if targets.shape == features.shape[:-1]:
        raise ValueError(
            f"targets has shape {targets.shape}, but features has shape {features.shape}: the last "
            "axis must be the outputs. For a single output write targets[..., None]."
        )
    if targets.shape[:-1] != features.shape[:-1]:
        raise ValueError(
            f"targets has shape {targets.shape} and features has shape {features.shape}: all axes "
            "but the last are samples and must agree. Write targets of shape "
            f"{features.shape[:-1] + (targets.shape[-1:] or (1,))}."
        )
    if sample_weight is not None:
        _check_weights(sample_weight, features.shape[:-1], targets.shape)
    return features, targets


def _check_weights(sample_weight: Any, samples: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """Refuse weights that are not one number per sample (or per leading axis of samples)."""
    shape = jnp.shape(sample_weight)
    if shape == targets and targets[-1] > 1:
        raise ValueError(
            f"sample_weight has the shape {shape} of targets; weights are per sample. Per output "
            "each has a problem of its own: jax.vmap(lambda y, w: cfll.ridge_solve(features, "
            "y[..., None], beta, sample_weight=w), in_axes=-1)(targets, sample_weight) is a head "
            "with a first axis of outputs."
        )
    if jnp.iscomplexobj(sample_weight):
        raise TypeError("sample_weight is complex; write jnp.abs(sample_weight).")
    if shape != samples[: len(shape)] or not shape:
        raise ValueError(
            f"sample_weight has shape {shape}, but the samples of features have shape {samples}: "
            f"write one weight per sample, shape {samples}, or per leading axis, "
            f"shape {samples[:1]}."
        )
    weights = concrete(sample_weight)
    if weights is not None and (weights < 0).any():
        raise ValueError("sample_weight has negative entries: write jnp.maximum(sample_weight, 0).")


def flatten(
    features: jax.Array, targets: jax.Array, sample_weight: jax.Array | None, dtype: Any
) -> Samples:
    """A checked batch as rows of one dtype; rows of weight zero hold nothing but finite numbers."""
    leading = features.shape[:-1]
    features = features.astype(dtype).reshape(-1, features.shape[-1])
    targets = targets.astype(dtype).reshape(-1, targets.shape[-1])
    if sample_weight is None:
        return Samples(features, targets, None)
    weights = jnp.asarray(sample_weight, dtype)
    weights = weights.reshape(weights.shape + (1,) * (len(leading) - weights.ndim))
    weights = nan_where_negative(jnp.broadcast_to(weights, leading).reshape(-1))

    def without_absent(rows: jax.Array) -> jax.Array:
        # 0 * NaN is NaN. Finite values stay: the derivative by a weight of zero needs them.
        absent = (weights == 0)[:, None] & ~jnp.isfinite(rows)
        return jnp.where(absent, jnp.zeros((), rows.dtype), rows)

    return Samples(without_absent(features), without_absent(targets), weights)


def concrete(array: Any) -> np.ndarray | None:
    """The values, or None while tracing. Ask before jnp.asarray: inside jit it returns a tracer."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)


def nan_where_negative(array: jax.Array) -> jax.Array:
    """Negative penalties and weights make a system that may look solvable: answer NaN instead."""
    return jnp.where(array >= 0, array, jnp.full((), jnp.nan, array.dtype))


def varying_like(tree: Any, *references: jax.Array) -> Any:
    """Typed as varying over the axes of a ``shard_map`` as the references are: carries of loops."""
    if not any(jax.typeof(array).sharding.mesh.manual_axes for array in references):
        return tree
    touched = jnp.concatenate([array.reshape(-1)[:1] for array in references]).sum()
    return jax.tree.map(lambda leaf: jnp.where(False, touched.astype(leaf.dtype), leaf), tree)


def let_xla_shard(run: Callable[..., Any], features: Any, out_specs: Any) -> Callable[..., Any]:
    """Run a function of the samples with automatic axes, where their mesh has explicit ones.

    A product over sharded samples is ambiguous to sharding-in-types, and LAPACK has no rule there.
    ``out_specs`` is a tree of partition specs like the function's output.
    """
    mesh = jax.typeof(features).sharding.mesh
    if not mesh.explicit_axes:
        return run
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, spec),
        out_specs,
        is_leaf=lambda node: isinstance(node, jax.P),
    )
    return jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=shardings)
