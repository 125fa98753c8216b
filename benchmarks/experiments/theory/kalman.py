"""Appendix A: the proximal step against a textbook filter."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import cfll
from benchmarks.experiments.theory.settings import Found, in_float64, relative


def measurement_update(
    mean: np.ndarray,
    covariance: np.ndarray,
    features: np.ndarray,
    targets: np.ndarray,
    noise: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The textbook Kalman update of mean and covariance of vec(W), row by row; NumPy, no cfll.

    Features are (n, d), targets (n, o) of noise variance sigma_Y^2.
    """
    n, o = targets.shape
    observe = np.kron(features, np.eye(o))  # vec(Y) = observe vec(W)
    innovation = targets.reshape(-1) - observe @ mean
    innovation_covariance = observe @ covariance @ observe.T + noise * np.eye(n * o)
    gain = np.linalg.solve(innovation_covariance, observe @ covariance).T
    return mean + gain @ innovation, covariance - gain @ observe @ covariance


@in_float64
def check_kalman(
    seed: int,
    num_problems: int,
    sizes: Sequence[tuple[int, int, int]] = ((1, 4, 3), (5, 7, 2), (12, 6, 1)),
    num_batches: int = 5,
) -> Found:
    """Problems of several sizes (n, d, o) and random variances, from a random head."""
    rng = np.random.default_rng(seed)
    solve = jax.jit(partial(cfll.prox_solve, solver="primal"))
    lams, differences, filtered = [], [], []
    for n, d, o in tuple(sizes) * num_problems:
        noise, walk = 10 ** rng.uniform(-2, 2, 2)
        kernel = rng.normal(size=(d, o))
        mean, covariance = kernel.reshape(-1), np.zeros((d * o, d * o))
        prior = walk * np.eye(d * o)
        for batch in range(num_batches):
            features, targets = rng.normal(size=(n, d)), rng.normal(size=(n, o))
            head = solve(features, targets, cfll.LinearHead(jnp.asarray(kernel)), noise / walk)
            if batch == 0:  # Eq. (24): the prior is the last point, with the covariance of a step
                once, _ = measurement_update(kernel.reshape(-1), prior, features, targets, noise)
                lams.append(noise / walk)
                differences.append(relative(head.kernel.reshape(-1), once))
            # Eq. (23): the filter's own prior keeps what it knew.
            mean, covariance = measurement_update(
                mean, covariance + prior, features, targets, noise
            )
            kernel = np.asarray(head.kernel)
        filtered.append(relative(kernel.reshape(-1), mean))
    return {
        "lams": lams,  # sigma_Y^2 / sigma_W^2, per problem
        # Of `cfll.prox_solve` to one measurement update with a collapsed prior.
        "difference": jnp.stack(differences),
        # Of a run of proximal steps to a filter that keeps its covariance: what Eq. (24) gives up.
        "filtered": jnp.stack(filtered),
    }
