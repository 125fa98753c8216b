"""Targets that are missing per output: against one NumPy problem per output."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll

N, D, OUTPUTS = 40, 6, 3
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, D))
TARGETS = np.where(RNG.random((N, OUTPUTS)) < 0.5, np.nan, RNG.normal(size=(N, OUTPUTS)))
WEIGHTS = np.isfinite(TARGETS) * RNG.uniform(0.5, 2, (N, OUTPUTS))
ANCHOR = RNG.normal(size=(D + 1, OUTPUTS))


def by_output(lam):
    """Kernel over bias, near the anchor, from the rows that each output has."""
    rows = np.column_stack([FEATURES, np.ones(N)])
    heads = []
    for k in range(OUTPUTS):
        there = np.isfinite(TARGETS[:, k])
        weighted = rows[there].T * WEIGHTS[there, k]
        right = weighted @ TARGETS[there, k] + lam * ANCHOR[:, k]
        heads.append(np.linalg.solve(weighted @ rows[there] + lam * np.eye(D + 1), right))
    return np.stack(heads, axis=1)


def objective(head, lam):
    """Per average number of samples of an output."""
    rows = np.column_stack([FEATURES, np.ones(N)])
    squares = np.nansum(WEIGHTS * (TARGETS - rows @ head) ** 2)
    return (squares + lam * np.sum((head - ANCHOR) ** 2)) / (WEIGHTS.sum() / OUTPUTS)


def head_of(rows):
    return cfll.LinearHead(jnp.asarray(rows[:-1]), jnp.asarray(rows[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["auto", "primal", "dual", "qr", cfll.CG(tolerance=1e-12)])
@pytest.mark.parametrize("leading", [(N,), (8, 5)])
def test_half_of_the_targets_missing(x64, leading, solver):
    features, targets, weights = (
        jnp.asarray(a.reshape(*leading, -1)) for a in (FEATURES, TARGETS, WEIGHTS)
    )
    head, info = cfll.penalized_solve(
        features, targets, head_of(ANCHOR), 0.3, sample_weight=weights, solver=solver
    )
    chex.assert_trees_all_close(head, head_of(by_output(0.3)), rtol=1e-9)
    assert info.rcond.shape == info.route.shape == ()
    free = cfll.ridge_solve(
        features, targets, 0.3, sample_weight=weights, solver=solver, use_bias=False
    )
    for k in range(OUTPUTS):
        alone = cfll.ridge_solve(
            features, targets[..., k:][..., :1], 0.3, sample_weight=weights[..., k], use_bias=False
        )
        np.testing.assert_allclose(free.kernel[:, k:][:, :1], alone.kernel, rtol=1e-8)


def test_the_loss_is_that_of_the_targets_that_are_there(x64):
    batch = jnp.asarray(FEATURES), jnp.asarray(TARGETS), head_of(ANCHOR), 0.3
    weights = jnp.asarray(WEIGHTS)

    @jax.jit
    @jax.value_and_grad
    def loss(features):
        return cfll.prox_loss(features, *batch[1:], sample_weight=weights)[0]

    value, grad = loss(batch[0])
    assert value == pytest.approx(objective(by_output(0.3), 0.3))
    # The envelope: the derivative at the fixed head is that of the minimum.
    step = 1e-6 * RNG.normal(size=(N, D))
    change = loss(batch[0] + step)[0] - loss(batch[0] - step)[0]
    assert change == pytest.approx(2 * float(jnp.sum(grad * step)), rel=1e-6)


@pytest.mark.parametrize("by", ["solution", "feature_fn"])
def test_a_step_without_half_of_the_targets(by):
    x, y = jnp.asarray(FEATURES, jnp.float32), jnp.asarray(TARGETS, jnp.float32)
    y, there = y.at[:, 2].set(jnp.nan), jnp.isfinite(y).at[:, 2].set(False)  # one has none at all
    rule = cfll.prox(1.0)
    tx = cfll.closed_form(optax.sgd(0.1), rule)
    params = {
        "w": jnp.eye(D),
        "head": {"kernel": jnp.zeros((D, OUTPUTS)), "bias": jnp.zeros(OUTPUTS)},
    }

    @jax.jit
    def step(params, opt_state):
        def loss_fn(params):
            state = cfll.get_state(opt_state)
            return rule.loss(jnp.tanh(x @ params["w"]), y, state, sample_weight=there)

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        given = {"solution": solution}
        if by == "feature_fn":
            given = {"feature_fn": lambda p: jnp.tanh(x @ p["w"])}
            given |= {"targets": y, "sample_weight": there}
        updates, opt_state = tx.update(grads, opt_state, params, **given)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for _ in range(5):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    chex.assert_tree_all_finite((params, losses))
    assert losses[-1] < losses[0]
    assert bool(cfll.get_state(opt_state).info.accepted)
    np.testing.assert_array_equal(params["head"]["kernel"][:, 2], 0)


def test_sums_refuse_them():
    weights = jnp.ones((N, OUTPUTS))
    with pytest.raises(ValueError, match="one call per output"):
        cfll.GramStats.zeros(D, OUTPUTS).add(
            jnp.asarray(FEATURES), jnp.zeros((N, OUTPUTS)), weights
        )
