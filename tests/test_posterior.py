"""The Bayesian last layer: scikit-learn, closed forms in float64, coverage of intervals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import BayesianRidge

import cfll

RNG = np.random.default_rng(0)


def problem(n, d, o=1, noise=0.5, mean=0.0):
    features = RNG.normal(size=(n, d)) * np.geomspace(1, 0.1, d) + mean
    kernel = RNG.normal(size=(d, o))
    return features, features @ kernel + 2 + noise * RNG.normal(size=(n, o))


def without_bias(*rows):
    """The same rows (n, k), rotated, in the space orthogonal to the bias's column of ones."""
    n = len(rows[0])
    rest = np.linalg.qr(np.hstack([np.ones((n, 1)), RNG.normal(size=(n, n - 1))]))[0][:, 1:]
    return [rest.T @ part for part in rows]


def bayesian_ridge(features, targets):
    """scikit-learn without its prior of the two variances."""
    flat = dict.fromkeys(["alpha_1", "alpha_2", "lambda_1", "lambda_2"], 0)
    model = BayesianRidge(fit_intercept=False, max_iter=100_000, tol=1e-13, **flat)
    return model.fit(features, targets[:, 0])


def posterior_of(features, targets, anchor=None, weights=None, dtype=np.float32, use_bias=True):
    features, targets = features.astype(dtype), targets.astype(dtype)
    d, o = features.shape[1], targets.shape[1]
    rest = targets if anchor is None else targets - anchor(features)
    stats = cfll.GramStats.zeros(d, o, use_bias, dtype).add(features, rest, weights)
    return cfll.bayesian_ridge(stats, anchor)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_output_is_that_of_scikit_learn(x64, dtype, use_bias):
    features, targets = problem(60, 8, mean=use_bias)
    targets = targets - 2 * (not use_bias)
    weights = np.ones(60)
    weights[::2] = 2.0 * use_bias  # a sample of weight two is there twice
    posterior, info = posterior_of(features, targets, None, weights, dtype, use_bias)
    features, targets = (np.repeat(x, weights.astype(int), axis=0) for x in (features, targets))
    rows = without_bias(features, targets) if use_bias else (features, targets)
    expected, rtol = bayesian_ridge(*rows), 1e-3 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(info.beta, expected.lambda_ / expected.alpha_, rtol=rtol)
    np.testing.assert_allclose(posterior.noise_variance[0], 1 / expected.alpha_, rtol=rtol)
    np.testing.assert_allclose(posterior.head.kernel[:, 0], expected.coef_, rtol=rtol, atol=rtol)
    covariance = posterior.covariance(0)[:8, :8]
    np.testing.assert_allclose(covariance, expected.sigma_, rtol=rtol, atol=rtol * 1e-2)
    assert info.noise_rcond[0] > 1e-3


def evidence(features, targets, beta):
    """The logarithm of the evidence of one output at its best noise variance, and that."""
    x, y = without_bias(features, targets)
    matrix = np.eye(len(y)) + x @ x.T / beta
    noise = np.sum(y * np.linalg.solve(matrix, y)) / len(y)
    return -0.5 * (len(y) * np.log(noise) + np.linalg.slogdet(matrix)[1]), noise


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 8])  # more samples than features, and fewer
def test_every_output_has_its_own_beta_and_noise(x64, n):
    features, targets = problem(n, 10, o=3, noise=np.array([0.3, 1.0, 3.0]))
    posterior, info = posterior_of(features, targets, dtype=np.float64)
    new = RNG.normal(size=(2, 3, 10))
    mean, variance = posterior.predict(new)
    rows, bordered = (np.concatenate([x, np.ones((*x.shape[:-1], 1))], -1) for x in (features, new))
    for k, beta in enumerate(np.asarray(info.beta)):
        output = targets[:, k : k + 1]
        best, noise = evidence(features, output, beta)
        for other in np.geomspace(1e-4, 1e4, 81):
            assert evidence(features, output, beta * other)[0] <= best + 1e-5
        np.testing.assert_allclose(posterior.noise_variance[k], noise, rtol=1e-6)
        ridge = cfll.ridge_solve(features, output, beta, penalize_bias=False)
        np.testing.assert_allclose(mean[..., k], ridge(new)[..., 0], rtol=1e-6, atol=1e-8)
        # The bordered normal equations are the precision of kernel and bias.
        precision = rows.T @ rows + np.diag([beta] * 10 + [0])
        covariance = noise * np.linalg.inv(precision)
        np.testing.assert_allclose(posterior.covariance(k), covariance, rtol=1e-6, atol=1e-9)
        of_head = np.einsum("...i,ij,...j->...", bordered, covariance, bordered)
        np.testing.assert_allclose(variance[..., k], noise + of_head, rtol=1e-6)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), posterior)
    assert {part.dtype for part in narrow.predict(new)} == {np.dtype("float64")}


def test_sums_of_residuals_find_noise_that_float32_sums_of_targets_lose():
    features, targets = (rows.astype(np.float32) for rows in problem(5000, 20, noise=1e-4))
    once, info = posterior_of(features, targets)
    assert info.noise_rcond[0] < 1e-6  # says that the noise is not to be seen
    again, of_residuals = posterior_of(features, targets, once.head)
    assert of_residuals.noise_rcond[0] > 0.5
    rows = np.hstack([features, np.ones((5000, 1))]).astype(float)
    squares = np.linalg.lstsq(rows, targets.astype(float))[1]
    np.testing.assert_allclose(again.noise_variance, squares / (5000 - 21), rtol=1e-2)
    np.testing.assert_allclose(again.noise_variance, 1e-8, rtol=0.05)
    assert once.noise_variance[0] > 1e-8  # not too sure of itself


def test_ninety_of_a_hundred_targets_are_within_their_interval():
    features, targets = problem(40_000, 20, o=2, noise=np.array([0.3, 3.0]), mean=1.0)
    features, targets = features.astype(np.float32), targets.astype(np.float32)

    def inside(train, test):
        stats = cfll.GramStats.zeros(20, 2).add(*train)
        mean, variance = cfll.bayesian_ridge(stats)[0].predict(test[0])
        return jnp.mean(jnp.abs(test[1] - mean) < 1.6449 * jnp.sqrt(variance), axis=0)

    for sets, samples in ((100, 80), (4, 1000)):
        rows = (x.reshape(sets, -1, x.shape[1]) for x in (features, targets))
        parts = [(x[:, :samples], x[:, samples:]) for x in rows]
        train, test = zip(*parts, strict=True)
        covered = jax.jit(jax.vmap(inside))(train, test)
        np.testing.assert_allclose(covered.mean(axis=0), 0.9, atol=0.02)


def test_rows_held_out_rescale_each_output():
    features, targets = (rows.astype(np.float32) for rows in problem(400, 6, o=2))
    posterior, _ = posterior_of(features[:100], targets[:100])
    scale = np.array([0.1, 3.0], np.float32)  # as if the backbone had fitted noise
    wrong = posterior._replace(
        variances=posterior.variances * scale[None], noise_variance=posterior.noise_variance * scale
    )
    rows = features[100:].reshape(3, 100, 6), targets[100:].reshape(3, 100, 2)
    right = wrong.rescaled(*rows)
    mean, variance = right.predict(rows[0])
    np.testing.assert_allclose(np.mean((rows[1] - mean) ** 2 / variance, axis=(0, 1)), 1, rtol=1e-4)
    np.testing.assert_allclose(mean, posterior.head(rows[0]))
    expected = posterior.rescaled(*rows)
    np.testing.assert_allclose(right.variances, expected.variances, rtol=1e-4)
    np.testing.assert_allclose(right.noise_variance, expected.noise_variance, rtol=1e-4)
    with pytest.raises(ValueError, match="Write targets"):  # (n,) and (n, o) would broadcast
        wrong.rescaled(rows[0], rows[1][:, 0])
    with pytest.raises(ValueError, match="outputs"):
        wrong.rescaled(rows[0], jnp.concatenate([rows[1], rows[1]], axis=-1))


def test_data_without_signal_noise_or_samples():
    features = RNG.normal(size=(200, 5)).astype(np.float32)
    noise = RNG.normal(size=(200, 1)).astype(np.float32)
    features = features - noise * (noise.T @ features) / np.sum(noise**2)  # they know nothing of it
    silent, info = posterior_of(features, noise, use_bias=False)
    assert info.num_effective < 1e-3
    np.testing.assert_allclose(silent.head.kernel, 0, atol=1e-3)
    np.testing.assert_allclose(silent.noise_variance, np.mean(noise**2), rtol=1e-3)
    exact, info = posterior_of(features, features[:, :1], use_bias=False)
    assert info.num_effective > 4.99
    assert info.noise_rcond[0] < 1e-6
    assert exact.noise_variance[0] < 1e-6
    dead, info = posterior_of(np.hstack([features, 0 * features]), features[:, :1] + noise)
    assert info.num_effective < 5
    assert np.all(np.isfinite(dead.covariance(0)))
    rows = np.stack([np.zeros(10), 1e2 * np.eye(10)[7]]).astype(np.float32)
    nothing, never_seen = dead.head_variance(rows)
    prior = dead.noise_variance / info.beta
    np.testing.assert_allclose(never_seen - nothing, 1e4 * prior, rtol=1e-5)
    empty, _ = cfll.bayesian_ridge(cfll.GramStats.zeros(5, 1))
    assert not np.any(np.isfinite(empty.noise_variance))


def test_bfloat16_features_and_a_stream():
    features, targets = problem(512, 6)
    features, targets = jnp.asarray(features, jnp.bfloat16), jnp.asarray(targets, jnp.float32)

    @jax.jit
    def streamed(features, targets):
        def body(stats, batch):
            return stats.add(*batch), None

        return jax.lax.scan(body, cfll.GramStats.zeros(6, 1), (features, targets))[0]

    stats = streamed(features.reshape(8, 64, 6), targets.reshape(8, 64, 1))
    expected, _ = posterior_of(np.asarray(features, np.float32), np.asarray(targets))
    found, _ = cfll.bayesian_ridge(stats)
    np.testing.assert_allclose(found.noise_variance, expected.noise_variance, rtol=1e-4)
    assert {part.dtype for part in found.predict(features)} == {np.dtype("float32")}


@pytest.mark.parametrize(("n", "d", "dead"), [(10, 30, 0), (40, 6, 2)])
def test_residuals_of_an_anchor_where_features_do_not_determine_it(x64, n, d, dead):
    features, targets = problem(n, d)
    features[:, d - dead :] = 0
    anchor = cfll.LinearHead(RNG.normal(size=(d, 1)), RNG.normal(size=1))
    expected, _ = posterior_of(features, targets, dtype=np.float64)
    posterior, _ = posterior_of(features, targets, anchor, dtype=np.float64)
    chex.assert_trees_all_close(posterior.head, expected.head, rtol=1e-5, atol=1e-7)
    new = RNG.normal(size=(5, d))
    chex.assert_trees_all_close(posterior.predict(new), expected.predict(new), rtol=1e-5)


def test_an_anchor_stays_in_a_direction_that_is_weak_in_float32():
    features = RNG.normal(size=(400, 2)) * [1, 1e-4]
    targets = features @ np.array([[1.0], [1e4]]) + 0.1 * RNG.normal(size=(400, 1))
    anchor = cfll.LinearHead(jnp.array([[1.0], [1e4]]), jnp.zeros(1))
    rest = targets - features @ np.array([[1.0], [1e4]])
    stats = cfll.GramStats.zeros(2, 1).add(np.float32(features), np.float32(rest))
    posterior, _ = cfll.bayesian_ridge(stats, anchor)
    mean, variance = posterior.predict(np.float32(features))
    assert np.mean((targets - mean) ** 2 / variance) < 1.2


def test_a_posterior_refuses_features_of_another_width():
    posterior, _ = posterior_of(*problem(20, 3))
    with pytest.raises(ValueError, match=r"write \(..., 3\)"):
        posterior.head_variance(jnp.ones((5, 4)))


def test_an_anchor_that_does_not_fit_is_refused():
    stats = cfll.GramStats.zeros(8, 2)
    with pytest.raises(ValueError, match="use_bias=False"):
        cfll.bayesian_ridge(stats, cfll.LinearHead.zeros(8, 2, use_bias=False))
    with pytest.raises(ValueError, match="anchor"):
        cfll.bayesian_ridge(stats, cfll.LinearHead.zeros(8, 3))
