"""Theorems 1 and 2: the gradient of the loss at the solved head is that at the fixed one."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import cfll
from benchmarks.experiments.theory.settings import NUM_INPUTS, Found, in_float64, relative


def init_mlp(key: jax.Array, widths: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
    """Weights of variance 1 / inputs and standard normal biases."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        key, key_w, key_b = jax.random.split(key, 3)
        weight = jax.random.normal(key_w, (fan_in, fan_out)) / np.sqrt(fan_in)
        layers.append((weight, jax.random.normal(key_b, (fan_out,))))
    return layers


def mlp(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """Features with tanh after every layer, (n, d)."""
    for weight, bias in layers:
        x = jnp.tanh(x @ weight + bias)
    return x


def explicit_loss(
    features: jax.Array, targets: jax.Array, anchor: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Eq. (14) / n through the normal equations of Eq. (13), for AD to go through; no cfll."""
    gram = features.T @ features + penalty * jnp.eye(features.shape[1])
    kernel = jnp.linalg.solve(gram, features.T @ targets + penalty * anchor)
    return batch_loss(features, targets, kernel) + penalty * jnp.sum((kernel - anchor) ** 2) / len(
        features
    )


def batch_loss(features: jax.Array, targets: jax.Array, kernel: jax.Array) -> jax.Array:
    """The squared loss at a head, mean over samples; penalties do not depend on theta."""
    return jnp.sum(jnp.square(targets - features @ kernel)) / len(features)


@in_float64
def check_envelope(seed: int, penalties: tuple[float, ...] = (1e-4, 1e-2, 1.0, 100.0)) -> Found:
    """Theorems 1 and 2 on a network whose sizes are drawn from the seed, for several penalties."""
    rng = np.random.default_rng(seed)
    depth, width, d, o, n = (
        int(rng.integers(low, high)) for low, high in ((1, 4), (4, 65), (1, 33), (1, 6), (1, 65))
    )
    keys = jax.random.split(jax.random.key(seed), 4)
    layers = init_mlp(keys[0], [NUM_INPUTS, *[width] * (depth - 1), d])
    x = jax.random.normal(keys[1], (n, NUM_INPUTS))
    targets = jax.random.normal(keys[2], (n, o))
    anchor = cfll.LinearHead(jax.random.normal(keys[3], (d, o)))
    # All of the solver's routes have their turn.
    solver = ("primal", "dual", "qr")[seed % 3]

    @jax.jit
    def differences(penalty: jax.Array) -> tuple[jax.Array, ...]:
        def ridge(layers):
            return cfll.ridge_loss(mlp(layers, x), targets, penalty, use_bias=False, solver=solver)

        def prox(layers):
            return cfll.prox_loss(mlp(layers, x), targets, anchor, penalty, solver=solver)

        def explicit(layers, anchor):
            return explicit_loss(mlp(layers, x), targets, anchor, penalty)

        through_ridge = jax.grad(explicit)(layers, jnp.zeros_like(anchor.kernel))
        through_prox = jax.grad(explicit)(layers, anchor.kernel)
        ridge_gradient, _ = jax.grad(ridge, has_aux=True)(layers)
        prox_gradient, head = jax.grad(prox, has_aux=True)(layers)
        fixed = jax.grad(lambda layers: batch_loss(mlp(layers, x), targets, head.kernel))(layers)
        return (
            relative(ridge_gradient, through_ridge),
            relative(prox_gradient, through_prox),
            relative(fixed, through_prox),
        )

    ridge, prox, fixed = (
        jnp.stack(values) for values in zip(*map(differences, penalties), strict=True)
    )
    return {
        "sizes": (depth, width, d, o, n),
        "penalties": penalties,  # beta and lam, (p,)
        # Relative differences of the gradients of theta to automatic differentiation through an
        # explicit solve, (p,): of `cfll.ridge_loss`, of `cfll.prox_loss`, and of ordinary
        # backpropagation of Eq. (10) at the fixed proximal head, Eq. (16).
        "ridge": ridge,
        "prox": prox,
        "fixed": fixed,
    }
