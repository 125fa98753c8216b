r"""theory: the paper's theorems as numbers (Sections 3 to 5, Appendices A and C), in float64.

Every check is a pure function that returns a NamedTuple. Below, samples come first as everywhere
here: features Phi are (n, d), targets Y are (n, o), the head's kernel W is (d, o). These are the
transposes of the paper's matrices. With the ridge hat matrix H, of eigenvalues s^2 / (s^2 + beta),

    H = Phi (Phi^T Phi + beta I)^{-1} Phi^T                                                 (29)
    Y_star = H Y = Phi W_star,   Y_perp = (I - H) Y                                         (29)
    L_star(Phi) = tr(Y^T Y_perp),   grad L_star(Phi) = -2 Y_perp W_star^T                   (28)

Kernel gradient flow moves features by the tangent kernel *between samples*. Vectorized, it is an
(n d) x (n d) matrix; in the infinite-width limit it is K x I, with K of shape (n, n), so

    dPhi/dt = -K grad L_star(Phi) = 2 K Y_perp W_star^T                                 (36, 37)
    d(Y^T Y_star)/dt = 2 (A B + B A),  A = Y_perp^T K Y_perp,  B = W_star^T W_star     (like 40)
    d(Phi^T K^{-1} Phi)/dt = 4 beta W_star W_star^T

for every beta >= 0. (Derivation: dH = (I - H) dPhi M Phi^T + its transpose, with M = (Phi^T Phi +
beta I)^{-1} and Phi^T (I - H) = beta M Phi^T.) Where the paper has something else, a check measures
the difference: it multiplies by a d x d matrix on the features' side in (37), has Y_star for Y in
(33) and in the left side of (40), and infers from A >= 0, B > 0 that A B + B A >= 0.

Top of the benchmarks: one experiment, one command. Knows cfll, no data sets and no Flax.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import diffrax
import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.special import erf
from rich.console import Console

import cfll
from benchmarks.core.records import Record, Records
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Claim, Summary, Table, show

Preset = Literal["cpu", "paper"]
P = ParamSpec("P")
R = TypeVar("R")
Array = jax.Array | np.ndarray


class Settings(NamedTuple):
    """Everything that determines the numbers; with a check's name it is the key of its record.

    Attributes:
      seed: of everything random.
      num_networks: networks of the gradient identities.
      num_draws: random features and targets of the pointwise identities.
      num_starts: flows of the eigenvalues' course.
      betas: ridge penalties of the flows; the first is 0.
      horizon: end of the flows with beta > 0.
      horizon_zero: end of those with beta = 0, which are fast, and stiff at their end.
      widths: hidden units of the finite networks.
      num_nets: networks per width.
      num_steps: gradient steps of the finite networks.
      step_size: of those steps; their time is `num_steps * step_size`.
    """

    seed: int = 0
    num_networks: int = 7
    num_draws: int = 400
    num_starts: int = 40
    betas: tuple[float, ...] = (0.0, 1e-3, 0.1, 1.0)
    horizon: float = 1e5
    horizon_zero: float = 30.0
    widths: tuple[int, ...] = (128, 512, 2048)
    num_nets: int = 12
    num_steps: int = 2000
    step_size: float = 1e-3


PRESETS: dict[Preset, Settings] = {
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


def in_float64(check: Callable[P, R]) -> Callable[P, R]:
    """Run in float64 and return NumPy: outside, JAX would make float32 of it."""

    @wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(True):
            result: R = jax.tree.map(np.asarray, check(*args, **kwargs))
            return result

    return run


def relative(difference: Any, reference: Any) -> jax.Array:
    """Norm of a difference over the norm of what it should be, of trees."""

    def norm(tree: Any) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))

    return norm(jax.tree.map(jnp.subtract, difference, reference)) / norm(reference)


# Section 3 and 4: Theorems 1 and 2 ----------------------------------------------------------------


class Envelope(NamedTuple):
    """Theorems 1 and 2 on one network, for several penalties.

    Attributes:
      sizes: depth, width, d, o, n of the network and its batch.
      penalties: beta and lam, shape (p,).
      ridge: relative difference of the gradients of theta, of `cfll.ridge_loss` against automatic
        differentiation through an explicit solve, (p,).
      prox: the same of `cfll.prox_loss`.
      fixed: the same of ordinary backpropagation of Eq. (10) at the fixed proximal head, Eq. (16).
    """

    sizes: Array
    penalties: Array
    ridge: Array
    prox: Array
    fixed: Array


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
def check_envelope(seed: int, penalties: tuple[float, ...] = (1e-4, 1e-2, 1.0, 100.0)) -> Envelope:
    """Compare the gradients on a network whose sizes are drawn from the seed."""
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
    return Envelope(np.array([depth, width, d, o, n]), np.array(penalties), ridge, prox, fixed)


# Section 5: the loss as a function of the features ------------------------------------------------


class Parts(NamedTuple):
    """The targets in two parts, Eq. (29), and the head.

    Attributes:
      star: Y_star, attainable, (n, o).
      perp: Y_perp, the rest, (n, o).
      kernel: W_star, (d, o).
    """

    star: jax.Array
    perp: jax.Array
    kernel: jax.Array


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
    """Gaussian features and targets.

    Args:
      key: random key.
      root: factor of the features' covariance between samples, (n, n).

    Returns:
      Features (n, d), targets (n, o), standard normal.
    """
    key_features, key_targets = jax.random.split(key)
    features = root @ jax.random.normal(key_features, (len(root), NUM_FEATURES))
    return features, jax.random.normal(key_targets, (len(root), NUM_OUTPUTS))


class Convexity(NamedTuple):
    """Theorem 3: the loss along straight lines through function space.

    Attributes:
      betas: (b,).
      position: in [-1, 1], on the segment from -phi to phi, (m,).
      segment: loss there over that of phi = 0, (b, m).
      excess: loss at the midpoint minus that at the ends, over the latter, (b,).
      scale: factors c, (m,).
      scaled: loss of c phi over that of phi = 0, (b, m).
    """

    betas: Array
    position: Array
    segment: Array
    excess: Array
    scale: Array
    scaled: Array


@in_float64
def check_convexity(seed: int, betas: tuple[float, ...], num_points: int = 81) -> Convexity:
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
    return Convexity(
        positive,
        position,
        segment,
        excess=segment[:, num_points // 2] / segment[:, 0] - 1,
        scale=scale,
        scaled=jnp.stack([along(scale, beta) for beta in positive]),
    )


class Critical(NamedTuple):
    """Theorem 3: critical points that are not minima. Losses are over ||Y||^2.

    Attributes:
      betas: (b,).
      zero: gradient norm at phi = 0, (b,).
      orthogonal: gradient norm at features orthogonal to all outputs, over that at random features.
      orthogonal_loss: loss there.
      step: lengths of a step from there along a direction that is not orthogonal, (m,).
      decrease: of the loss by that step, (b, m).
      slope: exponent of the decrease in the step.
      partial: gradient norm at features that span one of the two principal outputs, over that at
        random features. Critical for beta = 0, not for beta > 0.
      partial_loss: loss there.
      reached: norm of Y_perp over that of Y after a kernel flow with beta = 0 from a point near the
        last one, at distance 1e-3.
    """

    betas: Array
    zero: Array
    orthogonal: Array
    orthogonal_loss: Array
    step: Array
    decrease: Array
    slope: Array
    partial: Array
    partial_loss: Array
    reached: Array


@in_float64
def check_critical(seed: int, betas: tuple[float, ...]) -> Critical:
    """Look at phi = 0, at features orthogonal to the outputs, and at those attaining one of two."""
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
    return Critical(
        np.asarray(betas),
        zero=jnp.stack(
            [jnp.linalg.norm(gradient(0 * features, targets, beta)) for beta in positive]
        ),
        orthogonal=norms(orthogonal),
        orthogonal_loss=losses(orthogonal),
        step=step,
        decrease=decrease,
        slope=jnp.log(decrease[:, 10] / decrease[:, 0]) / jnp.log(step[10] / step[0]),
        partial=norms(partial_fit),
        partial_loss=losses(partial_fit),
        reached=jnp.linalg.norm(jax.jit(split_targets)(flow[-1], targets, 0.0).perp)
        / jnp.sqrt(total),
    )


# Appendix C.1: the kernel regime ------------------------------------------------------------------


class Kernels(NamedTuple):
    """Kernels of an infinitely wide network between n samples, (n, n); both times I over d.

    Attributes:
      nngp: covariance of the features at initialization, the paper's NGPK.
      ntk: the tangent kernel, the paper's K(X, X).
    """

    nngp: jax.Array
    ntk: jax.Array


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

    Args:
      features: at the first time, (n, d).
      targets: (n, o).
      ntk: (n, n).
      beta: ridge penalty.
      times: rising, in units of the flow, (t,).

    Returns:
      Features at the times, (t, n, d).
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


class Identities(NamedTuple):
    """Eq. (33) and (40) at random features, per beta. All are largest relative differences, (b,).

    Attributes:
      betas: (b,).
      gradient: of Eq. (28) against automatic differentiation.
      gradient_star: of Eq. (33), which has Y_star for Y.
      orthogonality: norm of Y_perp^T Y_star over that of Y^T Y; zero in the paper's Eq. (39).
      forty_star: of d(Y_star^T Y_star)/dt against 2 (A B + B A), as in Eq. (40).
      forty: the same for d(Y^T Y_star)/dt.
      conserved: of d(Phi^T K^{-1} Phi)/dt against 4 beta W W^T; for beta = 0, where both are
        zero, over the norms of its factors.
      falling: share of the draws in which an eigenvalue of Y_star^T Y_star falls.
      falling_yy: the same for Y^T Y_star.
      falling_single: the same as `falling` with one output only.
      indefinite: share of the draws in which A B + B A has a negative eigenvalue.
    """

    betas: Array
    gradient: Array
    gradient_star: Array
    orthogonality: Array
    forty_star: Array
    forty: Array
    conserved: Array
    falling: Array
    falling_yy: Array
    falling_single: Array
    indefinite: Array


def eigenvalue_rates(matrix: jax.Array, rate: jax.Array) -> jax.Array:
    """First-order change of the eigenvalues of a symmetric matrix, smallest eigenvalue first."""
    _, vectors = jnp.linalg.eigh(matrix)
    return jnp.einsum("ij,ik,kj->j", vectors, rate, vectors)


def identities_at(
    features: jax.Array, targets: jax.Array, ntk: jax.Array, beta: jax.Array
) -> dict[str, jax.Array]:
    """Everything of `Identities` at one point."""
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
        "gradient": relative(-2 * perp @ kernel.T, gradient),
        "gradient_star": relative(-2 * perp @ (star.T @ features @ inverse), gradient),
        "orthogonality": jnp.linalg.norm(perp.T @ star) / jnp.linalg.norm(targets.T @ targets),
        "forty_star": relative(rates[0], forty),
        "forty": relative(rates[1], forty),
        "conserved": jnp.linalg.norm(rates[2] - growth)
        / jnp.where(beta > 0, jnp.linalg.norm(growth), factors),
        "falling": jnp.any(eigenvalue_rates(values[0], rates[0]) < 0),
        "falling_yy": jnp.any(eigenvalue_rates(values[1], rates[1]) < 0),
        "falling_single": single_rates < 0,
        "indefinite": jnp.linalg.eigvalsh(forty)[0] < 0,
    }


@in_float64
def check_identities(seed: int, betas: tuple[float, ...], num_draws: int) -> Identities:
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
    return Identities(np.asarray(betas), **stacked)


class Flow(NamedTuple):
    """Theorem 4: one kernel gradient flow.

    Attributes:
      beta: ridge penalty.
      time: (t,).
      perp: norm of Y_perp over that of Y, (t,).
      loss: L_star over ||Y||^2, (t,).
      size: norm of the features over that at the start, (t,).
      eigenvalues: of Y^T Y_star over the largest of Y^T Y, smallest first, (t, o).
      slope: d log(perp) / d log(time) over the last tenth of the times.
      forty: largest relative difference of d(Y^T Y_star)/dt and 2 (A B + B A) on the path.
      forty_star: the same for d(Y_star^T Y_star)/dt.
    """

    beta: Array
    time: Array
    perp: Array
    loss: Array
    size: Array
    eigenvalues: Array
    slope: Array
    forty: Array
    forty_star: Array


@in_float64
def check_flow(seed: int, beta: float, horizon: float) -> Flow:
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
    return Flow(
        np.asarray(beta),
        time,
        perp,
        loss=losses / total**2,
        size=jnp.linalg.norm(path, axis=(1, 2)) / jnp.linalg.norm(features),
        eigenvalues=jnp.linalg.eigvalsh(jnp.einsum("no,tnp->top", targets, parts.star))
        / jnp.linalg.eigvalsh(targets.T @ targets)[-1],
        slope=jnp.log(perp[-1] / perp[last]) / jnp.log(time[-1] / time[last]),
        forty=jnp.max(jnp.where(moving, rates["forty"], 0)),
        forty_star=jnp.max(jnp.where(moving, rates["forty_star"], 0)),
    )


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


class Eigenvalues(NamedTuple):
    """Theorem 4's argument: eigenvalues of Y_star^T Y_star along many flows, beta = 0.

    Attributes:
      time: (t,).
      falls: largest fall of an eigenvalue below an earlier value of it, over that value, per flow.
      perp: norm of Y_perp over that of Y at the end, per flow.
      worst: eigenvalues of the flow with the largest fall, over its largest at the end, (t, o).
    """

    time: Array
    falls: Array
    perp: Array
    worst: Array


@in_float64
def check_eigenvalues(seed: int, num_starts: int, horizon: float) -> Eigenvalues:
    """Flow from many initial features and targets."""
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
    return Eigenvalues(time, falls, perp, worst / worst[-1, -1])


# Finite networks ----------------------------------------------------------------------------------


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


class Wide(NamedTuple):
    """Networks of one width against the kernel flow from the same initial features.

    Attributes:
      width: hidden units.
      time: (t,).
      net: norm of Y_perp over that of Y of the first network under gradient descent, (t,).
      flow: the same of the kernel flow.
      deviation: largest relative distance of the features on the path, per network.
      velocity: relative distance of dPhi/dt at the start from Eq. (36) with the kernel of infinite
        width on the samples' side, per network.
      left: the same from the best d x d matrix on the features' side, as Eq. (37) has it.
    """

    width: Array
    time: Array
    net: Array
    flow: Array
    deviation: Array
    velocity: Array
    left: Array


@in_float64
def check_width(
    seed: int,
    width: int,
    num_nets: int,
    num_steps: int,
    step_size: float,
    beta: float = 0.1,
) -> Wide:
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
    return Wide(
        np.asarray(width),
        time,
        *curves[0],
        jnp.stack(deviations),
        jnp.stack(velocities),
        jnp.stack(lefts),
    )


# Appendix A ---------------------------------------------------------------------------------------


class Kalman(NamedTuple):
    """The proximal step against a textbook filter.

    Attributes:
      lams: sigma_Y^2 / sigma_W^2, per problem.
      difference: relative, of `cfll.prox_solve` to one measurement update with a collapsed prior.
      filtered: relative distance of a run of proximal steps over batches to the Kalman filter that
        keeps its covariance: what Eq. (24) gives up.
    """

    lams: Array
    difference: Array
    filtered: Array


def measurement_update(
    mean: np.ndarray,
    covariance: np.ndarray,
    features: np.ndarray,
    targets: np.ndarray,
    noise: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The textbook Kalman update of vec(W), with gain and innovation; NumPy, no cfll.

    Args:
      mean: of vec(W), kernel entries row by row, (d o,).
      covariance: of vec(W), (d o, d o).
      features: (n, d).
      targets: (n, o).
      noise: sigma_Y^2, the variance of every target.

    Returns:
      The mean and the covariance after the batch.
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
) -> Kalman:
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
    return Kalman(np.asarray(lams), jnp.stack(differences), jnp.stack(filtered))


# The experiment -----------------------------------------------------------------------------------

Runs = list[dict[str, np.ndarray]]


def checks(settings: Settings) -> dict[str, Callable[[], list[Any]]]:
    """Name -> what to run. A check may be several runs."""
    seed, betas = settings.seed, settings.betas
    return {
        "envelope": lambda: [check_envelope(seed + i) for i in range(settings.num_networks)],
        "convexity": lambda: [check_convexity(seed, betas)],
        "critical": lambda: [check_critical(seed, betas)],
        "identities": lambda: [check_identities(seed, betas, settings.num_draws)],
        "flow": lambda: [
            check_flow(seed, beta, settings.horizon if beta > 0 else settings.horizon_zero)
            for beta in betas
        ],
        "eigenvalues": lambda: [
            check_eigenvalues(seed, settings.num_starts, settings.horizon_zero)
        ],
        "width": lambda: [
            check_width(seed, width, settings.num_nets, settings.num_steps, settings.step_size)
            for width in settings.widths
        ],
        "kalman": lambda: [check_kalman(seed, 10)],
    }


def key_of(preset: Preset, check: str) -> Record:
    """What the record of a check is filed under."""
    return {"experiment": "theory", "check": check, "settings": PRESETS[preset]._asdict()}


def to_record(result: Any) -> Record:
    """A NamedTuple of arrays as lists and numbers."""
    return {name: np.asarray(value).tolist() for name, value in result._asdict().items()}


def summarize(records: Records, figures: Path, preset: Preset) -> Summary:
    """Draw the figures and say which sentences of the paper hold.

    Args:
      records: results of `theory`.
      figures: folder of the figures, made if it is not there.
      preset: which results.
    """
    settings = PRESETS[preset]
    results: dict[str, Runs] = {}
    for name in checks(settings):
        record = records.get(key_of(preset, name))
        if record is not None:
            results[name] = [
                {field: np.asarray(value) for field, value in run.items()} for run in record["runs"]
            ]
    figures.mkdir(parents=True, exist_ok=True)
    paths = []
    for needed, drawing in DRAWINGS.items():
        if all(name in results for name in needed):
            path = figures / f"theory_{needed[0]}.png"
            drawing(*(results[name] for name in needed), path)
            paths.append(path)
    return Summary(
        title="The theorems as numbers (Sections 3 to 5, Appendices A and C)",
        command=f"python -m benchmarks theory --preset {preset}",
        setup=setup_of(settings),
        tables=[] if "identities" not in results else [identities_table(results["identities"][0])],
        claims=claims_of(results),
        figures=paths,
    )


def setup_of(settings: Settings) -> str:
    """Sizes, and what is ours."""
    return (
        f"float64, every number from formulas and seeds. Flows: n = {NUM_SAMPLES} samples, d = "
        f"{NUM_FEATURES} features, o = {NUM_OUTPUTS} outputs, the closed-form kernels of one "
        "hidden layer of erf units, features of the network at initialization. Features are the "
        "pre-activations of the last layer: behind a nonlinearity, as in Eq. (34), their tangent "
        "kernel is not constant. β = 0 is the limit of the proofs' projections; the paper has β > "
        "0. Formulas as in the paper, W is o x d, Φ is d x n; K is the n x n tangent kernel "
        "between samples. Finite networks: one hidden layer, full-batch gradient "
        f"descent, {settings.num_steps} steps of {settings.step_size:g}, β = 0.1, "
        f"{settings.num_nets} networks per width."
    )


def identities_table(found: dict[str, np.ndarray]) -> Table:
    """One row per beta."""
    columns = {
        "Eq. (28)": "gradient",
        "Eq. (33)": "gradient_star",
        "Y⊥Y*ᵀ (zero in (39))": "orthogonality",
        "(40), left side Y*Y*ᵀ": "forty_star",
        "(40), left side YY*ᵀ": "forty",
        "λ falls": "falling",
        "AB + BA indefinite": "indefinite",
    }
    shares = ("falling", "indefinite")
    return Table(
        caption=(
            "Random features and targets: largest relative differences (Y⊥Y*ᵀ: norm over that of "
            "YYᵀ), and shares of the draws in which an eigenvalue of Y*Y*ᵀ falls along the flow, "
            "and in which the right side of Eq. (40) has a negative eigenvalue."
        ),
        headings=("β", *columns),
        rows=tuple(
            (
                f"{beta:g}",
                *(
                    f"{found[name][i]:.0%}" if name in shares else f"{found[name][i]:.0e}"
                    for name in columns.values()
                ),
            )
            for i, beta in enumerate(found["betas"])
        ),
    )


class Sentence(NamedTuple):
    """A sentence, the checks it needs, and how to decide it."""

    text: str
    needs: tuple[str, ...]
    decide: Callable[..., tuple[bool, str]]


def claims_of(results: dict[str, Runs]) -> list[Claim]:
    """Every sentence, decided by the checks that there are."""
    claims = []
    for sentence in SENTENCES:
        if all(name in results for name in sentence.needs):
            holds, evidence = sentence.decide(*(results[name] for name in sentence.needs))
            claims.append(Claim(sentence.text, bool(holds), evidence))
        else:
            claims.append(Claim(sentence.text, None, "not run"))
    return claims


def worst_of(runs: Runs, name: str) -> float:
    """The largest value of a field."""
    return float(max(np.max(run[name]) for run in runs))


def well_posed(runs: Runs, name: str) -> float:
    """The largest value of a field of `Envelope` where the penalty is at least one."""
    return float(max(np.max(run[name][run["penalties"] >= 1]) for run in runs))


def decide_ridge(runs: Runs) -> tuple[bool, str]:
    """Theorem 1. What is left is the rounding of the library's head.

    The gradient at a fixed head takes over the head's error. It is largest on the dual route with
    more samples than features, which "auto" does not take; the explicit solve agrees with the qr
    route to 1e-12 there.
    """
    worst, typical = worst_of(runs, "ridge"), well_posed(runs, "ridge")
    return typical < 1e-10 and worst < 1e-6, (
        f"largest relative difference {typical:.0e} to automatic differentiation through the "
        f"solve for β of 1 and 100, {len(runs)} networks, all routes of the solver in turn; "
        f"{worst:.0e} down to β = 1e-4: rounding of the head, largest on the dual route with n > d"
    )


def decide_prox(runs: Runs) -> tuple[bool, str]:
    """Theorem 2."""
    names = ("prox", "fixed")
    worst = max(worst_of(runs, name) for name in names)
    typical = max(well_posed(runs, name) for name in names)
    return typical < 1e-10 and worst < 1e-6, (
        f"the same for `prox_loss` and for ordinary backpropagation of the batch's loss at the "
        f"fixed head: {typical:.0e} for λ of 1 and 100, {worst:.0e} down to 1e-4"
    )


def decide_convexity(runs: Runs) -> tuple[bool, str]:
    """Theorem 3, first half."""
    (run,) = runs
    excess = ", ".join(
        f"{e:.0%} (β = {b:g})" for e, b in zip(run["excess"], run["betas"], strict=True)
    )
    return bool(np.all(run["excess"] > 0)), (
        f"between φ and -φ, whose losses are equal, the loss of the midpoint is higher by {excess}"
    )


def decide_critical(runs: Runs) -> tuple[bool, str]:
    """Theorem 3, second half."""
    (run,) = runs
    gradient = max(run["orthogonal"].max(), run["zero"].max())
    return gradient < 1e-10 and bool(np.all(run["decrease"] > 0)), (
        "at φ = 0 and at features orthogonal to all outputs the gradient is at most "
        f"{gradient:.0e} of an ordinary one, and the loss is ||Y||², its largest value; a step ε "
        f"aside lowers it by c ε^{run['slope'].mean():.2f}"
    )


def decide_minimizer(critical: Runs, convexity: Runs) -> tuple[bool, str]:
    """Section 5 on minimizers, for beta > 0."""
    (run,), (lines,) = critical, convexity
    falls = bool(np.all(np.diff(lines["scaled"], axis=1) < 0))
    return not falls, (
        "for β > 0 the loss of c φ falls for all c up to 100 (the head shrinks as the features "
        "grow): its infimum is not attained, and Φᵀ∇L* = -2 Y*ᵀY⊥ vanishes only where Y* = 0. "
        "Features that attain one of two outputs exactly are critical at β = 0 (relative gradient "
        f"{run['partial'][0]:.0e}) and not at β = {run['betas'][1]:g} ({run['partial'][1]:.2f})"
    )


def decide_gradient(runs: Runs) -> tuple[bool, str]:
    """Eq. (33)."""
    (run,) = runs
    by_beta = ", ".join(
        f"{g:.0e} (β = {b:g})" for g, b in zip(run["gradient_star"], run["betas"], strict=True)
    )
    return run["gradient_star"].max() < 1e-8, (
        f"largest relative difference to automatic differentiation {by_beta}; Eq. (28), with Y for "
        f"Y*, {run['gradient'].max():.0e} at all β. VᵀY* = Σ²(Σ² + β)⁻¹VᵀY in Eq. (32)"
    )


def decide_orientation(runs: Runs) -> tuple[bool, str]:
    """Eq. (37)."""
    widest = runs[-1]
    left, right = widest["left"].mean(), widest["velocity"].mean()
    return left < right, (
        f"dΦ/dt of networks of width {int(widest['width'])} is {right:.0%} from K acting on the "
        f"samples (n x n), and {left:.0%} from the best matrix of features there is (means)"
    )


def decide_flow(flows: Runs, starts: Runs) -> tuple[bool, str]:
    """Theorem 4, its conclusion."""
    zero, *positive = flows
    tails = ", ".join(
        f"t^{run['slope']:.2f} to {run['perp'][-1]:.0e} while the features grow "
        f"{run['size'][-1]:.1f} times (β = {run['beta']:g})"
        for run in positive
    )
    count, reached = len(starts[0]["perp"]), starts[0]["perp"].max()
    falling = all(run["perp"][-1] < 0.05 * run["perp"][0] for run in positive)
    return falling and reached < 1e-2, (
        f"||Y⊥|| / ||Y||: exponentially for β = 0 ({zero['perp'][-1]:.0e} at t = "
        f"{zero['time'][-1]:g}; {count} random starts, all below {reached:.0e}); as a power for "
        f"β > 0, {tails}, so L* tends to its infimum 0 but the features do not converge"
    )


def decide_forty(runs: Runs, flows: Runs) -> tuple[bool, str]:
    """Eq. (40) as it stands."""
    (run,) = runs
    off = ", ".join(
        f"{d:.0e} (β = {b:g})" for d, b in zip(run["forty_star"], run["betas"], strict=True)
    )
    return run["forty_star"].max() < 1e-8, (
        f"largest relative difference {off}; exact at β = 0 only, because Y⊥Y*ᵀ = YH(I - H)Yᵀ is "
        f"not zero (up to {run['orthogonality'].max():.0%} of YYᵀ) and outweighs A late in a flow "
        f"(difference {max(f['forty_star'] for f in flows[1:]):.0%})"
    )


def decide_forty_repaired(runs: Runs, flows: Runs) -> tuple[bool, str]:
    """Eq. (40) for Y^T Y_star."""
    (run,) = runs
    worst = max(run["forty"].max(), *(flow["forty"] for flow in flows))
    return worst < 1e-8 and run["conserved"].max() < 1e-8, (
        f"largest relative difference {worst:.0e} (with A = Y⊥KY⊥ᵀ and B = W*W*ᵀ, all β, at random "
        "features and along the flows); the features' size obeys d(ΦK⁻¹Φᵀ)/dt = 4β W*ᵀW* "
        f"({run['conserved'].max():.0e}): conserved for β = 0, without bound for β > 0"
    )


def decide_monotone(runs: Runs, starts: Runs) -> tuple[bool, str]:
    """The eigenvalues of Y_star^T Y_star."""
    (run,), (many,) = runs, starts
    share = np.mean(many["falls"] > 1e-3)
    count = len(many["falls"])
    return bool(np.all(run["falling"] == 0) and share == 0), (
        "A ⪰ 0 and B ≻ 0 do not make AB + BA ⪰ 0: at random features it has a negative eigenvalue "
        f"in {run['indefinite'][0]:.0%} of the draws (β = 0, o = 2) and an eigenvalue of Y*Y*ᵀ "
        f"falls in {run['falling'][0]:.0%}; along {count} flows one falls by more than 0.1% in "
        f"{share:.0%}, at most by {many['falls'].max():.0%}. All of these flows reach Y⊥ = 0 anyway"
    )


def decide_monotone_single(runs: Runs) -> tuple[bool, str]:
    """The same with one output."""
    (run,) = runs
    return bool(np.all(run["falling_single"] == 0)), (
        f"Y*Y*ᵀ, a number, falls in {run['falling_single'].max():.0%} of the draws, for every β"
    )


def decide_saddle(runs: Runs) -> tuple[bool, str]:
    """Critical points at beta = 0 are left."""
    (run,) = runs
    return bool(run["reached"] < 1e-3), (
        f"from 1e-3 beside a critical point with {run['partial_loss'][0]:.0%} of ||Y||² left, the "
        f"flow reaches ||Y⊥|| / ||Y|| = {run['reached']:.0e} (β = 0)"
    )


def decide_width(runs: Runs) -> tuple[bool, str]:
    """Finite networks follow the flow."""
    means = [float(run["deviation"].mean()) for run in runs]
    widths = [int(run["width"]) for run in runs]
    falling = all(b < a for a, b in itertools.pairwise(means))
    rate = ""
    if len(runs) > 1:
        slope = np.polyfit(np.log(widths), np.log(means), 1)[0]
        rate = f" (about width^{slope:.2f})"
    listed = ", ".join(f"{m:.1%} at {w}" for m, w in zip(means, widths, strict=True))
    return falling and means[-1] < 0.1, (
        "largest relative deviation of the features on the path, mean of "
        f"{len(runs[0]['deviation'])} networks: {listed}{rate}"
    )


def decide_kalman(runs: Runs) -> tuple[bool, str]:
    """Appendix A."""
    (run,) = runs
    return run["difference"].max() < 1e-9, (
        f"largest relative difference {run['difference'].max():.0e} over {len(run['lams'])} "
        f"problems, λ from {run['lams'].min():.0e} to {run['lams'].max():.0e}; the collapse of the "
        f"covariance moves the head by {np.median(run['filtered']):.0%} (median) after five batches"
    )


SENTENCES = (
    Sentence(
        "Theorem 1: the gradient of L* is that of the loss at the fixed head W*.",
        ("envelope",),
        decide_ridge,
    ),
    Sentence(
        "Theorem 2: the same for the proximal loss, without its penalty.",
        ("envelope",),
        decide_prox,
    ),
    Sentence("Theorem 3: L* is not convex in the features.", ("convexity",), decide_convexity),
    Sentence(
        "Theorem 3: there are critical points that are not minima, φ = 0 among them.",
        ("critical",),
        decide_critical,
    ),
    Sentence(
        "Section 5: some critical points are minimizers that balance the fit and β.",
        ("critical", "convexity"),
        decide_minimizer,
    ),
    Sentence("Eq. (33): ∇L* = -2 (ΦΦᵀ + βI)⁻¹ΦY*ᵀY⊥.", ("identities",), decide_gradient),
    Sentence(
        "Eq. (37): the tangent kernel acts as a d x d matrix on the features.",
        ("width",),
        decide_orientation,
    ),
    Sentence(
        "Theorem 4: under kernel gradient flow, Y⊥ tends to zero.",
        ("flow", "eigenvalues"),
        decide_flow,
    ),
    Sentence(
        "Eq. (40): d(Y*Y*ᵀ)/dt = 2(AB + BA) along the flow.", ("identities", "flow"), decide_forty
    ),
    Sentence(
        "Ours: for every β it holds with YY*ᵀ in place of Y*Y*ᵀ.",
        ("identities", "flow"),
        decide_forty_repaired,
    ),
    Sentence(
        "Appendix C.1: the positive eigenvalues of Y*Y*ᵀ never fall.",
        ("identities", "eigenvalues"),
        decide_monotone,
    ),
    Sentence("They do not with one output.", ("identities",), decide_monotone_single),
    Sentence(
        "Ours: the flow leaves critical points that are not minima.", ("critical",), decide_saddle
    ),
    Sentence(
        "Section 5: wide networks trained on L* follow the kernel flow, the wider the closer.",
        ("width",),
        decide_width,
    ),
    Sentence(
        "Appendix A: the proximal step is a Kalman update with the covariance collapsed, "
        "λ = variance of the targets over variance of a step of W.",
        ("kalman",),
        decide_kalman,
    ),
)


# Figures ------------------------------------------------------------------------------------------


def draw_convexity(convexity: Runs, critical: Runs, path: Path) -> None:
    """The lines of Theorem 3."""
    (lines,), (points,) = convexity, critical
    with mpl.rc_context(plots.STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(10.5, 3.6), layout="constrained"
        )
        for i, (beta, line) in enumerate(zip(lines["betas"], plots.LINES, strict=False)):
            label = f"β = {beta:g}"
            left.plot(lines["position"], lines["segment"][i], label=label, **line)
            ends = lines["segment"][i][[0, -1]]
            left.plot([-1, 1], ends, color="0.6", linewidth=0.8)
            middle.loglog(points["step"], points["decrease"][i], label=label, **line)
            right.semilogx(lines["scale"], lines["scaled"][i], label=label, **line)
        left.set(xlabel="c, from -φ to φ (thin: chords)", ylabel="L*(cφ) / ||Y||²")
        left.set_title("not convex")
        middle.set(xlabel="step from features orthogonal to Y", ylabel="decrease of L* / ||Y||²")
        middle.set_title("a critical point, not a minimum")
        right.set(xlabel="c", ylabel="L*(cφ) / ||Y||²", title="no minimizer for β > 0")
        middle.legend()
        figure.savefig(path)
        plt.close(figure)


def draw_flow(flows: Runs, path: Path) -> None:
    """Theorem 4's flows."""
    with mpl.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
        for run, line in zip(flows, plots.LINES, strict=False):
            time, label = run["time"][1:], f"β = {run['beta']:g}"
            left.loglog(time, run["perp"][1:], label=label, **line)
            right.loglog(time, run["size"][1:], label=label, **line)
        time = flows[-1]["time"][-20:]
        perp = flows[-1]["perp"][-20]
        left.loglog(time, 3 * perp * (time / time[0]) ** -0.5, color="0.5", lw=0.8)
        left.annotate("slope -1/2", (time[6], 4 * perp * (time[6] / time[0]) ** -0.5), color="0.3")
        left.set(xlabel="time of the flow", ylabel="||Y⊥|| / ||Y||", title="unattained targets")
        right.set(
            xlabel="time of the flow", ylabel="||Φ|| / ||Φ(0)||", title="size of the features"
        )
        left.legend()
        figure.savefig(path)
        plt.close(figure)


def draw_eigenvalues(eigenvalues: Runs, identities: Runs, path: Path) -> None:
    """An eigenvalue that falls, and what is left out of Eq. (40)."""
    (many,), (found,) = eigenvalues, identities
    black, orange, blue, *_ = plots.LINES
    with mpl.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
        time = many["time"][1:]
        left.semilogx(time, many["worst"][1:, 1], label="larger", **black)
        left.semilogx(time, many["worst"][1:, 0], label="smaller", **orange)
        left.set(xlabel="time of the flow", ylabel="eigenvalue of Y*Y*ᵀ / largest at the end")
        left.set(title="β = 0, o = 2: the largest fall", ylim=(0, None))
        left.legend()
        # Beta = 0 is a point of the axis, too: at the left edge.
        betas, floor = found["betas"], 1e-16
        at = np.where(betas > 0, betas, betas[betas > 0].min() / 100)
        for name, label, line in (
            ("forty_star", "left side Y*Y*ᵀ, as in Eq. (40)", orange),
            ("forty", "left side YY*ᵀ", black),
            ("orthogonality", "||Y⊥Y*ᵀ|| / ||YYᵀ||, zero in Eq. (39)", blue),
        ):
            right.loglog(at, np.maximum(found[name], floor), marker="o", label=label, **line)
        right.set_xticks(at, labels=[f"{beta:g}" for beta in betas])
        right.minorticks_off()
        right.set(xlabel="β", ylabel="largest relative difference", title="Eq. (40)")
        right.legend()
        figure.savefig(path)
        plt.close(figure)


def draw_width(runs: Runs, path: Path) -> None:
    """Networks and flows, and their distance."""
    shown = runs[:: max(1, (len(runs) - 1) // 2)][:3]
    black, orange, *_ = plots.LINES
    with mpl.rc_context(plots.STYLE):
        figure, panels = plt.subplots(
            1, len(shown) + 1, figsize=(10.5, 3.4), layout="constrained", squeeze=False
        )
        for axes, run in zip(panels[0], shown, strict=False):
            axes.plot(run["time"], run["flow"], color="0.7", linewidth=5, label="kernel flow")
            axes.plot(run["time"], run["net"], label="network", **orange)
            axes.set_ylim(bottom=0)
            axes.set(xlabel="time (rate x steps)", title=f"width {int(run['width'])}")
        panels[0, 0].set_ylabel("||Y⊥|| / ||Y||")
        panels[0, 0].legend()
        last = panels[0, -1]
        widths = np.array([run["width"] for run in runs])
        deviations = np.array([run["deviation"] for run in runs])
        for column in deviations.T:
            last.loglog(widths, column, "o", color="0.6", markersize=3)
        last.loglog(widths, deviations.mean(axis=1), label="mean", **black)
        guide = deviations[0].mean() * 1.6 * (widths / widths[0]) ** -0.5
        last.loglog(widths, guide, label="width$^{-1/2}$", color="0.5", lw=0.8)
        last.set_xticks(widths, labels=[str(int(w)) for w in widths], rotation=45)
        last.minorticks_off()
        percent = [1, 2, 5, 10]
        last.set_yticks([p / 100 for p in percent], labels=[f"{p}%" for p in percent])
        last.set(xlabel="width", title="relative deviation of Φ")
        last.legend()
        figure.savefig(path)
        plt.close(figure)


DRAWINGS: dict[tuple[str, ...], Callable[..., None]] = {
    ("convexity", "critical"): draw_convexity,
    ("flow",): draw_flow,
    ("eigenvalues", "identities"): draw_eigenvalues,
    ("width",): draw_width,
}


def theory(preset: Preset = "cpu", out: Path = Path("benchmarks/out/theory")) -> None:
    """Check the paper's theorems and proofs numerically, in float64.

    About two minutes on two CPU cores. Stop it when you like; the same command goes on with the
    checks that are missing.

    Args:
      preset: "paper" draws more often and trains wider networks.
      out: folder of the numbers and the figures.
    """
    console, records = Console(), Records(out / "theory.jsonl")
    for name, check in checks(PRESETS[preset]).items():
        key = key_of(preset, name)
        if records.get(key) is None:
            with console.status(f"checking: {name}"):
                records.add(key, {"runs": [to_record(result) for result in check()]})
        console.print(f"checked: {name}", highlight=False)
    show(console, summarize(records, out, preset))
