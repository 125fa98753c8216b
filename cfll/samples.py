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

Shape = tuple[int, ...]


class Samples(NamedTuple):
    """The rows of a batch.

    Attributes:
      features: (n, d).
      targets: (n, o).
      weights: (n,), or (n, o) per output, or None where every sample counts once.
    """

    features: jax.Array
    targets: jax.Array
    weights: jax.Array | None

    def weigh(self, rows: jax.Array) -> jax.Array:
        """Each row (of n) times its weight."""
        if self.weights is None:
            return rows
        return rows * (self.weights if self.weights.ndim == 2 else self.weights[:, None])

    def total(self) -> jax.Array:
        """The sum of the weights, of an average output, ()."""
        if self.weights is None:
            return jnp.full((), self.features.shape[0], self.features.dtype)
        outputs = self.weights.shape[1] if self.weights.ndim == 2 else 1
        return jnp.sum(self.weights) / outputs


def check_batch(
    features: Any, targets: Any, sample_weight: Any, per_output: bool = False
) -> tuple[jax.Array, jax.Array]:
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
            f"targets has dtype {targets.dtype} and shape {targets.shape}; a loss needs "
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
            f"({', '.join(map(str, features.shape[:-1]))}, outputs)."
        )
    if sample_weight is not None:
        _check_weights(sample_weight, features.shape[:-1], targets.shape, per_output)
    return features, targets


def is_per_output(sample_weight: Any, targets: Any) -> bool:
    """Whether these are weights of the targets' shape, (..., o), for targets that are missing."""
    return sample_weight is not None and jnp.shape(sample_weight) == jnp.shape(targets)


def _check_weights(sample_weight: Any, samples: Shape, targets: Shape, per_output: bool) -> None:
    """Refuse weights that are not one number per sample (or leading axis), or per target."""
    if isinstance(sample_weight, list | tuple):
        kind = type(sample_weight).__name__
        raise TypeError(f"sample_weight is a {kind}; write jnp.asarray(sample_weight).")
    shape = jnp.shape(sample_weight)
    if shape == targets and not per_output:
        raise ValueError(
            f"sample_weight has the shape {shape} of targets: every output has a problem of its "
            "own, and only the kernels, losses and rules for the squared loss take them, without "
            "axis_name. Write one weight per sample, or one call per output."
        )
    if jnp.iscomplexobj(sample_weight):
        raise TypeError("sample_weight is complex; write jnp.abs(sample_weight).")
    if shape != targets and (shape != samples[: len(shape)] or not shape):
        raise ValueError(
            f"sample_weight has shape {shape}, but the samples of features have shape {samples}: "
            f"write one weight per sample, shape {samples}, per leading axis, "
            f"shape {samples[:1]}, or per target, shape {targets}."
        )
    weights = concrete(sample_weight)
    if weights is not None and (weights < 0).any():
        raise ValueError("sample_weight has negative entries: write jnp.maximum(sample_weight, 0).")


def flatten(
    features: jax.Array, targets: jax.Array, sample_weight: jax.Array | None, dtype: Any
) -> Samples:
    """A checked batch as rows of one dtype; rows of weight zero hold nothing but finite numbers."""
    leading, per_output = features.shape[:-1], is_per_output(sample_weight, targets)
    features = features.astype(dtype).reshape(-1, features.shape[-1])
    targets = targets.astype(dtype).reshape(-1, targets.shape[-1])
    if sample_weight is None:
        return Samples(features, targets, None)
    weights = jnp.asarray(sample_weight, dtype)
    if not per_output:
        weights = weights.reshape(weights.shape + (1,) * (len(leading) - weights.ndim))
        weights = jnp.broadcast_to(weights, leading)
    weights = nan_where_negative(
        weights.reshape(len(targets), targets.shape[1] if per_output else 1)
    )

    def without(absent: jax.Array, rows: jax.Array) -> jax.Array:
        # 0 * NaN is NaN, and so is zero times the square of a huge number, with which some mark
        # what is missing. Others stay: the derivative by a weight of zero needs them.
        held = jnp.isfinite(jnp.square(rows))
        return jnp.where(absent & ~held, jnp.zeros((), rows.dtype), rows)

    features = without(jnp.all(weights == 0, axis=1, keepdims=True), features)
    return Samples(
        features, without(weights == 0, targets), weights if per_output else weights[:, 0]
    )


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
