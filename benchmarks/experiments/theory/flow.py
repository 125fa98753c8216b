"""The loss as a function of the features, and kernel gradient flow on it (Section 5, App. C.1)."""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import cfll
from benchmarks.experiments.theory.settings import (
    NUM_FEATURES,
    NUM_INPUTS,
    NUM_OUTPUTS,
    NUM_SAMPLES,
)


class Parts(NamedTuple):
    """The targets in two parts, Eq. (29), and the head."""

    star: jax.Array  # Y_star, attainable, (n, o)
    perp: jax.Array  # Y_perp, the rest, (n, o)
    kernel: jax.Array  # W_star, (d, o)


def split_targets(features: jax.Array, targets: jax.Array, beta: float | jax.Array) -> Parts:
    """Y = Y_star + Y_perp, by `cfll.ridge_solve`."""
    head = cfll.ridge_solve(features, targets, beta, use_bias=False, solver="primal")
    star = head(features)
    return Parts(star, targets - star, head.kernel)


def loss(features: jax.Array, targets: jax.Array, beta: float | jax.Array) -> jax.Array:
    """L_star of the features, Eq. (20), a *sum* over samples, by `cfll.ridge_loss`."""
    mean, _ = cfll.ridge_loss(features, targets, beta, use_bias=False, solver="primal")
    return len(features) * mean


def draw(key: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gaussian features (n, d) of covariance root root^T between samples; normal targets (n, o)."""
    key_features, key_targets = jax.random.split(key)
    features = root @ jax.random.normal(key_features, (len(root), NUM_FEATURES))
    return features, jax.random.normal(key_targets, (len(root), NUM_OUTPUTS))


class Kernels(NamedTuple):
    """Kernels of an infinitely wide network between n samples, (n, n); both times I over d."""

    nngp: jax.Array  # covariance of the features at initialization, the paper's NGPK
    ntk: jax.Array  # the tangent kernel, the paper's K(X, X)


def wide_kernels(x: jax.Array) -> Kernels:
    """Of one hidden layer of erf units, Eq. (34), in closed form (Williams' arcsine kernel).

    The features are the *pre-activations* of the second layer. After its nonlinearity, as Eq. (34)
    has it, the tangent kernel of d features would carry the factors of the derivative at features
    that move, and would be neither constant nor known.
    """
    first = x @ x.T / x.shape[1] + 1
    scale = 1 + 2 * jnp.diag(first)
    product = scale[:, None] * scale[None, :]
    nngp = 2 / np.pi * jnp.arcsin(2 * first / jnp.sqrt(product)) + 1
    slopes = 4 / np.pi / jnp.sqrt(product - 4 * first**2)
    return Kernels(nngp, nngp + first * slopes)


def random_inputs(seed: int) -> jax.Array:
    """Distinct random inputs, (n, 3), standard normal."""
    return jax.random.normal(jax.random.key(seed), (NUM_SAMPLES, NUM_INPUTS))


def velocity(
    features: jax.Array, targets: jax.Array, ntk: jax.Array, beta: float | jax.Array
) -> jax.Array:
    """Right side of Eq. (36) and (37), with the kernel on the samples' side."""
    return -ntk @ jax.grad(loss)(features, targets, beta)


@jax.jit
def kernel_flow(
    features: jax.Array,
    targets: jax.Array,
    ntk: jax.Array,
    beta: float | jax.Array,
    times: jax.Array,
) -> jax.Array:
    """Integrate kernel gradient flow with adaptive steps (Tsitouras 5(4)).

    From features (n, d) at the first of the rising times (t,) to features (t, n, d).
    """
    term = diffrax.ODETerm(lambda t, features, args: velocity(features, *args))
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=1e-5,
        y0=features,
        args=(targets, ntk, beta),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
        max_steps=None,
    )
    assert solution.ys is not None
    return solution.ys
