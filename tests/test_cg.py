"""Conjugate gradients: against float64 QR, what they report, and derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll
from tests.oracles import make_problem
from tests.test_solve import derivatives, explicit_solve, relative_error, solve, stack

TIGHT = cfll.CG(tolerance=1e-6, max_iterations=500)


@pytest.mark.parametrize(
    ("penalty", "bias", "free", "weighted"),
    [
        ("scalar", True, False, False),
        ("vector", True, True, True),
        ("matrix", False, False, True),
    ],
)
@pytest.mark.parametrize(("n", "d"), [(200, 40), (30, 60)])
def test_agrees_with_float64_qr(n, d, penalty, bias, free, weighted):
    problem = make_problem(
        n,
        d,
        3,
        condition=1e3,
        penalty=penalty,
        bias=bias,
        penalize_bias=not free,
        weighted=weighted,
    )
    head, info = solve(problem, TIGHT)
    assert relative_error(stack(head), problem.solution()) < 1e-4
    assert cfll.Route(info.route) == cfll.Route.CG
    assert 0 < info.iterations < 500
    assert 0 < info.residual < 1e-5


def test_says_when_it_was_not_finished():
    problem = make_problem(100, 50, 2, condition=1e4)
    _, info = solve(problem, cfll.CG(tolerance=1e-6, max_iterations=3))
    assert info.iterations == 3
    assert info.residual > 1e-6


def test_starts_at_the_anchor():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(100, 50)), jnp.float32)
    anchor = cfll.LinearHead(jnp.asarray(rng.normal(size=(50, 2)), jnp.float32), jnp.ones(2))
    head, info = cfll.penalized_solve(features, anchor(features), anchor, 1.0, solver="cg")
    assert info.iterations == 0
    np.testing.assert_array_equal(head.kernel, anchor.kernel)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_targets_of_any_size(scale):
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(30, 5)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(30, 2)), jnp.float32)
    head = cfll.ridge_solve(features, targets * jnp.float32(scale), 1.0, solver=TIGHT)
    expected = cfll.ridge_solve(features, targets, 1.0)
    np.testing.assert_allclose(head.kernel / np.float32(scale), expected.kernel, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_cannot_be_solved_is_nan(bad):
    features = jnp.ones((4, 2)).at[0, 0].set(bad)
    head = cfll.ridge_solve(features, jnp.ones((4, 1)), 1.0, solver="cg")
    assert jnp.isnan(head.kernel).all()


def test_dead_features_and_no_penalty():
    features = jnp.zeros((8, 3)).at[:, 0].set(jnp.arange(8.0))
    head = jax.jit(lambda lam: cfll.ridge_solve(features, features[:, :1], lam, solver="cg"))(0.0)
    np.testing.assert_allclose(head.kernel[:, 0], [1, 0, 0], atol=1e-3)


def test_derivatives(x64):
    rng = np.random.default_rng(0)
    features, targets = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray(rng.normal(size=(9, 2)))
    anchor = cfll.LinearHead(jnp.asarray(rng.normal(size=(4, 2))), jnp.zeros(2))
    solver = cfll.CG(tolerance=1e-13, max_iterations=200)

    def f(features, targets, lam):
        return cfll.prox_solve(features, targets, anchor, lam, solver=solver)

    def explicit(features, targets, lam):
        return explicit_solve(features, targets, anchor, lam, jnp.ones(9))

    args = features, targets, jnp.asarray(0.7)
    tangents, cotangents = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)
        for tree in (args, anchor)
    )
    both = jax.jit(lambda *given: [derivatives(solve, *given) for solve in (f, explicit)])
    chex.assert_trees_all_close(*both(args, tangents, cotangents), rtol=1e-6, atol=1e-8)


def test_inside_training(standard_promotion):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    y = jnp.sin(x.sum(1, keepdims=True))
    params = {
        "backbone": jnp.asarray(rng.normal(size=(3, 32)), jnp.float32),
        "head": {"kernel": jnp.zeros((32, 1)), "bias": jnp.zeros(1)},
    }

    def train(solver):
        tx = cfll.closed_form(optax.sgd(0.01), cfll.prox(1.0, solver=solver))

        @jax.jit
        def step(params, state):
            def loss(p):
                features = jnp.tanh(x @ p["backbone"])
                return jnp.mean((y - features @ p["head"]["kernel"] - p["head"]["bias"]) ** 2)

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(
                grads, state, params, targets=y, feature_fn=lambda p: jnp.tanh(x @ p["backbone"])
            )
            return optax.apply_updates(params, updates), state, value

        now, state = params, tx.init(params)
        for _ in range(20):
            now, state, value = step(now, state)
        return float(value), cfll.get_state(state).info.solve

    by_cg, info = train("cg")
    exact, direct = train("auto")
    assert by_cg == pytest.approx(exact, rel=0.02)
    assert info.iterations > 0
    assert direct.iterations == 0


def test_messages():
    with pytest.raises(ValueError, match="max_iterations=100"):
        cfll.ridge_solve(jnp.ones((2, 2)), jnp.ones((2, 1)), 1.0, solver=cfll.CG(1e-4, 0))


def test_of_several_solves_the_least_finished_is_shown():
    each = (
        jnp.array([[5, 1]]),
        jnp.array([[1.0, 0.5]]),
        jnp.array([[7, 3]]),
        jnp.array([[0.4, 0]]),
    )
    assert [float(value) for value in cfll.SolveInfo(*each).worst()] == [1, 0.5, 7, np.float32(0.4)]
