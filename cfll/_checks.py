"""Argument checks of the kernels: errors while tracing that name argument, shape and fix.

Shapes and dtypes are always checked. Values (a negative penalty) are checked where they are
concrete; under ``jit`` they are not, and the kernels turn them into NaN, which callers see.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfll.cg import CG
from cfll.heads import LinearHead

SOLVERS = ("auto", "primal", "dual", "qr", "cg")


def check_solver(solver: Any) -> None:
    """Refuse an unknown solver."""
    if isinstance(solver, CG):
        if not (solver.tolerance >= 0 and solver.max_iterations >= 1):
            raise ValueError(f"{solver} never starts; write cfll.CG(1e-4, max_iterations=100).")
    elif solver not in SOLVERS:
        raise ValueError(
            f"unknown solver {solver!r}; write one of {', '.join(map(repr, SOLVERS))}, or "
            "cfll.CG(tolerance=1e-4, max_iterations=100)."
        )


def check_batch(features: Any, targets: Any) -> None:
    """Refuse features and targets that are not (..., d) and (..., o) of the same rows."""
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
    if targets.ndim == features.ndim - 1 and targets.shape == features.shape[:-1]:
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


def check_anchor(anchor: Any, d: int, o: int) -> None:
    """Refuse an anchor that does not map d features to o outputs."""
    if not isinstance(anchor, LinearHead):
        raise TypeError(
            f"anchor is a {type(anchor).__name__}; write cfll.LinearHead(kernel, bias) with a "
            "kernel of shape (d, o), or cfll.get_head(params, 'head')."
        )
    if tuple(anchor.kernel.shape) != (d, o):
        raise ValueError(
            f"anchor has a kernel of shape {tuple(anchor.kernel.shape)}, but features and targets "
            f"ask for {(d, o)} = (features, outputs). Write cfll.LinearHead.zeros({d}, {o})."
        )
    if anchor.bias is not None and tuple(anchor.bias.shape) != (o,):
        raise ValueError(
            f"anchor has a bias of shape {tuple(anchor.bias.shape)}, expected ({o},), or None."
        )


def check_weights(sample_weight: Any, samples: tuple[int, ...]) -> None:
    """Refuse weights that are not one number per sample (or per leading axis of samples)."""
    shape = jnp.shape(sample_weight)
    if shape != samples[: len(shape)] or not shape:
        raise ValueError(
            f"sample_weight has shape {shape}, but the samples of features have shape {samples}: "
            f"write one weight per sample, shape {samples}, or per leading axis, "
            f"shape {samples[:1]}."
        )
    weights = _concrete(sample_weight)
    if weights is not None and (weights < 0).any():
        raise ValueError("sample_weight has negative entries: write jnp.maximum(sample_weight, 0).")


def check_penalty(name: str, penalty: Any, d: int, rows: int, free_bias: bool) -> None:
    """Refuse penalties of a wrong shape, negative ones, and those that leave the head undefined."""
    shape = jnp.shape(penalty)
    if shape not in ((), (d,), (d, d)):
        raise ValueError(
            f"{name} has shape {shape}, but features has {d} columns: write a scalar, a vector of "
            f"shape ({d},) or a matrix of shape ({d}, {d}). Over a grid of values use jax.vmap."
        )
    values = _concrete(penalty)
    if values is None:
        return
    diagonal = np.diagonal(values) if values.ndim == 2 else np.broadcast_to(values, (d,))
    if (diagonal < 0).any():
        raise ValueError(f"{name} is negative (smallest {diagonal.min():g}): write {name} > 0.")
    if values.ndim == 2 and not np.allclose(values, values.T, rtol=1e-5, atol=0):
        raise ValueError(f"{name} is not symmetric: write ({name} + {name}.T) / 2.")
    free = int((diagonal == 0).sum())
    if free and free + free_bias > rows:
        raise ValueError(
            f"{name} is zero for {free} of {d} features, but there are only {rows} samples: the "
            f"least-squares problem has no unique solution. Write {name} > 0, e.g. 1e-3."
        )


def _concrete(array: Any) -> np.ndarray | None:
    """The values, or None while tracing. Ask before jnp.asarray: inside jit it returns a tracer."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)
