"""Independent references: float64 NumPy, written from the paper's formulas, without cfll."""

import itertools
import os
from dataclasses import dataclass

import numpy as np

# How many times as many cases hypothesis generates: with 30 it is 125,000,
# `CFLL_EXAMPLES=30 python -m pytest -k "programs or numerics or working or properties"`.
TIMES = int(os.environ.get("CFLL_EXAMPLES", "1"))


@dataclass
class Problem:
    """A regularized least-squares problem whose every number is exact in float32."""

    features: np.ndarray
    targets: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None
    lam: float | np.ndarray
    weights: np.ndarray | None
    penalize_bias: bool

    def penalty_root(self) -> np.ndarray:
        """A matrix whose Gram matrix is diag(Lambda, mu)."""
        d = self.features.shape[1]
        lam = np.asarray(self.lam, float)
        matrix = np.diag(np.broadcast_to(lam, (d,))) if lam.ndim < 2 else lam
        root = np.sqrt(matrix) if lam.ndim < 2 else np.linalg.cholesky(matrix).T
        if self.bias is None:
            return root
        mu = np.trace(matrix) / d if self.penalize_bias else 0.0
        return np.block([[root, np.zeros((d, 1))], [np.zeros((1, d)), np.full((1, 1), mu**0.5)]])

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """The least-squares problem min ||A x - B|| for the correction x."""
        n = len(self.features)
        root_weights = np.sqrt(np.ones(n) if self.weights is None else self.weights)[:, None]
        features, residual = self.features, self.targets - self.features @ self.kernel
        if self.bias is not None:
            features = np.concatenate([features, np.ones((n, 1))], axis=1)
            residual = residual - self.bias
        root = self.penalty_root()
        zeros = np.zeros((len(root), residual.shape[1]))
        return (
            np.concatenate([root_weights * features, root]),
            np.concatenate([root_weights * residual, zeros]),
        )

    def condition(self) -> float:
        """Condition number of the penalized system, the square of the stacked one's."""
        return float(np.linalg.cond(self.stacked()[0])) ** 2

    def solution(self) -> np.ndarray:
        """Kernel over bias, by QR of the stacked system."""
        a, b = self.stacked()
        q, r = np.linalg.qr(a)
        anchor = self.kernel if self.bias is None else np.vstack([self.kernel, self.bias])
        return anchor + np.linalg.solve(r, q.T @ b)


def make_problem(
    n: int,
    d: int,
    o: int,
    *,
    condition: float = 1e4,
    penalty: str = "scalar",
    bias: bool = True,
    penalize_bias: bool = True,
    weighted: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem whose penalized system has the given condition number, or a little less."""
    rng = np.random.default_rng([seed, n, d, o])
    u, _, vt = np.linalg.svd(rng.normal(size=(n, d)), full_matrices=False)
    # The largest singular value is sqrt(n) / 2, so that the bias column, of norm sqrt(n), is part
    # of the spectrum and not the whole of it.
    singular = np.geomspace(1, condition**-0.5, min(n, d)) * np.sqrt(n) / 2
    lam: float | np.ndarray = n / condition
    if penalty == "vector":
        lam = lam * np.exp(rng.uniform(0, 1, d))
    if penalty == "matrix":
        root = rng.normal(size=(d, d)) / np.sqrt(d)
        lam = lam * (np.eye(d) + root @ root.T / 10)
        lam = (lam + lam.T) / 2
    weights = rng.uniform(0.5, 2, n) if weighted else None
    if weights is not None and n > 1:
        weights[::5] = 0

    def exact(array):
        return None if array is None else np.asarray(np.asarray(array, np.float32), np.float64)

    problem = Problem(
        features=exact((u * singular) @ vt),
        targets=exact(rng.normal(size=(n, o))),
        kernel=exact(rng.normal(size=(d, o))),
        bias=exact(rng.normal(size=o)) if bias else None,
        lam=exact(lam) if penalty != "scalar" else float(exact(lam)),
        weights=exact(weights),
        penalize_bias=penalize_bias,
    )
    while problem.condition() > condition:  # bias and weights add to it
        problem.lam = 1.25 * problem.lam
        problem.lam = exact(problem.lam) if penalty != "scalar" else float(exact(problem.lam))
    return problem


def spoil_columns(features: np.ndarray, kinds) -> None:
    """Make columns "zero", "repeated" (the first one again) or "constant", in place."""
    for column, kind in enumerate(kinds):
        if kind == "zero":
            features[:, column] = 0
        if kind == "repeated":
            features[:, column] = features[:, 0]
        if kind == "constant":
            features[:, column] = 1


# The paper's algorithms on a two-layer network, y = tanh(x A + c) W + b ---------------------------


@dataclass
class Network:
    """Parameters of the two-layer network."""

    a: np.ndarray
    c: np.ndarray
    w: np.ndarray
    b: np.ndarray

    def features(self, x):
        return np.tanh(x @ self.a + self.c)


def closed_form(phi, y, w, b, lam):
    """Eq. (13) with the bias as one more weight: (Y Phi^T + lam W_t)(Phi Phi^T + lam I)^{-1}."""
    phi = np.concatenate([phi, np.ones((len(phi), 1))], axis=1)
    previous = np.vstack([w, b])
    gram = phi.T @ phi + lam * np.eye(phi.shape[1])
    solved = np.linalg.solve(gram, phi.T @ y + lam * previous)
    return solved[:-1], solved[-1]


def backbone_step(net, x, y, w, b, rate):
    """theta - rate * grad L_B(W, theta), L_B a mean over samples and a sum over outputs."""
    phi = net.features(x)
    error = phi @ w + b - y
    back = (2 / len(x)) * (error @ w.T) * (1 - phi**2)
    return net.a - rate * x.T @ back, net.c - rate * back.sum(0)


def algorithm_1(net, batches, rate, lam):
    """Algorithm 1: backbone on the current batch, then head on the current batch."""
    history = []
    for x, y in batches:
        net.a, net.c = backbone_step(net, x, y, net.w, net.b, rate)
        net.w, net.b = closed_form(net.features(x), y, net.w, net.b, lam)
        history.append(Network(net.a, net.c, net.w, net.b))
    return history


def algorithm_2(net, batches, rate, lam):
    """Algorithm 2: head fitted to the first batch; backbone on this batch, head on the next."""
    history = []
    net.w, net.b = closed_form(net.features(batches[0][0]), batches[0][1], net.w, net.b, lam)
    for (x, y), (x_next, y_next) in itertools.pairwise(batches):
        net.a, net.c = backbone_step(net, x, y, net.w, net.b, rate)
        net.w, net.b = closed_form(net.features(x_next), y_next, net.w, net.b, lam)
        history.append(Network(net.a, net.c, net.w, net.b))
    return history


def equation_17(net, batches, rate, lam):
    """Eq. (17): head on the current batch, then backbone with the new head."""
    history = []
    for x, y in batches:
        net.w, net.b = closed_form(net.features(x), y, net.w, net.b, lam)
        net.a, net.c = backbone_step(net, x, y, net.w, net.b, rate)
        history.append(Network(net.a, net.c, net.w, net.b))
    return history


def network_problem(seed=0, inputs=3, d=6, o=2, batch=8, count=6):
    """A network and batches of a smooth function."""
    rng = np.random.default_rng(seed)
    net = Network(
        rng.normal(size=(inputs, d)),
        rng.normal(size=d),
        rng.normal(size=(d, o)),
        rng.normal(size=o),
    )
    batches = []
    for _ in range(count):
        x = rng.normal(size=(batch, inputs))
        batches.append((x, np.stack([np.sin(x.sum(1)), x[:, 0] * x[:, 1]], axis=1)))
    return net, batches
