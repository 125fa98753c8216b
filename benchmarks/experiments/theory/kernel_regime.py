"""Theorem 4 and its proof: the equations of Appendix C.1 pointwise and along flows."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.experiments.theory.flow import (
    Parts,
    draw,
    kernel_flow,
    loss,
    random_inputs,
    split_targets,
    velocity,
    wide_kernels,
)
from benchmarks.experiments.theory.gradients import explicit_loss
from benchmarks.experiments.theory.settings import NUM_TIMES, Found, in_float64, relative


def eigenvalue_rates(matrix: jax.Array, rate: jax.Array) -> jax.Array:
    """First-order change of the eigenvalues of a symmetric matrix, smallest eigenvalue first."""
    _, vectors = jnp.linalg.eigh(matrix)
    return jnp.einsum("ij,ik,kj->j", vectors, rate, vectors)


def identities_at(
    features: jax.Array, targets: jax.Array, ntk: jax.Array, beta: jax.Array
) -> dict[str, jax.Array]:
    """Eq. (33) and (40) at one point: relative differences, and whether eigenvalues fall."""
    star, perp, kernel = split_targets(features, targets, beta)
    # Through the solve, not by the library's rule: that is Eq. (28) itself.
    start = jnp.zeros_like(kernel)
    gradient = len(features) * jax.grad(explicit_loss)(features, targets, start, beta)
    inverse = jnp.linalg.inv(features.T @ features + beta * jnp.eye(features.shape[1]))
    motion = velocity(features, targets, ntk, beta)

    def products(features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        star = split_targets(features, targets, beta).star
        energy = features.T @ jnp.linalg.solve(ntk, features)
        return star.T @ star, targets.T @ star, energy

    values, rates = jax.jvp(products, (features,), (motion,))
    a, b = perp.T @ ntk @ perp, kernel.T @ kernel
    forty = 2 * (a @ b + b @ a)
    # One output: the first column on its own.
    single = targets[:, :1]
    _, single_rates = jax.jvp(
        lambda f: jnp.sum(split_targets(f, single, beta).star ** 2),
        (features,),
        (velocity(features, single, ntk, beta),),
    )
    growth = 4 * beta * kernel @ kernel.T
    # For beta = 0 both sides are zero: over the product of the factors instead.
    factors = jnp.linalg.norm(features) * jnp.linalg.norm(jnp.linalg.solve(ntk, motion))
    return {
        "gradient": relative(-2 * perp @ kernel.T, gradient),  # Eq. (28)
        # Eq. (33), which has Y_star for Y.
        "gradient_star": relative(-2 * perp @ (star.T @ features @ inverse), gradient),
        # Zero in the paper's Eq. (39).
        "orthogonality": jnp.linalg.norm(perp.T @ star) / jnp.linalg.norm(targets.T @ targets),
        "forty_star": relative(rates[0], forty),  # of d(Y_star^T Y_star)/dt, as in Eq. (40)
        "forty": relative(rates[1], forty),  # of d(Y^T Y_star)/dt
        # Of d(Phi^T K^{-1} Phi)/dt.
        "conserved": jnp.linalg.norm(rates[2] - growth)
        / jnp.where(beta > 0, jnp.linalg.norm(growth), factors),
        "falling": jnp.any(eigenvalue_rates(values[0], rates[0]) < 0),
        "falling_yy": jnp.any(eigenvalue_rates(values[1], rates[1]) < 0),
        "falling_single": single_rates < 0,
        "indefinite": jnp.linalg.eigvalsh(forty)[0] < 0,
    }


@in_float64
def check_identities(seed: int, betas: tuple[float, ...], num_draws: int) -> Found:
    """Draw features as an infinitely wide network has them and compare the equations."""
    kernels = wide_kernels(random_inputs(seed))
    root = jnp.linalg.cholesky(kernels.nngp)
    keys = jax.random.split(jax.random.key(seed + 1), num_draws)

    @jax.jit
    def at(beta: jax.Array) -> dict[str, jax.Array]:
        values = jax.vmap(lambda key: identities_at(*draw(key, root), kernels.ntk, beta))(keys)
        shares = ("falling", "falling_yy", "falling_single", "indefinite")
        return {k: jnp.mean(v) if k in shares else jnp.max(v) for k, v in values.items()}

    columns = [at(jnp.asarray(beta)) for beta in betas]
    stacked = {name: jnp.stack([column[name] for column in columns]) for name in columns[0]}
    return {"betas": betas, **stacked}


@in_float64
def check_flow(seed: int, beta: float, horizon: float) -> Found:
    """Flow from features of an infinitely wide network at initialization."""
    kernels = wide_kernels(random_inputs(seed))
    features, targets = draw(jax.random.key(seed), jnp.linalg.cholesky(kernels.nngp))
    time = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, horizon, NUM_TIMES - 1)])
    path = kernel_flow(features, targets, kernels.ntk, np.float64(beta), time)
    parts, losses, rates = along(path, targets, kernels.ntk, np.float64(beta))
    total = jnp.linalg.norm(targets)
    perp = jnp.linalg.norm(parts.perp, axis=(1, 2)) / total
    # Where nothing moves any more, the equation compares rounding errors.
    moving = perp > 1e-4
    last = -NUM_TIMES // 10
    eigenvalues = jnp.linalg.eigvalsh(jnp.einsum("no,tnp->top", targets, parts.star))
    return {
        "beta": beta,
        "time": time,  # (t,)
        "perp": perp,  # norm of Y_perp over that of Y
        "loss": losses / total**2,
        # Norm of the features over that at the start.
        "size": jnp.linalg.norm(path, axis=(1, 2)) / jnp.linalg.norm(features),
        # Of Y^T Y_star over the largest of Y^T Y, smallest first, (t, o).
        "eigenvalues": eigenvalues / jnp.linalg.eigvalsh(targets.T @ targets)[-1],
        # d log(perp) / d log(time) over the last tenth of the times.
        "slope": jnp.log(perp[-1] / perp[last]) / jnp.log(time[-1] / time[last]),
        "forty": jnp.max(jnp.where(moving, rates["forty"], 0)),  # on the path
        "forty_star": jnp.max(jnp.where(moving, rates["forty_star"], 0)),
    }


@jax.jit
def along(
    path: jax.Array, targets: jax.Array, ntk: jax.Array, beta: jax.Array
) -> tuple[Parts, jax.Array, dict[str, jax.Array]]:
    """Parts, losses and `identities_at` of features on a path, leaves (t, ...)."""
    return jax.vmap(
        lambda f: (
            split_targets(f, targets, beta),
            loss(f, targets, beta),
            identities_at(f, targets, ntk, beta),
        )
    )(path)


@in_float64
def check_eigenvalues(seed: int, num_starts: int, horizon: float) -> Found:
    """Theorem 4's argument: eigenvalues of Y_star^T Y_star along many flows, beta = 0."""
    kernels = wide_kernels(random_inputs(seed))
    root = jnp.linalg.cholesky(kernels.nngp)
    keys = jax.random.split(jax.random.key(seed + 2), num_starts)
    time = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, horizon, NUM_TIMES - 1)])

    def course(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, targets = draw(key, root)
        path = kernel_flow(features, targets, kernels.ntk, np.float64(0), time)
        parts, *_ = along(path, targets, kernels.ntk, np.float64(0))
        eigenvalues = jnp.linalg.eigvalsh(jnp.einsum("tno,tnp->top", parts.star, parts.star))
        return eigenvalues, jnp.linalg.norm(parts.perp[-1]) / jnp.linalg.norm(targets)

    # One at a time: batched, each would take the steps of the stiffest.
    eigenvalues, perp = (jnp.stack(rows) for rows in zip(*map(course, keys), strict=True))
    before = jax.lax.cummax(eigenvalues, axis=1)
    falls = jnp.max(1 - eigenvalues / before, axis=(1, 2))
    worst = eigenvalues[jnp.argmax(falls)]
    return {
        "time": time,  # (t,)
        "falls": falls,  # largest below an earlier value, over that value, per flow
        "perp": perp,  # norm of Y_perp over that of Y at the end, per flow
        "worst": worst / worst[-1, -1],  # of the flow with the largest fall, (t, o)
    }
