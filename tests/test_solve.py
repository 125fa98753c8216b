"""The kernels against float64 QR of the stacked system, scikit-learn and finite differences."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import block_diag
from sklearn.linear_model import Ridge

import cfll
from tests.oracles import Problem, make_problem

SOLVERS = ["auto", "primal", "dual", "qr"]
ROWS, WIDTHS, OUTPUTS = [1, 7, 64, 1000], [1, 16, 257], [1, 10]
SHAPES = list(itertools.product(ROWS, WIDTHS, OUTPUTS))
VARIANTS = list(itertools.product(["scalar", "vector", "matrix"], ["none", "kept", "free"], [0, 1]))


def solve(problem: Problem, solver="auto", dtype=np.float32):
    def cast(array):
        return None if array is None else jnp.asarray(np.asarray(array, dtype))

    return solve_traced(
        cast(problem.features),
        cast(problem.targets),
        cfll.LinearHead(cast(problem.kernel), cast(problem.bias)),
        cast(problem.lam),
        penalize_bias=problem.penalize_bias,
        sample_weight=cast(problem.weights),
        solver=solver,
    )


# With a penalty that is traced, and compiled once for all cases of a shape.
solve_traced = jax.jit(cfll.penalized_solve, static_argnames=("penalize_bias", "solver"))


def stack(head):
    kernel = np.asarray(head.kernel, np.float64)
    return kernel if head.bias is None else np.vstack([kernel, np.asarray(head.bias, np.float64)])


def relative_error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def check_accuracy(n, d, o, solver, penalty, bias, weighted):
    problem = make_problem(
        n,
        d,
        o,
        condition=1e4,
        penalty=penalty,
        bias=bias != "none",
        penalize_bias=bias != "free",
        weighted=bool(weighted),
    )
    # The promise is for a condition number up to 1e4 of the penalized system.
    assert 1e3 < problem.condition() <= 1e4 or d == 1
    head, _ = solve(problem, solver)
    # "auto" takes the dual where samples are fewer than features. Forced there, Cholesky of the
    # singular Gram matrix of one sample erred by 1.2e-4, and its rcond did not ask for refinement.
    limit = 2e-4 if solver == "primal" and n < d else 1e-4
    assert relative_error(stack(head), problem.solution()) < limit


def rotating_cases():
    """For each n, d and solver one o and one of the 18 variants; each pair of choices occurs."""
    for i, j, k in itertools.product(range(len(ROWS)), range(len(WIDTHS)), range(len(SOLVERS))):
        variant = VARIANTS[(5 * (3 * i + j) + 4 * k) % 18]
        yield (ROWS[i], WIDTHS[j], OUTPUTS[(i + j + k) % 2], SOLVERS[k], *variant)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(rotating_cases()), ids=lambda case: "-".join(map(str, case)))
def test_accuracy_at_condition_1e4(case):
    check_accuracy(*case)  # `-m grid` runs the whole product


@pytest.mark.grid
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "d", "o"), SHAPES)
def test_accuracy_on_the_whole_grid(n, d, o, variant):
    for solver in SOLVERS:
        check_accuracy(n, d, o, solver, *variant)
    jax.clear_caches()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_agrees_with_scikit_learn(x64, solver, weighted, fit_intercept):
    n, d = (50, 8) if weighted == fit_intercept else (20, 40)  # each solver meets both
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(n, d)) + 1, rng.normal(size=(n, 3))
    weights = rng.uniform(0, 2, n) if weighted else None
    reference = Ridge(alpha=0.3, fit_intercept=fit_intercept).fit(features, targets, weights)
    head = cfll.ridge_solve(
        features,
        targets,
        0.3,
        use_bias=fit_intercept,
        penalize_bias=False,
        sample_weight=weights,
        solver=solver,
    )
    np.testing.assert_allclose(head.kernel, reference.coef_.T, rtol=1e-5, atol=1e-10)
    if fit_intercept:
        np.testing.assert_allclose(head.bias, reference.intercept_, rtol=1e-5)


def test_equation_13_as_printed(x64):
    rng = np.random.default_rng(0)
    phi, y, w = rng.normal(size=(5, 12)), rng.normal(size=(3, 12)), rng.normal(size=(3, 5))
    printed = (y @ phi.T + 0.7 * w) @ np.linalg.inv(phi @ phi.T + 0.7 * np.eye(5))
    head = cfll.prox_solve(phi.T, y.T, cfll.LinearHead(jnp.asarray(w.T)), 0.7)
    np.testing.assert_allclose(head.kernel.T, printed, rtol=1e-10)


def test_routes_by_shape():
    def route(n, d, lam, **kwargs):
        features, targets = np.eye(n, d, dtype=np.float32), np.ones((n, 1), np.float32)
        anchor = cfll.LinearHead.zeros(d, 1)
        return cfll.Route(cfll.penalized_solve(features, targets, anchor, lam, **kwargs)[1].route)

    assert route(8, 4, 1.0) == cfll.Route.PRIMAL
    assert route(4, 8, 1.0) == cfll.Route.DUAL
    assert route(4, 8, np.full(8, 1e-6, np.float32)) == cfll.Route.DUAL
    assert route(4, 8, np.geomspace(1e-12, 1, 8, dtype=np.float32)) == cfll.Route.PRIMAL
    assert route(4, 8, np.eye(8, dtype=np.float32)) == cfll.Route.PRIMAL
    assert route(4, 8, 1.0, solver="qr") == cfll.Route.QR


# Singular to working precision --------------------------------------------------------------------


def relu(rng, n, d):
    return np.maximum(rng.normal(size=(n, d)), 0)


def collinear(rng, n, d):
    return np.tanh(rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)))


def shifted(rng, n, d):
    return rng.normal(size=(n, d)) + 10


def stacked_rows(features, lam):
    """Features with the ones column over the root of the penalty, in float64."""
    n, d = features.shape
    rows = np.vstack([np.hstack([features, np.ones((n, 1))]), np.sqrt(lam) * np.eye(d + 1)])
    return rows.astype(float)


@pytest.mark.parametrize("make", [relu, collinear, shifted])
@pytest.mark.parametrize("lam", [1e2, 1.0, 1e-2])
@pytest.mark.parametrize("n", [1024, 300])
def test_rcond_says_how_far_rounding_goes(make, lam, n):
    # GramStats solves without refinement, so its error is the one that rcond is about.
    rng = np.random.default_rng(0)
    features = make(rng, n, 256).astype(np.float32)
    targets = np.sin(2 * features[:, :3])
    stats = cfll.GramStats.zeros(256, 3).add(features, targets)
    head, info = stats.solve(cfll.LinearHead.zeros(256, 3), lam)
    expected = np.linalg.lstsq(
        stacked_rows(features, lam), np.vstack([targets, np.zeros((257, 3))])
    )[0]
    estimate = np.finfo(np.float32).eps / float(info.rcond)
    if cfll.Route(info.route) == cfll.Route.PRIMAL:
        # Twice the estimate on most features; shifted ones are the worst that were found.
        assert relative_error(stack(head), expected) < 10 * estimate
    else:
        assert estimate > 1e-2


@pytest.mark.parametrize("make", [relu, collinear, shifted])
@pytest.mark.parametrize("lam", [1e2, 1.0, 1e-2])
@pytest.mark.parametrize("n", [1024, 200])
def test_each_of_many_outputs_is_solved(make, lam, n):
    # From 64 outputs on, a step of refinement is taken only if combinations of them ask for it.
    rng = np.random.default_rng(0)
    features = make(rng, n, 256).astype(np.float32)
    rows = stacked_rows(features, lam)
    targets = rng.normal(size=(n, 100)) * np.geomspace(1e-6, 1e6, 100)
    left, _, _ = np.linalg.svd(rows, full_matrices=False)
    targets[:, 50] = left[:n, -1]  # among easy ones an output that Cholesky is worst at
    targets = targets.astype(np.float32)
    expected = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((257, 100))]))[0]
    head = cfll.ridge_solve(features, targets, lam)
    error = np.linalg.norm(rows @ (stack(head) - expected), axis=0)
    assert (error <= 1e-4 * np.linalg.norm(rows @ expected, axis=0)).all()


@pytest.mark.parametrize("make", [relu, collinear, shifted])
@pytest.mark.parametrize("lam", [1e2, 1.0, 1e-2])
@pytest.mark.parametrize("n", [1024, 200])
@pytest.mark.parametrize("o", [2, 100])
def test_a_small_correction_makes_an_exact_head(make, lam, n, o):
    # It is refined only as far as the head, anchor and correction together, has digits.
    rng = np.random.default_rng(0)
    features = make(rng, n, 256).astype(np.float32)
    anchor = rng.normal(size=(257, o)).astype(np.float32)
    bordered = np.hstack([features, np.ones((n, 1))])
    targets = bordered @ anchor + 1e-3 * rng.normal(size=(n, o))
    targets = targets.astype(np.float32)
    rows = stacked_rows(features, lam)
    expected = np.linalg.lstsq(rows, np.vstack([targets, np.sqrt(lam) * anchor]))[0]
    head = cfll.prox_solve(features, targets, cfll.LinearHead(anchor[:-1], anchor[-1]), lam)
    assert relative_error(stack(head), expected) < 1e-4
    assert relative_error(rows @ stack(head), rows @ expected) < 1e-5


@pytest.mark.parametrize("n", [1000, 300])
@pytest.mark.parametrize("o", [2, 100])
def test_an_anchor_far_away_cancels_without_harm(n, o):
    # The anchor is 50 times as large as the head, and so are errors relative to it.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 256)).astype(np.float32)
    targets = (features[:, :o] / 3).astype(np.float32)
    anchor = rng.normal(size=(257, o)).astype(np.float32)
    rows = stacked_rows(features, 1e-2)
    expected = np.linalg.lstsq(rows, np.vstack([targets, 0.1 * anchor]))[0]
    head = cfll.prox_solve(features, targets, cfll.LinearHead(anchor[:-1], anchor[-1]), 1e-2)
    assert relative_error(stack(head), expected) < 1e-4


def test_many_small_corrections_do_not_drift():
    # Each may err by as much as the head has digits; the next ones see it.
    rng = np.random.default_rng(0)
    mix, truth = rng.normal(size=(64, 64)) / 8, rng.normal(size=(64, 70))
    head, exact = cfll.LinearHead.zeros(64, 70), np.zeros((65, 70))
    step = jax.jit(lambda *args: cfll.prox_solve(*args, lam=1.0))
    for _ in range(100):
        features = (5 + rng.normal(size=(128, 64)) @ mix).astype(np.float32)
        targets = (features @ truth).astype(np.float32)
        head = step(features, targets, head)
        bordered = np.hstack([features, np.ones((128, 1))]).astype(float)
        gram = bordered.T @ bordered + np.eye(65)
        exact += np.linalg.solve(gram, bordered.T @ (targets - bordered @ exact))
    assert relative_error(stack(head), exact) < 1e-4


def dead_relu_features(n, d, rng):
    """Post-activation features as networks have them: dead, duplicated, scaled apart."""
    features = np.maximum(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), 0)
    features[:, : d // 4] = 0
    features[:, d // 4 : d // 2] = features[:, d // 2 : d // 2 + d // 4]
    return np.asarray(features * 10, np.float32)


@pytest.mark.parametrize("lam", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize(("n", "d"), [(500, 64), (40, 64), (64, 64)])
@pytest.mark.parametrize("kind", ["prox", "ridge"])
@pytest.mark.parametrize("penalize_bias", [True, False])
def test_auto_survives_what_cholesky_does_not(n, d, lam, kind, penalize_bias):
    rng = np.random.default_rng(1)
    features = dead_relu_features(n, d, rng)
    targets = np.asarray(rng.normal(size=(n, 2)), np.float32)
    kernel = np.asarray(rng.normal(size=(d, 2)), np.float32) * (kind == "prox")
    problem = Problem(
        features.astype(float), targets.astype(float), kernel.astype(float), np.zeros(2), lam, None,
        penalize_bias,
    )  # fmt: skip
    head, info = solve(problem)
    expected = problem.solution()
    predictions = features.astype(float) @ expected[:-1] + expected[-1]
    got = features.astype(float) @ np.asarray(head.kernel, float) + np.asarray(head.bias, float)
    assert relative_error(got, predictions) < 1e-3
    assert cfll.Route(info.route) == cfll.Route.QR or n < d  # visible to the caller


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_data_keeps_the_anchor(n, solver):
    anchor = cfll.LinearHead(jnp.ones((4, 2)), jnp.ones(2))
    weights = jnp.zeros((n,))
    features, targets = jnp.full((n, 4), jnp.nan), jnp.full((n, 2), jnp.inf)
    head = cfll.prox_solve(features, targets, anchor, 1.0, sample_weight=weights, solver=solver)
    np.testing.assert_allclose(stack(head), stack(anchor))


def test_no_data_and_a_free_bias_keeps_the_anchor():
    anchor = cfll.LinearHead(jnp.ones((4, 2)), jnp.ones(2))
    head = cfll.prox_solve(
        jnp.ones((3, 4)),
        jnp.ones((3, 2)),
        anchor,
        1.0,
        sample_weight=jnp.zeros(3),
        penalize_bias=False,
    )
    np.testing.assert_allclose(stack(head), stack(anchor))


@pytest.mark.parametrize("smallest", [0.0, 1e-14, 1e-11, 1e-8])
@pytest.mark.parametrize("traced", [False, True])
def test_a_feature_that_is_hardly_penalized_among_many(smallest, traced):
    # Its own column of ones, as users make it, with fewer samples than features.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8, 20)).astype(np.float32)
    features[:, 0] = 1
    targets = features[:, 1:2] + 5
    penalty = np.ones(20, np.float32)
    penalty[0] = smallest
    solve = partial(cfll.ridge_solve, features, targets, use_bias=False)
    kernel = jax.jit(solve)(penalty).kernel if traced else solve(penalty).kernel
    double = features.astype(float)
    matrix = double.T @ double + np.diag(penalty.astype(float))
    np.testing.assert_allclose(kernel, np.linalg.solve(matrix, double.T @ targets), atol=1e-5)


def test_all_zero_features_give_a_finite_head():
    head = cfll.ridge_solve(jnp.zeros((9, 4)), jnp.ones((9, 1)), 0.0, penalize_bias=False)
    np.testing.assert_allclose(head.kernel, np.zeros((4, 1)))
    np.testing.assert_allclose(head.bias, [1.0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize(("n", "d"), [(30, 5), (5, 30)])
def test_scaling_features_and_penalty_scales_the_head(scale, n, d):
    rng = np.random.default_rng(0)
    features = np.asarray(rng.normal(size=(n, d)), np.float32)
    targets = np.asarray(rng.normal(size=(n, 1)), np.float32)
    head = cfll.ridge_solve(features, targets, 1e-2, use_bias=False)
    # lam scales with the square, which must be a normal float32: 1e28 and 1e-32 are.
    scaled = cfll.ridge_solve(
        features * np.float32(scale), targets, 1e-2 * scale * scale, use_bias=False
    )
    np.testing.assert_allclose(scaled.kernel * np.float32(scale), head.kernel, rtol=1e-3)


def test_nan_in_is_nan_out_and_not_an_exception():
    features = jnp.ones((5, 2)).at[0, 0].set(jnp.nan)
    head = cfll.ridge_solve(features, jnp.ones((5, 1)), 1.0)
    assert bool(jnp.isnan(head.kernel).any())


def test_an_indefinite_penalty_is_refused():
    with pytest.raises(ValueError, match="not positive semi-definite"):
        cfll.ridge_solve(jnp.eye(4, 2), jnp.ones((4, 1)), np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_a_negative_traced_penalty_is_nan():
    run = jax.jit(lambda lam: cfll.ridge_solve(jnp.eye(4), jnp.ones((4, 1)), lam).kernel)
    assert bool(jnp.isnan(run(-0.1)).all())


# Weights and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fill", [0.0, 1e6, 1e20, 9.97e36, np.nan, np.inf])
def test_a_padded_batch_is_the_batch(solver, fill):
    rng = np.random.default_rng(0)
    features = np.asarray(rng.normal(size=(5, 8)), np.float32)
    targets = np.asarray(rng.normal(size=(5, 2)), np.float32)
    anchor = cfll.LinearHead.zeros(8, 2)
    plain = cfll.prox_solve(features, targets, anchor, 0.1, solver=solver)
    padded = cfll.prox_solve(
        np.concatenate([features, np.full((3, 8), fill, np.float32)]),
        np.concatenate([targets, np.full((3, 2), fill, np.float32)]),
        anchor,
        0.1,
        sample_weight=np.asarray([1, 1, 1, 1, 1, 0, 0, 0], np.float32),
        solver=solver,
    )
    # The products are summed in another order: float32 rounding times a condition number of 100.
    np.testing.assert_allclose(stack(padded), stack(plain), rtol=1e-4, atol=1e-5)


def test_all_leading_axes_are_samples_and_weights_may_cover_the_first():
    rng = np.random.default_rng(0)
    features = np.asarray(rng.normal(size=(4, 6, 3)), np.float32)
    targets = np.asarray(rng.normal(size=(4, 6, 2)), np.float32)
    weights = np.asarray([1, 1, 1, 0], np.float32)
    whole = cfll.ridge_solve(features, targets, 1.0, sample_weight=weights)
    flat = cfll.ridge_solve(features[:3].reshape(-1, 3), targets[:3].reshape(-1, 2), 1.0)
    np.testing.assert_allclose(stack(whole), stack(flat), rtol=1e-5)


def test_float64_stays_float64(x64):
    problem = make_problem(64, 16, 2, condition=1e8)
    head, _ = solve(problem, dtype=np.float64)
    assert head.kernel.dtype == jnp.float64
    assert relative_error(stack(head), problem.solution()) < 1e-9


# Transformations of JAX ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n", [6, 40])
def test_vmap_over_penalties_batches_and_heads(n):
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(3, n, 8)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(3, n, 2)), jnp.float32)
    anchors = cfll.LinearHead(jnp.asarray(rng.normal(size=(3, 8, 2)), jnp.float32))
    lams = jnp.array([1e-7, 1e-2, 1.0])
    mapped = jax.vmap(cfll.prox_solve)(features, targets, anchors, lams)
    for i in range(3):
        anchor = cfll.LinearHead(anchors.kernel[i])
        one = cfll.prox_solve(features[i], targets[i], anchor, lams[i])
        np.testing.assert_allclose(mapped.kernel[i], one.kernel, rtol=1e-3, atol=1e-4)
    grid = jax.vmap(lambda lam: cfll.ridge_solve(features[0], targets[0], lam).kernel)(lams)
    one = cfll.ridge_solve(features[0], targets[0], lams[2]).kernel
    np.testing.assert_allclose(grid[2], one, rtol=1e-4, atol=1e-6)


def derivatives(solve, args, tangents, cotangents):
    """Forward and backward, and all four second derivatives that these make."""

    def forward(args):
        return jax.jvp(solve, args, tangents)

    def backward(args):
        return jax.vjp(solve, *args)[1](cotangents)

    return {
        "forward": forward(args),
        "backward": backward(args),
        "forward, forward": jax.jvp(forward, (args,), (tangents,))[1],
        "forward, backward": jax.jvp(backward, (args,), (tangents,))[1],
        "backward, forward": jax.vjp(forward, args)[1]((cotangents, cotangents)),
        "backward, backward": jax.vjp(backward, args)[1](tangents),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "penalty", "n", "d"),
    [
        ("auto", "scalar", 9, 4),
        ("auto", "vector", 4, 9),
        ("primal", "matrix", 4, 9),
        ("dual", "scalar", 9, 4),
        ("dual", "matrix", 4, 9),
        ("qr", "vector", 9, 4),
    ],
)
def test_derivatives_through_the_solve(x64, solver, penalty, n, d):
    p = make_problem(n, d, 2, condition=10, penalty=penalty, weighted=True)

    def ours(features, targets, anchor, lam, weights):
        lam = (lam + lam.T) / 2 if penalty == "matrix" else lam
        return cfll.prox_solve(features, targets, anchor, lam, sample_weight=weights, solver=solver)

    def explicit(features, targets, anchor, lam, weights):
        lam = (lam + lam.T) / 2 if penalty == "matrix" else lam
        return explicit_solve(features, targets, anchor, lam, weights)

    anchor = cfll.LinearHead(p.kernel, p.bias)
    args = jax.tree.map(jnp.asarray, (p.features, p.targets, anchor, p.lam, p.weights + 0.1))
    rng = np.random.default_rng(0)
    tangents, cotangents = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)
        for tree in (args, anchor)
    )

    both = jax.jit(lambda *given: [derivatives(solve, *given) for solve in (ours, explicit)])
    chex.assert_trees_all_close(*both(args, tangents, cotangents), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("penalize_bias", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_derivative_by_one_argument_alone(x64, solver, penalize_bias):
    """What is constant must stay out of the way of the transposition (n < d: auto is dual)."""
    p = make_problem(4, 7, 2, condition=10, penalty="scalar")
    args = jax.tree.map(jnp.asarray, (p.features, p.targets, p.kernel, p.bias))
    penalty = p.lam * jnp.eye(8).at[7, 7].set(float(penalize_bias))

    def ours(features, targets, kernel, bias):
        head = cfll.prox_solve(
            features,
            targets,
            cfll.LinearHead(kernel, bias),
            p.lam,
            solver=solver,
            penalize_bias=penalize_bias,
        )
        return jnp.concatenate([head.kernel, head.bias[None]])

    def explicit(features, targets, kernel, bias):
        phi = jnp.concatenate([features, jnp.ones((4, 1))], axis=1)
        anchor = jnp.concatenate([kernel, bias[None]])
        rhs = phi.T @ targets + penalty @ anchor
        return jnp.linalg.solve(phi.T @ phi + penalty, rhs)

    @jax.jit
    def one_by_one(*args):
        return [[jax.jacrev(solve, i)(*args) for i in range(4)] for solve in (ours, explicit)]

    chex.assert_trees_all_close(*one_by_one(*args), rtol=1e-5, atol=1e-7)


def test_derivative_at_a_weight_of_zero(x64):
    rng = np.random.default_rng(0)
    features, targets = jnp.asarray(rng.normal(size=(3, 6))), jnp.asarray(rng.normal(size=(3, 1)))

    def first(weight):
        weights = jnp.concatenate([weight[None], jnp.ones(2)])
        return cfll.ridge_solve(features, targets, 0.5, sample_weight=weights).kernel[0, 0]

    both = jax.jit(jax.value_and_grad(first))
    (value, slope), (ahead, _) = (both(jnp.asarray(weight)) for weight in (0.0, 1e-6))
    np.testing.assert_allclose(slope, (ahead - value) / 1e-6, rtol=1e-4)


def explicit_solve(features, targets, anchor, lam, weights):
    """Eq. (13) with weights, by a solve that JAX differentiates itself."""
    n, d = features.shape
    phi = jnp.concatenate([features, jnp.ones((n, 1), features.dtype)], axis=1)
    weighted = phi.T * weights[None, :]
    lam = jnp.asarray(lam, features.dtype)
    matrix = lam if lam.ndim == 2 else jnp.diag(jnp.broadcast_to(lam, (d,)))
    penalty = block_diag(matrix, jnp.mean(jnp.diagonal(matrix)))
    rows = jnp.concatenate([anchor.kernel, anchor.bias[None, :]])
    head = jnp.linalg.solve(weighted @ phi + penalty, weighted @ targets + penalty @ rows)
    return cfll.LinearHead(head[:-1], head[-1])


@pytest.mark.parametrize("solver", ["auto", "dual"])
@pytest.mark.parametrize("lam", [1e-2, 1e-4])
def test_derivatives_in_the_dual_are_exact_in_float32(x64, solver, lam):
    # The data outweigh the penalty by 1e4 and 1e6: no difference has digits left.
    rng = np.random.default_rng(0)

    def draw(*shape):
        return np.asarray(rng.normal(size=shape), np.float32)

    anchor, cotangent = (cfll.LinearHead(draw(128, 3), draw(3)) for _ in range(2))
    weights = np.asarray(rng.uniform(0.5, 2, 100), np.float32)
    args = draw(100, 128), draw(100, 3), anchor, np.float32(lam), weights

    def gradients(solve, dtype):
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (args, cotangent))
        return jax.jit(lambda args, cotangent: jax.vjp(solve, *args)[1](cotangent))(*cast)

    def ours(features, targets, anchor, lam, weights):
        return cfll.prox_solve(features, targets, anchor, lam, sample_weight=weights, solver=solver)

    got, expected = gradients(ours, jnp.float32), gradients(explicit_solve, jnp.float64)
    chex.assert_trees_all_equal_dtypes(got, args)
    errors = jax.tree.map(
        lambda a, b: float(relative_error(np.asarray(a), np.asarray(b))), got, expected
    )
    by_features, by_targets, by_anchor, by_lam, by_weights = errors
    assert max(jax.tree.leaves((by_targets, by_anchor))) < 1e-5
    # It holds what the solve left of the residual, which is no difference here.
    assert by_features < 1e-5
    # These are small differences of products that the data outweigh.
    assert max(by_lam, by_weights) < 1e-5 / lam


@pytest.mark.parametrize("kind", ["scalar", "vector", "traced vector", "matrix", "qr"])
def test_derivatives_where_cholesky_fails(x64, kind):
    # Features that hardly differ: fewer samples than features, and a small penalty.
    rng = np.random.default_rng(0)
    features = 10 + np.float32(0.01 * rng.normal(size=(4, 12)))
    targets, cotangent = 0.01 * rng.normal(size=(4, 1)), rng.normal(size=(12, 1))
    lam = np.full({"scalar": (), "qr": ()}.get(kind, 12), 1e-6)
    lam = np.diag(lam) if kind == "matrix" else lam
    solver = "qr" if kind == "qr" else "auto"

    def ours(features, lam):
        head = cfll.ridge_solve(features, np.float32(targets), lam, use_bias=False, solver=solver)
        return jnp.sum(np.float32(cotangent) * head.kernel)

    def explicit(features):
        kernel = features @ features.T + 1e-6 * jnp.eye(4)
        return jnp.sum(cotangent * (features.T @ jnp.linalg.solve(kernel, targets)))

    if kind == "traced vector":
        got = jax.jit(jax.grad(ours))(features, np.float32(lam))
    else:
        got = jax.jit(jax.grad(partial(ours, lam=np.float32(lam))))(features)
    expected = jax.jit(jax.grad(explicit))(jnp.asarray(features, float))
    # QR errs by 0.03 here, LQ by 1e-4; without what the penalty alone decides it would be 0.85.
    assert relative_error(np.asarray(got), np.asarray(expected)) < 0.05


@pytest.mark.parametrize("lam", [1e-6, 1e-9, 1e-12])
def test_derivatives_at_repeated_samples_that_contradict_each_other(x64, lam):
    rng = np.random.default_rng(0)
    features, targets, at = (np.float32(rng.normal(size=s)) for s in ((4, 12), (4, 1), (1, 12)))
    features[1] = features[0]

    def ours(features):
        return jnp.sum(cfll.ridge_solve(features, targets, jnp.float32(lam), use_bias=False)(at))

    def explicit(features):
        kernel = features @ features.T + lam * jnp.eye(4)
        return jnp.sum(
            at.astype(float) @ features.T @ jnp.linalg.solve(kernel, targets.astype(float))
        )

    got = jax.jit(jax.grad(ours))(features)
    expected = jax.jit(jax.grad(explicit))(jnp.asarray(features, float))
    assert relative_error(np.asarray(got), np.asarray(expected)) < 1e-3


@pytest.mark.parametrize("lam", [1e-6, 1e-8])
def test_derivative_by_the_weights_of_samples_that_contradict_each_other(x64, lam):
    # The fit at one of them is the weighted mean of their targets.
    rng = np.random.default_rng(0)
    features, targets = (np.float32(rng.normal(size=s)) for s in ((4, 12), (4, 1)))
    features[1] = features[0]
    weights = np.float32([1, 1.5, 0.7, 2])

    def fit(weights):
        head = cfll.ridge_solve(
            features, targets, np.float32(lam), use_bias=False, sample_weight=weights
        )
        return head(features[:1])[0, 0]

    gap = (targets[0, 0] - targets[1, 0]) / 2.5**2
    expected = [1.5 * gap, -gap, 0, 0]
    np.testing.assert_allclose(jax.jit(jax.grad(fit))(weights), expected, atol=1e-3)


@pytest.mark.parametrize("strength", [1e-3, 1e-4])
@pytest.mark.parametrize("lam", [1e-10, 1e-12])
def test_a_free_bias_where_samples_are_nearly_repeated(strength, lam):
    # In exact arithmetic the first two alone determine it: one is twice the other.
    rng = np.random.default_rng(0)
    rng.normal(size=36)
    features, other, targets = (rng.normal(size=s) for s in ((4, 12), (1, 12), (4, 1)))
    features[1] = 2 * features[0]
    features[3] = 2 * features[2] + strength * other
    features, targets = np.float32(features), np.float32(targets)
    kernel = features.astype(float) @ features.T.astype(float) + lam * np.eye(4)
    by_one, by_targets = np.linalg.solve(kernel, np.column_stack([np.ones(4), targets])).T
    head = cfll.ridge_solve(features, targets, np.float32(lam), penalize_bias=False)
    np.testing.assert_allclose(head.bias[0], by_targets.sum() / by_one.sum(), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*SOLVERS, cfll.CG(tolerance=1e-13, max_iterations=200)])
@pytest.mark.parametrize(("n", "d"), [(3, 6), (9, 4)])
def test_second_derivatives_at_a_weight_of_zero(x64, solver, n, d):
    rng = np.random.default_rng(0)
    features, targets = jnp.asarray(rng.normal(size=(n, d))), jnp.asarray(rng.normal(size=(n, 2)))
    anchor = cfll.LinearHead(jnp.asarray(rng.normal(size=(d, 2))), jnp.ones(2))
    weights = jnp.ones(n).at[0].set(0.0)

    def ours(weights):
        return cfll.prox_solve(features, targets, anchor, 0.5, sample_weight=weights, solver=solver)

    def explicit(weights):
        return explicit_solve(features, targets, anchor, 0.5, weights)

    @jax.jit
    def second(weights):
        return [jax.jacfwd(jax.jacrev(solve))(weights) for solve in (ours, explicit)]

    chex.assert_trees_all_close(*second(weights), rtol=1e-6, atol=1e-9)


def test_gradient_reuses_the_factor():
    def loss(features):
        head = cfll.ridge_solve(features, jnp.ones((9, 1)), 1.0, solver="primal")
        return jnp.sum(head.kernel)

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((9, 4))))
    assert jaxpr.count(" cholesky") == 1


def test_gradient_is_finite_where_cholesky_fails():
    features = jnp.concatenate([jnp.ones((8, 2)), jnp.zeros((8, 2))], axis=1)

    def loss(features):
        return jnp.sum(cfll.ridge_solve(features, jnp.ones((8, 1)), 1e-9).kernel)

    assert bool(jnp.isfinite(jax.jit(jax.grad(loss))(features)).all())


# Errors while tracing -----------------------------------------------------------------------------

F, Y = np.ones((6, 4), np.float32), np.ones((6, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cfll.ridge_solve(F, Y[:5], 1.0), ValueError, ["(5, 2)", "(6, 4)"]),
        (lambda: cfll.ridge_solve(F, Y[:, 0], 1.0), ValueError, ["(6,)", "targets[..., None]"]),
        (lambda: cfll.ridge_solve(F[0], Y[0], 1.0), ValueError, ["(4,)", "features[None, :]"]),
        (lambda: cfll.ridge_solve(F[:, :0], Y, 1.0), ValueError, ["(6, 0)"]),
        (lambda: cfll.ridge_solve(F, np.arange(6), 1.0), TypeError, ["int", "jax.nn.one_hot"]),
        (lambda: cfll.ridge_solve(F, Y > 0, 1.0), TypeError, ["bool", "jax.nn.one_hot"]),
        (lambda: cfll.ridge_solve(F + 1j, Y, 1.0), TypeError, ["complex64", "features.real"]),
        (lambda: cfll.ridge_solve(F, Y, 1j), TypeError, ["beta is 1j", "beta=10.0"]),
        (lambda: cfll.ridge_solve(F, Y, None), TypeError, ["beta is None"]),
        (lambda: cfll.ridge_solve(F, Y, "1"), TypeError, ["beta is '1'"]),
        (
            lambda: cfll.prox_solve(F, Y, cfll.LinearHead.zeros(4, 2, dtype=complex), 1.0),
            TypeError,
            ["anchor is complex", "anchor.kernel.real"],
        ),
        (lambda: cfll.ridge_solve(F, Y, -1.0), ValueError, ["beta is negative", "beta > 0"]),
        (lambda: cfll.ridge_solve(F[:3], Y[:3], 0.0), ValueError, ["beta is zero", "beta > 0"]),
        (lambda: cfll.ridge_solve(F, Y, np.ones(3)), ValueError, ["beta", "(3,)", "(4,)"]),
        (lambda: cfll.ridge_solve(F, Y, np.ones((5, 5))), ValueError, ["(5, 5)", "(4, 4)"]),
        (lambda: cfll.ridge_solve(F, Y, np.triu(np.ones((4, 4)))), ValueError, ["not symmetric"]),
        (lambda: cfll.ridge_solve(F, Y, 1.0, solver="svd"), ValueError, ["'svd'", "'dual'"]),
        (lambda: cfll.ridge_solve(F, Y, 1.0, sample_weight=np.ones(5)), ValueError, ["(5,)"]),
        (lambda: cfll.ridge_solve(F, Y, 1.0, sample_weight=-np.ones(6)), ValueError, ["negative"]),
        (lambda: cfll.ridge_solve(F, Y, 1.0, sample_weight=[1.0] * 6), TypeError, ["jnp.asarray("]),
        (
            lambda: cfll.prox_solve(F, Y, cfll.LinearHead.zeros(4, 3), 1.0),
            ValueError,
            ["anchor", "(4, 3)", "(4, 2)"],
        ),
        (
            lambda: cfll.prox_solve(F, Y, cfll.LinearHead.zeros(4, 2), -1e-3),
            ValueError,
            ["lam is negative"],
        ),
        (
            lambda: cfll.prox_solve(F, Y, {"kernel": 0, "bias": 0}, 1.0),  # type: ignore[arg-type]
            TypeError,
            ["anchor is a dict", "cfll.get_head"],
        ),
    ],
)
def test_errors_name_argument_shape_and_fix(call, error, words):
    with pytest.raises(error) as caught:
        jax.jit(call)()
    for word in words:
        assert word in str(caught.value)


# Where strangers call it --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e18, 2e18, 2e19])
@pytest.mark.parametrize("solver", ["primal", "dual", cfll.CG(tolerance=1e-3)])
def test_features_that_overflow_are_never_zeros_that_look_solved(solver, scale):
    features = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    targets = features @ np.ones((4, 1), np.float32)
    features = features * np.float32(scale)
    head, _ = cfll.penalized_solve(features, targets, None, 1.0, use_bias=False, solver=solver)
    scaled = np.asarray(head.kernel) * np.float32(scale)
    assert np.isnan(scaled).any() or relative_error(scaled, np.ones((4, 1))) < 1e-2


def test_a_healthy_step_passes_under_debug_nans():
    features = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    twice = np.concatenate([features, features], axis=1)
    with jax.debug_nans(True):
        head, info = cfll.penalized_solve(twice, features[:, :1], None, 1e-9)
    assert cfll.Route(info.route) is cfll.Route.QR
    assert float(info.rcond) == 0
    np.testing.assert_allclose(head(twice), features[:, :1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*SOLVERS, cfll.CG(tolerance=1e-7)])
@pytest.mark.parametrize(("n", "d"), [(32, 6), (4, 16), (600, 64)])
def test_inside_shard_map(solver, n, d):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    features = np.asarray(rng.normal(size=(1, n, d)), np.float32)
    targets, anchor = features[..., :2], cfll.LinearHead(np.ones((d, 2)), np.ones(2))
    expected = Problem(features[0], targets[0], *anchor, 1.0, None, True).solution()

    def one(features, targets, anchor):
        head = cfll.prox_solve(features[0], targets[0], anchor, 1.0, solver=solver)
        return jax.tree.map(lambda leaf: leaf[None], head)

    specs = (jax.P("x"), jax.P("x"), jax.P())
    mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=jax.P("x"))
    head = jax.jit(mapped)(features, targets, jax.tree.map(np.float32, anchor))
    head = jax.tree.map(lambda leaf: leaf[0], head)
    assert relative_error(stack(head), expected) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*SOLVERS, cfll.CG(tolerance=1e-6)])
def test_derivatives_by_what_devices_share(solver):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    features, targets = (jnp.asarray(rng.normal(size=(16, k)), jnp.float32) for k in (6, 2))
    shared = cfll.LinearHead(jnp.ones((6, 2)), jnp.ones(2)), jnp.float32(0.7)

    def loss(features, targets, anchor, lam):
        head = cfll.prox_solve(features, targets, anchor, lam, solver=solver)
        return jax.lax.psum(jnp.sum(head(features) ** 2), "x")

    def mapped(*batch):
        summed = jax.shard_map(
            loss,
            mesh=mesh, in_specs=(jax.P("x"), jax.P("x"), jax.P(), jax.P()), out_specs=jax.P(),
        )  # fmt: skip
        return summed(*batch)

    def explicit(features, targets, anchor, lam):
        head = explicit_solve(features, targets, anchor, lam, jnp.ones(len(features)))
        return jnp.sum(head(features) ** 2)

    got, expected = (
        jax.jit(jax.grad(f, argnums=(0, 2, 3)))(features, targets, *shared)
        for f in (mapped, explicit)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("lam", [1e-9, 1e-7, 1e-5])
def test_repeated_samples_that_contradict_each_other_get_no_huge_weights(lam, use_bias):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8, 64)).astype(np.float32)
    features[1] = features[0]
    targets = rng.normal(size=(8, 2)).astype(np.float32)
    head = cfll.ridge_solve(features, targets, lam, use_bias=use_bias)
    rows = stacked_rows(features, lam) if use_bias else np.vstack([features, lam**0.5 * np.eye(64)])
    expected = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((len(rows) - 8, 2))]))[0]
    assert relative_error(stack(head), expected) < 1e-3


def test_a_route_is_found_by_an_array_without_a_hash():
    for value in (jnp.int32(5), np.array(5), np.int32(5), 5):
        assert cfll.Route(value) is cfll.Route.CG
        assert cfll.Route._missing_(value) is cfll.Route.CG  # what Python 3.12 asks for an array
    with pytest.raises(ValueError, match="not a valid Route"):
        cfll.Route(jnp.int32(17))
