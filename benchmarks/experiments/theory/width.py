"""Finite networks against the kernel flow."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf

from benchmarks.experiments.theory.flow import kernel_flow, loss, random_inputs, wide_kernels
from benchmarks.experiments.theory.kernel_regime import along
from benchmarks.experiments.theory.settings import (
    NUM_FEATURES,
    NUM_INPUTS,
    NUM_TIMES,
    Found,
    in_float64,
    relative,
)


def init_wide(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Standard normal parameters, Eq. (34)."""
    shapes = {
        "w1": (NUM_INPUTS, width),
        "b1": (width,),
        "w2": (width, NUM_FEATURES),
        "b2": (NUM_FEATURES,),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def wide_features(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One hidden layer of erf units in the parametrization of Eq. (34), (n, d)."""
    hidden = erf(x @ params["w1"] / np.sqrt(x.shape[1]) + params["b1"])
    return hidden @ params["w2"] / np.sqrt(len(params["w2"])) + params["b2"]


def smooth_targets(x: jax.Array) -> jax.Array:
    """Two outputs for three inputs, (n, 2)."""
    return jnp.stack([jnp.sin(2 * x[:, 0]), x[:, 1] * x[:, 2]], axis=1)


@in_float64
def check_width(
    seed: int, width: int, num_nets: int, num_steps: int, step_size: float, beta: float = 0.1
) -> Found:
    """Train with full batches on L_star, by `cfll.ridge_loss`, and follow the kernel flow."""
    x = random_inputs(seed)
    targets = smooth_targets(x)
    ntk = wide_kernels(x).ntk
    every = max(1, num_steps // (NUM_TIMES - 1))
    time = every * step_size * jnp.arange(NUM_TIMES)

    def objective(params: dict[str, jax.Array]) -> jax.Array:
        return loss(wide_features(params, x), targets, beta)

    @jax.jit
    def train(params: dict[str, jax.Array]) -> jax.Array:
        def step(params, _):
            gradient = jax.grad(objective)(params)
            return jax.tree.map(lambda p, g: p - step_size * g, params, gradient), None

        def stretch(params, _):
            features = wide_features(params, x)
            return jax.lax.scan(step, params, length=every)[0], features

        return jax.lax.scan(stretch, params, length=NUM_TIMES)[1]

    @jax.jit
    def orientations(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        descent = jax.tree.map(jnp.negative, jax.grad(objective)(params))
        features, actual = jax.jvp(lambda p: wide_features(p, x), (params,), (descent,))
        gradient = jax.grad(loss)(features, targets, beta)
        best = jnp.linalg.lstsq(gradient, actual)[0]
        return relative(-ntk @ gradient, actual), relative(gradient @ best, actual)

    def perp(path: jax.Array) -> jax.Array:
        parts, *_ = along(path, targets, ntk, np.float64(beta))
        return jnp.linalg.norm(parts.perp, axis=(1, 2)) / jnp.linalg.norm(targets)

    deviations, velocities, lefts, curves = [], [], [], []
    for key in jax.random.split(jax.random.key(seed + width), num_nets):
        params = init_wide(key, width)
        net = train(params)
        flow = kernel_flow(net[0], targets, ntk, np.float64(beta), time)
        distance = jnp.linalg.norm(net - flow, axis=(1, 2)) / jnp.linalg.norm(flow, axis=(1, 2))
        deviations.append(jnp.max(distance))
        right, left = orientations(params)
        velocities.append(right)
        lefts.append(left)
        curves.append((perp(net), perp(flow)))
    return {
        "width": width,
        "time": time,  # (t,)
        # Norm of Y_perp over that of Y, of the first network and of its kernel flow, (t,).
        **dict(zip(("net", "flow"), curves[0], strict=True)),
        "deviation": jnp.stack(deviations),  # largest relative distance on the path, per network
        # Relative distance of dPhi/dt at the start from Eq. (36) with the kernel of infinite width
        # on the samples' side, and from the best d x d matrix on the features', as in Eq. (37).
        "velocity": jnp.stack(velocities),
        "left": jnp.stack(lefts),
    }
