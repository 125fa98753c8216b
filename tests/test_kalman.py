"""The Kalman rule: a NumPy filter, ridge on all data, the proximal rule, positive for ever."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll
from cfll.rules.rule import initial_state
from tests.contract import jit

RNG = np.random.default_rng(0)
D, O = 6, 2  # noqa: E741


def batches_of(sizes, d=D, noise=0.3):
    """Features, targets and weights per batch: the features, after a ReLU, have a mean."""
    kernel = RNG.normal(size=(d, O))
    result = []
    for n in sizes:
        features = np.maximum(RNG.normal(size=(n, d)) + 0.5, 0)
        targets = features @ kernel + 1 + noise * RNG.normal(size=(n, O))
        weights = RNG.uniform(0.5, 2, n)
        weights[::5] = 0 if n > 1 else 1
        result.append((features, targets, weights))
    return result


def numpy_filter(batches, beta, process_noise, forgetting, has_bias):
    """Weights, covariance and noise variance in float64, by the textbook's covariance form."""
    m = batches[0][0].shape[1] + has_bias
    mean, covariance, seen, noise = np.zeros((m, O)), np.eye(m) / beta, 0.0, np.zeros(O)
    for features, targets, weights in batches:
        there = weights > 0
        rows = np.hstack([features, np.ones((len(features), int(has_bias)))])[there]
        covariance = covariance + process_noise * np.eye(m)
        covariance = np.linalg.inv(
            forgetting * np.linalg.inv(covariance) + (1 - forgetting) * beta * np.eye(m)
        )
        innovation = targets[there] - rows @ mean
        of_innovation = rows @ covariance @ rows.T + np.diag(1 / weights[there])
        gain = np.linalg.solve(of_innovation, rows @ covariance).T
        smallest = np.sum(innovation * np.linalg.solve(of_innovation, innovation), axis=0)
        mean = mean + gain @ innovation
        covariance = covariance - gain @ of_innovation @ gain.T
        seen, before = forgetting * seen + np.sum(weights), forgetting * seen
        noise = (before * noise + smallest) / seen
    return mean, covariance, noise


def filtered(rule, batches, has_bias, dtype):
    """The state after the batches, in the order of Eq. (17)."""
    tx = cfll.closed_form_head(rule)
    head = {"kernel": jnp.zeros((batches[0][0].shape[1], O), dtype)}
    params = {"head": head | ({"bias": jnp.zeros(O, dtype)} if has_bias else {})}

    @jit
    def step(params, opt_state, features, targets, weights):
        state = cfll.get_state(opt_state)
        _, solution = rule.loss(features, targets, state, sample_weight=weights)
        updates, opt_state = tx.update(params, opt_state, params, solution=solution)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for batch in batches:
        params, opt_state = step(params, opt_state, *(x.astype(dtype) for x in batch))
    state = cfll.get_state(opt_state)
    chex.assert_trees_all_close(cfll.get_head(params, "head"), state.anchor, rtol=1e-6)
    return state


def rows_of(head):
    return head.kernel if head.bias is None else np.vstack([head.kernel, head.bias[None]])


@pytest.mark.parametrize(
    ("process_noise", "forgetting", "sizes", "has_bias", "dtype"),
    [
        (0.0, 1.0, [3] * 12, True, np.float32),  # fewer samples than weights
        (0.0, 1.0, [10] * 3, False, np.float64),
        (0.05, 0.8, [10] * 4, True, np.float32),
        (0.05, 0.8, [3] * 4, True, np.float64),
        (0.0, 0.8, [3] * 4, False, np.float32),
    ],
)
def test_a_filter_in_numpy(x64, process_noise, forgetting, sizes, has_bias, dtype):
    batches = batches_of(sizes)
    rule = cfll.kalman(0.5, process_noise=process_noise, forgetting=forgetting)
    state = filtered(rule, batches, has_bias, dtype)
    mean, covariance, noise = numpy_filter(batches, 0.5, process_noise, forgetting, has_bias)
    rtol = 1e-5 if dtype == np.float32 else 1e-9
    size = np.max(np.abs(mean))
    np.testing.assert_allclose(rows_of(state.anchor), mean, atol=rtol * size)
    root = state.rule_state.covariance_root
    assert root.dtype == dtype
    np.testing.assert_allclose(root @ root.T, covariance, atol=rtol * np.max(covariance))
    np.testing.assert_allclose(state.rule_state.noise_variance, noise, rtol=rtol)

    posterior = state.rule_state.posterior(state.anchor)
    new = RNG.normal(size=(4, D)).astype(dtype)
    rows = np.hstack([new, np.ones((4, int(has_bias)))])
    of_head = np.einsum("ni,ij,nj->n", rows, covariance, rows)[:, None]
    outputs, variance = posterior.predict(new)
    np.testing.assert_allclose(outputs, rows @ mean, atol=10 * rtol * size)
    np.testing.assert_allclose(variance, noise * (1 + of_head), rtol=10 * rtol)


@pytest.mark.slow
@pytest.mark.parametrize("has_bias", [True, False])
def test_all_batches_are_ridge_on_all_data(has_bias):
    batches = batches_of([4] * 20)
    state = filtered(cfll.kalman(0.1), batches, has_bias, np.float32)
    features, targets, weights = (np.concatenate(part) for part in zip(*batches, strict=True))
    ridge = cfll.ridge_solve(features, targets, 0.1, use_bias=has_bias, sample_weight=weights)
    chex.assert_trees_all_close(state.anchor, ridge, rtol=1e-4, atol=1e-5)
    stacked = np.hstack([features, np.ones((80, int(has_bias)))])
    precision = (stacked.T * weights) @ stacked + 0.1 * np.eye(D + has_bias)
    root = np.asarray(state.rule_state.covariance_root, float)
    np.testing.assert_allclose(root.T @ precision @ root, np.eye(D + has_bias), atol=1e-4)
    squares = weights @ (targets - ridge(features)) ** 2 + 0.1 * np.sum(rows_of(ridge) ** 2, 0)
    np.testing.assert_allclose(state.rule_state.noise_variance, squares / weights.sum(), rtol=1e-4)


def test_the_paper_s_collapse_of_the_covariance_is_the_proximal_rule():
    # Appendix A: nothing is known of the past but the head, which moves by noise of 1 / lam.
    rule, prox = cfll.kalman(1.0, process_noise=1 / 7.0), cfll.prox(7.0)
    state = initial_state(rule, cfll.LinearHead.zeros(D, O))
    other = initial_state(prox, state.anchor)
    for features, targets, weights in batches_of([4, 4, 4]):
        batch = tuple(x.astype(np.float32) for x in (features, targets))
        collapsed = jax.tree.map(jnp.zeros_like, state.rule_state)
        state = state._replace(rule_state=collapsed)
        keywords = {"sample_weight": weights.astype(np.float32)}
        solution = rule.solve(*batch, state, **keywords)
        expected = prox.solve(*batch, other, **keywords)
        chex.assert_trees_all_close(solution.head, expected.head, rtol=1e-5, atol=1e-6)
        state = state._replace(anchor=solution.head)
        other = other._replace(anchor=expected.head)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beta", "process_noise", "forgetting"), [(1e-3, 0.0, 1.0), (0.1, 0.0, 0.99), (0.1, 1e-4, 1.0)]
)
def test_a_thousand_steps_in_float32(beta, process_noise, forgetting):
    # A Joseph form in float32 has lost its positive eigenvalues before the 700th step of the first
    # two of these.
    d, steps = 16, 1000
    batches = batches_of([8] * steps, d)
    for features, _, _ in batches:
        features[:, 0] = 0  # dead
        features[:, 1] = features[:, 2]  # repeated
        features[:, 3] += 10  # with a mean
    rule = cfll.kalman(beta, process_noise=process_noise, forgetting=forgetting)
    start = initial_state(rule, cfll.LinearHead.zeros(d, O))

    def body(state, batch):
        *batch, weights = batch
        _, solution = rule.loss(*batch, state, sample_weight=weights)
        return state._replace(anchor=solution.head, rule_state=solution.rule_state), None

    stacked = tuple(np.stack(part).astype(np.float32) for part in zip(*batches, strict=True))
    state = jit(lambda rows: jax.lax.scan(body, start, rows)[0])(stacked)
    exact = [tuple(part[k].astype(float) for part in stacked) for k in range(steps)]
    mean, covariance, noise = numpy_filter(exact, beta, process_noise, forgetting, True)
    # Each direction relative to its own variance in the exact filter, so also the smallest of them.
    root, lower = (
        np.asarray(state.rule_state.covariance_root, float),
        np.linalg.cholesky(covariance),
    )
    ratio = np.linalg.eigvalsh(np.linalg.solve(lower, np.linalg.solve(lower, root @ root.T).T))
    np.testing.assert_allclose(ratio, 1, atol=5e-3)
    np.testing.assert_allclose(state.rule_state.noise_variance, noise, rtol=1e-4)
    outputs = np.hstack([exact[-1][0], np.ones((8, 1))]) @ mean
    np.testing.assert_allclose(state.anchor(stacked[0][-1]), outputs, atol=1e-4)


X = np.asarray(RNG.normal(size=(12, 3)), np.float32)
Y = np.asarray(RNG.normal(size=(12, O)), np.float32)
PARAMS = {"w": jnp.ones((3, 4)), "head": {"kernel": jnp.zeros((4, O)), "bias": jnp.zeros(O)}}


def features_of(params, x=X):
    return jnp.tanh(x @ params["w"])


def test_algorithm_1_is_the_filter_on_the_features_of_the_moved_backbone():
    rule = cfll.kalman(1.0, forgetting=0.9)
    tx = cfll.closed_form(optax.sgd(0.1), rule)
    opt_state, params = tx.init(PARAMS), PARAMS
    state = cfll.get_state(opt_state)
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, params)
        keywords = {"targets": Y, "feature_fn": features_of}
        updates, opt_state = tx.update(grads, opt_state, params, **keywords)
        params = optax.apply_updates(params, updates)
        solution = rule.solve(features_of(params), Y, state)
        state = state._replace(anchor=solution.head, rule_state=solution.rule_state)
        chex.assert_trees_all_close(cfll.get_head(params, "head"), state.anchor, rtol=1e-4)
    found = cfll.get_state(opt_state)
    chex.assert_trees_all_close(found.rule_state, state.rule_state, rtol=1e-4, atol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.rule_state))


def test_the_backbone_descends_on_the_loss_at_the_new_head():
    rule = cfll.kalman(1.0)
    state = cfll.get_state(cfll.closed_form_head(rule).init(PARAMS))
    features = features_of(PARAMS)
    (_, solution), slope = jax.value_and_grad(rule.loss, has_aux=True)(features, Y, state)
    expected = 2 / 12 * (solution.head(features) - Y) @ solution.head.kernel.T
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_that_is_not_finite_leaves_head_and_covariance():
    rule = cfll.kalman(1.0)
    tx = cfll.closed_form_head(rule)
    opt_state = tx.init(PARAMS)
    features = features_of(PARAMS)
    for bad in (np.nan, 1e25):  # whose square overflows
        targets = Y * np.float32(bad)
        _, new = tx.update(PARAMS, opt_state, PARAMS, targets=targets, features=features)
        found, before = cfll.get_state(new), cfll.get_state(opt_state)
        assert found.info.skipped == 1
        chex.assert_trees_all_equal(found.rule_state, before.rule_state)


def test_a_traced_process_noise_of_zero_is_none():
    rng = np.random.default_rng(0)
    features, targets = (jnp.asarray(rng.normal(size=(8, k)), jnp.float32) for k in (3, O))

    def head(noise):
        rule = cfll.kalman(1.0, process_noise=noise)
        state = initial_state(rule, cfll.LinearHead.zeros(3, O))
        return rule.solve(features, targets, state).head

    chex.assert_trees_all_close(jax.jit(head)(0.0), head(0.0), rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused():
    for keywords in ({"beta": 0.0}, {"forgetting": 0.0}, {"forgetting": 1.1}):
        with pytest.raises(ValueError, match="0 < forgetting <= 1"):
            cfll.kalman(**{"beta": 1.0, **keywords})
    with pytest.raises(ValueError, match="process_noise is negative"):
        cfll.kalman(1.0, process_noise=-1.0)
    rule = cfll.kalman(1.0)
    state = initial_state(rule, cfll.LinearHead.zeros(3, O))
    with pytest.raises(ValueError, match="one weight per sample"):
        rule.loss(X, Y, state, sample_weight=np.ones_like(Y))
