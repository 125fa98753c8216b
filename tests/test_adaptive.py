"""A penalty that tunes itself: NumPy's slopes, any start, padding, both orders, devices."""

import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cfll
import cfll.flax
from cfll.rules.rule import advance, initial_state
from tests import nets

RNG = np.random.default_rng(0)
RULE = cfll.adaptive_prox(solver="primal")  # compiles fastest
AUTO = cfll.adaptive_prox()


def batches_of(count, n, d, o, points=None, dtype=np.float32):
    shape = (count, n, d) if points is None else (count, n, points, d)
    x = RNG.normal(size=shape)
    y = x @ RNG.normal(size=(d, o)) + 0.1 * RNG.normal(size=(*shape[:-1], o))
    return x.astype(dtype), y.astype(dtype)


def state_of(d, o, rule=RULE, dtype=jnp.float32):
    return initial_state(rule, cfll.LinearHead.zeros(d, o, dtype=dtype))


def step(rule, state, x, y, weights=None):
    return advance(state, rule.loss(x, y, state, sample_weight=weights)[1])


# NumPy -------------------------------------------------------------------------------------------


def validated(x, y, weights, head, lam, turn):
    """The error on one half of the other's head, d log(error) / d log(lam), and that head."""

    def rows(part):
        halves = [a[part : len(a) // 2 * 2 : 2] for a in (x, y, weights)]
        z, y_half, w = (a.reshape(-1, *a.shape[x.ndim - 1 :]) for a in halves)
        return np.hstack([z, np.ones((len(z), 1))]), y_half, w[:, None]

    z, targets, w = rows(turn)
    matrix = z.T @ (w * z) + lam * np.eye(z.shape[1])
    step = np.linalg.solve(matrix, z.T @ (w * (targets - z @ head)))
    change = -lam * np.linalg.solve(matrix, step)
    z, targets, w = rows(1 - turn)
    left = targets - z @ (head + step)
    error = np.sum(w * left**2)
    return error, -2 * np.sum(w * left * (z @ change)) / error, head + step


@pytest.mark.slow
@pytest.mark.parametrize(("n", "points", "d"), [(9, 3, 4), (10, None, 12)], ids=["tall", "wide"])
def test_lam_descends_on_the_error_of_the_other_half(x64, n, points, d):
    xs, ys = batches_of(4, n, d, 2, points, np.float64)
    weights = RNG.integers(1, 3, size=xs.shape[:-1]) * 1.0
    state = state_of(d, 2, dtype=jnp.float64)
    jitted = jax.jit(partial(step, AUTO))
    mean, square, lam, lams = 0.0, 0.0, None, []
    for count, (x, y, w) in enumerate(zip(xs, ys, weights, strict=True)):
        norm = np.sum(w * np.sum(x**2, axis=-1)) / np.sum(w)
        anchor = np.vstack(state.anchor)
        validate = partial(validated, x, y, w, anchor, turn=count % 2)
        if lam is None:
            candidates = 300 * norm * 4.0 ** -np.arange(12)
            at_anchor = np.sum(w[..., None] * y**2) / np.sum(w)  # which is zero
            scores = []
            for candidate in candidates:
                error, _, head = validate(lam=candidate)
                size = np.sqrt(np.sum(head[:-1] ** 2) * norm / at_anchor)
                scores.append(error * max(1, size) ** 0.25)
            lam = candidates[np.argmax(scores <= 1.05 * min(scores))]
        _, slope, _ = validate(lam=lam)
        pulled = slope + 0.01 * (lam > norm)
        mean, square = 0.8 * mean + 0.2 * pulled, 0.95 * square + 0.05 * pulled**2
        lam = lam * np.exp(-0.3 * mean / (np.sqrt(square) + 3e-3))
        old, state = state.anchor, jitted(state, x, y, w)
        np.testing.assert_allclose(state.rule_state.slope, slope, rtol=1e-8)
        np.testing.assert_allclose(state.lam, lam, rtol=1e-8)
        expected = cfll.prox_solve(x, y, old, lam, sample_weight=jnp.asarray(w))
        chex.assert_trees_all_close(state.anchor, expected, rtol=1e-8, atol=1e-12)
        lams.append(lam)
    assert len(set(lams)) > 2


def test_the_first_lam_is_small_only_where_a_large_head_pays(x64):
    """Directions of the features that hardly vary: the targets are along them, or hardly."""
    rng, scales = np.random.default_rng(0), 10.0 ** -np.arange(4)
    x = rng.normal(size=(256, 4)) * scales
    rule, state = cfll.adaptive_prox(), state_of(4, 1, dtype=jnp.float64)
    norm, noise = np.mean(np.sum(x**2, axis=1)), 0.3 * rng.normal(size=(256, 1))
    lams = {}
    for share in (0.3, 1.0):
        y = x / scales @ np.array([[1.0], [0], [0], [share]]) + noise
        lams[share] = float(rule.solve(x, y, state).rule_state.lam) / norm
    # A head 300 times as large halves the error, or one 1000 times as large takes 92 % of it away.
    assert lams[0.3] > 1 > 0.01 > lams[1.0]


# Streams -----------------------------------------------------------------------------------------


def drifting(steps=600, n=32, d=8, drift=0.1, noise=1.0):
    """Batches of a linear head that walks at random, and the head."""
    rng = np.random.default_rng(1)
    head = np.cumsum(drift * rng.normal(size=(steps, d, 1)), axis=0)
    x = rng.normal(size=(steps, n, d))
    y = x @ head + noise * rng.normal(size=(steps, n, 1))
    return [np.asarray(a, np.float32) for a in (x, y, head)]


def test_every_start_reaches_the_best_lam():
    xs, ys, heads = drifting()
    half = len(xs) // 2
    grams, products = np.swapaxes(xs, 1, 2) @ xs, np.swapaxes(xs, 1, 2) @ ys

    def error_at(lam):
        w, errors = np.zeros_like(heads[0]), []
        for gram, product, head in zip(grams, products, heads, strict=True):
            w = w + np.linalg.solve(gram + lam * np.eye(len(w)), product - gram @ w)
            errors.append(np.sum((w - head) ** 2))
        return np.mean(errors[half:])

    errors = {lam: error_at(lam) for lam in 10 ** np.arange(0, 3, 0.25)}
    best = min(errors, key=errors.get)
    rule = cfll.adaptive_prox(solver="primal")
    start = initial_state(rule, cfll.LinearHead.zeros(8, 1, use_bias=False))

    @jax.jit
    def run(state):
        def body(state, batch):
            state = step(rule, state, *batch[:2])
            return state, (state.lam, jnp.sum((state.anchor.kernel - batch[2]) ** 2))

        return jax.lax.scan(body, state, (xs, ys, heads))[1]

    lams = []
    for lam0 in (1e-3, 1e5, None):  # the last: found on the first batch
        begin = start.rule_state
        if lam0 is not None:
            begin = begin._replace(lam=jnp.float32(lam0), mean_square=jnp.float32(1e-4))
        lam, error = run(start._replace(rule_state=begin))
        assert np.mean(error[half:]) < 1.1 * errors[best]
        assert abs(np.log(np.median(lam[half:]) / best)) < np.log(3)
        lams.append(lam[half:])
    for one in lams[1:]:
        np.testing.assert_allclose(one, lams[0], rtol=1e-2)


def test_scan_and_a_checkpoint_go_on_as_a_loop():
    xs, ys = batches_of(6, 8, 3, 2)
    jitted = jax.jit(partial(step, RULE))
    expected, lams = state_of(3, 2), []
    for batch in zip(xs, ys, strict=True):
        expected = jitted(expected, *batch)
        lams.append(float(expected.lam))
    assert len(set(lams)) == 6  # so there is something to go on with
    state, _ = jax.lax.scan(lambda s, b: (jitted(s, *b), None), state_of(3, 2), (xs[:3], ys[:3]))
    stored = flax.serialization.to_bytes(state)
    state = flax.serialization.from_bytes(state_of(3, 2), stored)
    for batch in zip(xs[3:], ys[3:], strict=True):
        state = jitted(state, *batch)
    chex.assert_trees_all_close(state, expected, rtol=1e-5)


# Trouble -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [0, 1])
def test_a_half_without_samples_leaves_lam_as_it_is(present):
    (x,), (y,) = batches_of(1, 8, 3, 2)
    there = np.arange(8)[:, None] * np.ones((1, 2)) < present
    x, y = np.where(there[:, :1], x, np.nan), np.where(there, y, np.nan)
    mean = jnp.float32(0.1)
    for weights in (there[:, 0] * 1.0, there * 1.0):  # per sample, per output
        state, jitted = state_of(3, 2), jax.jit(partial(step, RULE))
        later = state.rule_state._replace(lam=mean, mean_slope=mean, mean_square=mean)
        for old in (state, state._replace(rule_state=later)):
            new = jitted(old, x, y, np.asarray(weights, np.float32))
            assert bool(new.info.accepted)
            assert new.lam > 0
            chex.assert_tree_all_finite((new.anchor, new.rule_state))
            kept = new.rule_state._replace(lam=old.lam)
            chex.assert_trees_all_equal(kept, old.rule_state)
        if not present:
            assert new.lam == later.lam


def test_samples_of_weight_zero_are_in_neither_half():
    (x,), (y,) = batches_of(1, 12, 3, 2)
    step_of = jax.jit(partial(step, RULE))
    for there in (np.arange(12) % 2 == 0, np.arange(12) % 3 > 0, np.arange(12) % 5 > 0):
        alone = together = state_of(3, 2)
        for _ in range(4):
            together = step_of(together, x, y, there)  # booleans are weights, too
            alone = step_of(alone, x[there], y[there], np.ones(there.sum(), np.float32))
        assert alone.rule_state.mean_square > 0
        # Equal but for rounding: rows of zeros change the order of the sums, in four steps of lam.
        chex.assert_trees_all_close(together[:3], alone[:3], rtol=1e-3)


def test_what_is_not_finite_does_not_reach_lam():
    (x,), (y,) = batches_of(1, 8, 3, 2)
    jitted = jax.jit(partial(step, RULE))
    state = jitted(state_of(3, 2), x, y)
    for bad in (np.nan, np.inf, 1e30):  # the last overflows in the error alone
        new = jitted(state, x, y * np.float32(bad))
        chex.assert_tree_all_finite((new.anchor, new.rule_state))
        np.testing.assert_array_equal(new.lam, state.lam)
    assert np.isfinite(jitted(state, 0 * x, y).lam)


def test_what_makes_no_sense_is_an_error_while_tracing():
    with pytest.raises(ValueError, match=r"one half of the first axis .* batches of two"):
        RULE.loss(jnp.ones((1, 16, 3)), jnp.ones((1, 16, 2)), state_of(3, 2))
    with pytest.raises(ValueError, match="leave out solver='qr'"):
        cfll.adaptive_prox(solver="qr", axis_name="i")


# Training ----------------------------------------------------------------------------------------

X, Y = (a[0] for a in batches_of(1, 24, 3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["Eq. (17)", "Algorithm 1"])
def test_linen_and_nnx_train_alike(standard_promotion, order):
    tx = cfll.closed_form(optax.sgd(0.01), RULE)
    net, module = nets.Nnx(3, 5, 2), nets.Linen(5, 2)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    state = cfll.flax.TrainState.create(
        apply_fn=module.apply, params=jax.tree.map(jnp.array, params), tx=tx
    )
    optimizer = cfll.flax.Optimizer(net, tx, wrt=nnx.Param)

    def loss_at(features, head, head_state):
        if order == "Eq. (17)":
            return RULE.loss(features, Y, head_state)
        return jnp.mean(jnp.sum((Y - head(features)) ** 2, -1)), None

    @jax.jit
    def linen_step(state):
        def loss_fn(params):
            features = state.apply_fn({"params": params}, X, method="features")
            return loss_at(features, cfll.get_head(params, "head"), cfll.get_state(state))

        (_, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        if solution is not None:
            return state.apply_gradients(grads=grads, solution=solution)
        features = cfll.flax.feature_fn(state, X)
        return state.apply_gradients(grads=grads, targets=Y, feature_fn=features)

    @nnx.jit
    def nnx_step(net, optimizer):
        head_state = cfll.get_state(optimizer)

        def loss_fn(net):
            return loss_at(net.features(X), net.head, head_state)

        (_, solution), grads = nnx.value_and_grad(loss_fn, has_aux=True)(net)
        if solution is not None:
            optimizer.update(net, grads, solution=solution)
        else:
            features = cfll.flax.feature_fn(net, X)
            optimizer.update(net, grads, targets=Y, feature_fn=features)

    lams = []
    for _ in range(4):
        state = linen_step(state)
        nnx_step(net, optimizer)
        one, other = cfll.get_state(state), cfll.get_state(optimizer)
        chex.assert_trees_all_close(one.rule_state, other.rule_state, rtol=1e-3, atol=1e-5)
        lams.append(float(one.lam))
    assert all(a != b for a, b in itertools.pairwise(lams))


@pytest.mark.slow
def test_the_gradient_is_that_of_prox_at_the_same_lam(x64):
    x, y = X.astype(np.float64), Y.astype(np.float64)
    state = step(RULE, state_of(3, 2, dtype=jnp.float64), x, y)
    solution = RULE.loss(x, y, state)[1]
    fixed = cfll.prox(solution.rule_state.lam)
    of_fixed = state._replace(rule_state=fixed.init(state.anchor))

    def derivatives(rule, state):
        loss = lambda x: rule.loss(x, y, state)[0]  # noqa: E731
        return loss(x), jax.grad(loss)(x), jax.jvp(jax.grad(loss), (x,), (y[:, :1] + 0 * x,))[1]

    chex.assert_trees_all_close(derivatives(RULE, state), derivatives(fixed, of_fixed), rtol=1e-10)


# Devices -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_devices_that_share_a_batch_train_as_one():
    command = [sys.executable, "-m", "tests.adaptive_sharded"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {"Auto", "Explicit"}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_an_axis_shares_slope_and_norm(x64):
    (x,), (y,) = batches_of(1, 24, 3, 2, dtype=np.float64)
    state = state_of(3, 2, dtype=jnp.float64)
    rule = cfll.adaptive_prox(axis_name="i")
    parts = [a.reshape(3, 8, -1) for a in (x, y)]
    solutions = jax.vmap(lambda x, y: rule.loss(x, y, state)[1], axis_name="i")(*parts)
    lam = solutions.rule_state.lam
    np.testing.assert_array_equal(lam, lam[0])
    slope = solutions.rule_state.slope[0]
    pulled = slope  # lam is below the mean of |phi|^2
    square = 0.05 * pulled**2
    factor = np.exp(-0.3 * 0.2 * pulled / (np.sqrt(square) + 3e-3))
    norm = np.sum(x**2) / len(x)
    assert lam[0] / factor < norm
    power = np.log(lam[0] / factor / (300 * norm)) / np.log(4)
    np.testing.assert_allclose(power, np.round(power), atol=1e-9)  # a candidate of the first batch
    expected = cfll.prox_solve(x, y, state.anchor, lam[0])
    for k in range(3):
        one = jax.tree.map(lambda leaf: leaf[k], solutions.head)  # noqa: B023
        chex.assert_trees_all_close(one, expected, rtol=1e-9, atol=1e-12)
