"""What float32 keeps where numbers are many, large or shifted: against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfll

TALL, WIDE = (200, 10), (10, 24)
SOLVERS = [(shape, solver) for shape in (TALL, WIDE) for solver in ("auto", "qr")]
SOLVERS += [(TALL, "primal"), (TALL, cfll.CG(1e-6, max_iterations=1000)), (WIDE, "dual")]


def relative_error(got, expected):
    return np.linalg.norm(np.asarray(got, float) - expected) / np.linalg.norm(expected)


def ridge(features, targets, beta, free):
    """Kernel over bias in float64, from the stacked rows."""
    n, d = features.shape
    rows = np.column_stack([features.astype(float), np.ones(n)])
    root = np.diag(np.sqrt([*[beta] * d, 0.0 if free else beta]))
    below = np.zeros((d + 1, targets.shape[1]))
    return np.linalg.lstsq(np.vstack([rows, root]), np.vstack([targets.astype(float), below]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("shape", "solver"), SOLVERS)
def test_targets_with_a_mean_do_not_cost_digits_of_the_kernel(shape, solver, free):
    n, d = shape
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, d)).astype(np.float32)
    signal = features @ rng.normal(size=(d, 2)) / d + rng.normal(size=(n, 2))
    for offset in (1.0, 1e2, 1e4, 1e6):
        targets = (signal + offset).astype(np.float32)
        expected = ridge(features, targets, 1.0, free)
        options = {"penalize_bias": not free, "solver": solver}
        head = cfll.ridge_solve(features, targets, 1.0, **options)
        assert relative_error(head.kernel, expected[:-1]) < 5e-5
        assert relative_error(head.bias, expected[-1]) < 1e-6 or offset < 1e4
        # From an anchor, too, whose own mean is another one.
        anchor = cfll.LinearHead(jnp.zeros((d, 2)), jnp.full(2, 2 * offset))
        far = cfll.prox_solve(features, targets, anchor, 1e-3, **options)
        near = ridge(features, targets - np.float32(2 * offset), 1e-3, free)
        assert relative_error(far.kernel, near[:-1]) < 1e-4


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("n", "d"), [(200, 10), (2000, 100)])
def test_features_with_a_mean(n, d, free):
    rng = np.random.default_rng(0)
    centered = rng.normal(size=(n, d))
    targets = (centered @ rng.normal(size=(d, 1)) + rng.normal(size=(n, 1))).astype(np.float32)
    for offset, bound in ((1, 5e-6), (1e2, 1e-5), (1e4, 3e-2)):
        features = (centered + offset).astype(np.float32)
        head, info = cfll.penalized_solve(features, targets, None, 1.0, penalize_bias=not free)
        expected = ridge(features, targets, 1.0, free)
        assert relative_error(head.kernel, expected[:-1]) < bound
        assert float(info.rcond) < 1e-4 or offset < 1e2  # the caller sees it


@pytest.mark.parametrize("solver", ["auto", "qr", cfll.CG(tolerance=1e-6)])
def test_a_million_rows_of_few_features(solver):
    rng = np.random.default_rng(1)
    n = 1_000_001  # rows that do not divide into blocks
    features = rng.normal(size=(n, 3)).astype(np.float32)
    slope = np.array([[3.0], [1.0], [-5.0]])
    targets = (features @ slope + 2 + 0.1 * rng.normal(size=(n, 1))).astype(np.float32)
    head, _ = cfll.penalized_solve(features, targets, None, 1e-3, solver=solver)
    rows = np.column_stack([features.astype(float), np.ones(n)])
    expected = np.linalg.solve(rows.T @ rows + 1e-3 * np.eye(4), rows.T @ targets.astype(float))
    assert relative_error(np.vstack([head.kernel, head.bias]), expected) < 1e-5


@pytest.mark.parametrize("rank", ["repeated", "sums"])
def test_directions_without_data_stay_small_over_a_run(rank):
    """Proximal steps on features without rank: the head stays as large as the exact one."""
    rng = np.random.default_rng(2)
    turn = np.eye(16, 32, k=0) + np.eye(16, 32, k=16) if rank == "repeated" else None
    turn = rng.normal(size=(16, 32)) if turn is None else turn
    solve = jax.jit(lambda x, y, head: cfll.penalized_solve(x, y, head, 1e-3))
    slope = rng.normal(size=(16, 2))
    head, exact = cfll.LinearHead.zeros(32, 2), np.zeros((33, 2))
    for _ in range(100):
        hidden = np.maximum(rng.normal(size=(256, 16)), 0) * 8
        features = (hidden.astype(np.float32) @ turn.astype(np.float32)).astype(np.float32)
        targets = (hidden @ slope + rng.normal(size=(256, 2))).astype(np.float32)
        head, info = solve(features, targets, head)
        exact = exact + ridge(
            features, targets - np.column_stack([features, np.ones(256)]) @ exact, 1e-3, False
        )
    assert cfll.Route(info.route) is cfll.Route.QR
    got = np.vstack([head.kernel, head.bias])
    assert np.linalg.norm(got) < 1.1 * np.linalg.norm(exact)
    assert relative_error(features @ got[:-1], features @ exact[:-1]) < 1e-3
