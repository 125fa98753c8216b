"""Theorem 3: the loss is not convex in the features; critical points that are not minima."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.experiments.theory.flow import draw, kernel_flow, loss, split_targets
from benchmarks.experiments.theory.settings import (
    NUM_FEATURES,
    NUM_OUTPUTS,
    NUM_SAMPLES,
    NUM_TIMES,
    Found,
    in_float64,
)


@in_float64
def check_convexity(seed: int, betas: tuple[float, ...], num_points: int = 81) -> Found:
    """Phi and -phi have the same loss, less than ||Y||^2, and phi = 0 between them has ||Y||^2.

    So every phi that the head can use at all refutes convexity, whatever beta > 0. The same lines
    show that c phi has less loss for every larger c: for beta > 0 there is no minimizer.
    """
    features, targets = draw(jax.random.key(seed), jnp.eye(NUM_SAMPLES))
    total = jnp.sum(jnp.square(targets))
    position, scale = jnp.linspace(-1, 1, num_points), jnp.geomspace(1e-2, 1e2, num_points)

    @jax.jit
    def along(factors: jax.Array, beta: jax.Array) -> jax.Array:
        return jax.vmap(lambda c: loss(c * features, targets, beta))(factors) / total

    positive = jnp.asarray([beta for beta in betas if beta > 0])
    segment = jnp.stack([along(position, beta) for beta in positive])
    return {
        "betas": positive,  # (b,)
        "position": position,  # in [-1, 1], on the segment from -phi to phi, (m,)
        "segment": segment,  # loss there over that of phi = 0, (b, m)
        # Loss at the midpoint minus that at the ends, over the latter, (b,).
        "excess": segment[:, num_points // 2] / segment[:, 0] - 1,
        "scale": scale,  # factors c, (m,)
        # Loss of c phi over that of phi = 0, (b, m).
        "scaled": jnp.stack([along(scale, beta) for beta in positive]),
    }


@in_float64
def check_critical(seed: int, betas: tuple[float, ...]) -> Found:
    """Theorem 3: critical points that are not minima. Losses are over ||Y||^2.

    At phi = 0, at features orthogonal to the outputs, and at those attaining one of two.
    """
    key = jax.random.key(seed)
    features, targets = draw(key, jnp.eye(NUM_SAMPLES))
    total = jnp.sum(jnp.square(targets))
    left = jnp.linalg.svd(targets, full_matrices=True)[0]
    basis, others = left[:, :NUM_OUTPUTS], left[:, NUM_OUTPUTS:]
    weights = jax.random.normal(jax.random.fold_in(key, 1), (NUM_FEATURES, NUM_FEATURES))
    orthogonal = others[:, :NUM_FEATURES] @ weights
    # The larger principal output is missing: the loss is far from its infimum.
    partial_fit = jnp.concatenate([basis[:, 1:2], others[:, : NUM_FEATURES - 1]], axis=1) @ weights
    direction = features / jnp.linalg.norm(features)
    step = jnp.geomspace(1e-3, 1e-1, 21)
    gradient, value = jax.jit(jax.grad(loss)), jax.jit(loss)

    def norms(point: jax.Array) -> jax.Array:
        return jnp.stack(
            [
                jnp.linalg.norm(gradient(point, targets, beta))
                / jnp.linalg.norm(gradient(features, targets, beta))
                for beta in betas
            ]
        )

    def losses(point: jax.Array) -> jax.Array:
        return jnp.stack([value(point, targets, beta) for beta in betas]) / total

    positive = [beta for beta in betas if beta > 0]
    decrease = jnp.stack(
        [
            1
            - jax.vmap(lambda e, b=beta: loss(orthogonal + e * direction, targets, b))(step) / total
            for beta in positive
        ]
    )
    near = partial_fit + 1e-3 * direction
    flow = kernel_flow(
        near, targets, jnp.eye(NUM_SAMPLES), np.float64(0), jnp.linspace(0, 30, NUM_TIMES)
    )
    unattained = jax.jit(split_targets)(flow[-1], targets, 0.0).perp
    zero = [jnp.linalg.norm(gradient(0 * features, targets, beta)) for beta in positive]
    return {
        "betas": betas,  # (b,)
        "zero": jnp.stack(zero),  # gradient norm at phi = 0
        # Gradient norm at features orthogonal to all outputs, over that at random features.
        "orthogonal": norms(orthogonal),
        "orthogonal_loss": losses(orthogonal),
        "step": step,  # lengths of a step from there in a direction that is not orthogonal, (m,)
        "decrease": decrease,  # of the loss by that step, (b, m)
        # Exponent of the decrease in the step.
        "slope": jnp.log(decrease[:, 10] / decrease[:, 0]) / jnp.log(step[10] / step[0]),
        # Gradient norm at features that span one of the two principal outputs, over that at random
        # features. Critical for beta = 0, not for beta > 0.
        "partial": norms(partial_fit),
        "partial_loss": losses(partial_fit),
        # ||Y_perp|| / ||Y|| after a kernel flow with beta = 0 from a distance of 1e-3 to that.
        "reached": jnp.linalg.norm(unattained) / jnp.sqrt(total),
    }
