"""GramStats: heads from sums are heads from the data."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfll

RNG = np.random.default_rng(0)
F = np.asarray(RNG.normal(size=(60, 8)), np.float32)
Y = np.asarray(RNG.normal(size=(60, 2)), np.float32)
W = np.asarray(RNG.uniform(0, 2, 60), np.float32)
W[::7] = 0


close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("cuts", [[], [10], [1, 2, 30, 59], list(range(1, 60))])
def test_any_chunking_equals_one_call(cuts, use_bias):
    stats = cfll.GramStats.zeros(8, 2, use_bias)
    bounds = [0, *cuts, 60]
    for start, stop in itertools.pairwise(bounds):
        stats = stats.add(F[start:stop], Y[start:stop], W[start:stop])
    close(stats, cfll.GramStats.zeros(8, 2, use_bias).add(F, Y, W))
    close(
        stats.ridge(0.5),
        cfll.ridge_solve(F, Y, 0.5, use_bias=use_bias, sample_weight=W),
    )


@pytest.mark.slow
@pytest.mark.parametrize("penalize_bias", [True, False])
@pytest.mark.parametrize("lam", [0.5, np.linspace(0.1, 1, 8), np.eye(8) + 0.1])
def test_prox_equals_the_kernel(lam, penalize_bias):
    lam = np.asarray(lam, np.float32)
    anchor = cfll.LinearHead(jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32), jnp.ones(2))
    stats = cfll.GramStats.zeros(8, 2).add(F, Y)
    close(
        stats.prox(anchor, lam, penalize_bias=penalize_bias),
        cfll.prox_solve(F, Y, anchor, lam, penalize_bias=penalize_bias),
    )


def test_merge_decay_and_psum():
    zeros = cfll.GramStats.zeros(8, 2)
    first, second = zeros.add(F[:30], Y[:30]), zeros.add(F[30:], Y[30:])
    close(first.merge(second), zeros.add(F, Y))
    close(first.decay(0.5), zeros.add(F[:30], Y[:30], np.full(30, 0.5, np.float32)))

    def on_device(features, targets):
        return zeros.add(features, targets).psum("devices").ridge(1.0)

    heads = jax.vmap(on_device, axis_name="devices")(F.reshape(4, 15, 8), Y.reshape(4, 15, 2))
    close(jax.tree.map(lambda leaf: leaf[0], heads), cfll.ridge_solve(F, Y, 1.0))


def test_scan_over_chunks():
    def body(stats, batch):
        return stats.add(*batch), None

    chunks = (F.reshape(6, 10, 8), Y.reshape(6, 10, 2))
    stats, _ = jax.jit(lambda chunks: jax.lax.scan(body, cfll.GramStats.zeros(8, 2), chunks))(
        chunks
    )
    close(stats, cfll.GramStats.zeros(8, 2).add(F, Y))


def test_singular_sums_take_the_eigendecomposition_and_say_so():
    features = np.concatenate([F[:, :4], F[:, :4], np.zeros((60, 4), np.float32)], axis=1)
    stats = cfll.GramStats.zeros(12, 2).add(features, Y)
    zero = cfll.LinearHead.zeros(12, 2)
    head, info = stats.solve(zero, 1e-7)
    assert cfll.Route(info.route) == cfll.Route.EIGH
    exact = cfll.ridge_solve(features, Y, 1e-7)
    np.testing.assert_allclose(head(features), exact(features), rtol=1e-3, atol=1e-3)


def test_derivative_through_sums(x64):
    def loss(features):
        stats = cfll.GramStats.zeros(8, 2, dtype=jnp.float64).add(features, Y.astype(float))
        return jnp.sum(stats.ridge(0.5).kernel ** 2)

    def same(features):
        return jnp.sum(cfll.ridge_solve(features, Y.astype(float), 0.5).kernel ** 2)

    close(*(jax.jit(jax.grad(f))(F.astype(float)) for f in (loss, same)))


def test_errors():
    stats = cfll.GramStats.zeros(8, 2)
    with pytest.raises(ValueError, match=r"GramStats.zeros\(7, 2\)"):
        stats.add(F[:, :7], Y)
    for other in ((7, 2), (1, 2), (8, 1), (8, 2, False)):
        with pytest.raises(ValueError, match=r"GramStats.zeros\(8, 2, True\)"):
            stats.merge(cfll.GramStats.zeros(*other))
    with pytest.raises(ValueError, match="use_bias=False"):
        stats.prox(cfll.LinearHead.zeros(8, 2, use_bias=False), 1.0)
    with pytest.raises(ValueError, match="beta is negative"):
        stats.ridge(-1.0)
    with pytest.raises(ValueError, match="anchor"):
        stats.prox(cfll.LinearHead.zeros(8, 3), 1.0)


def test_samples_may_be_sharded_over_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    batch = (F.reshape(6, 10, 8), Y.reshape(6, 10, 2))
    features, targets = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.P("x")))

    @jax.jit
    def both(features, targets):
        stats = cfll.GramStats.zeros(8, 2).add(features, targets)
        return stats.ridge(1.0), cfll.ridge_solve(features, targets, 1.0)

    for head in both(features, targets):
        close(head, cfll.ridge_solve(F, Y, 1.0))


SUMS = cfll.GramStats.zeros(8, 2)


# Long streams and means ---------------------------------------------------------------------------


def exact_sums(features, targets):
    """The sums in float64."""
    features, targets = (np.asarray(a, float).reshape(-1, a.shape[-1]) for a in (features, targets))
    sums = (features.T @ features, features.T @ targets, features.sum(0), targets.sum(0))
    sums += ((targets**2).sum(0),)
    return cfll.GramStats(*sums, np.float64(len(features)))


def largest_error(stats, exact, with_lost):
    """The largest error of a sum, relative to its largest entry."""
    lost = stats.lost if with_lost else jax.tree.map(jnp.zeros_like, stats.lost)
    return max(
        np.max(np.abs(np.asarray(a, float) + np.asarray(b, float) - c)) / np.max(np.abs(c))
        for a, b, c in zip(stats[:-1], lost[:-1], exact[:-1], strict=True)
    )


@jax.jit
def stream(features, targets):
    """The sums over the leading axis, and what two halves of it make together."""

    def sums_of(batches):
        zeros = cfll.GramStats.zeros(batches[0].shape[-1], batches[1].shape[-1])
        return jax.lax.scan(lambda stats, batch: (stats.add(*batch), None), zeros, batches)[0]

    half = len(features) // 2
    first, second = (sums_of((features[s], targets[s])) for s in (slice(half), slice(half, None)))
    return sums_of((features, targets)), first.merge(second)


def test_a_long_stream_errs_no_more_than_a_short_one():
    # Small integers and one row per batch: no product rounds, so every error is one of summing.
    features = RNG.integers(-8, 24, size=(40_000, 1, 3)).astype(np.float32) + np.float32(1 / 64)
    targets = features[..., :1] - 5
    exact = exact_sums(features, targets)
    for stats in stream(features, targets):
        assert largest_error(stats, exact, with_lost=False) < 1e-7
        assert largest_error(stats, exact, with_lost=True) < 1e-12
    naive = np.cumsum((features[:, 0] ** 2).astype(np.float32), axis=0, dtype=np.float32)[-1]
    assert np.max(np.abs(naive - np.diag(exact.gram)) / np.diag(exact.gram)) > 1e-6


def test_weights_are_counted_beyond_what_a_float_counts():
    stats = SUMS._replace(weight_sum=jnp.float32(2**24))
    for _ in range(5):
        stats = jax.jit(cfll.GramStats.add)(stats, F[:1], Y[:1])
    assert int(stats.weight_sum) + int(stats.lost.weight_sum) == 2**24 + 5
    assert stats.weight_sum == np.float32(2**24 + 5)
    assert stats.merge(stats).weight_sum == np.float32(2**25 + 10)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_in_one_call(weighted):
    features = RNG.normal(size=(1_000_001, 2)).astype(np.float32) + 1
    weight = np.full(len(features), 2, np.float32) if weighted else None
    stats = cfll.GramStats.zeros(2, 1).add(features, features[:, :1], weight)
    exact = exact_sums(features, features[:, :1])
    exact = jax.tree.map(lambda leaf: (1 + weighted) * leaf, exact)
    assert largest_error(stats, exact, with_lost=False) < 5e-6  # in one product: 4e-4


def one_stream(batches):
    return stream(*batches)[0]


def two_merged(batches):
    return stream(*batches)[1]


def four_devices(batches):
    def of_device(batches):
        return one_stream(batches).psum("devices")

    batches = jax.tree.map(lambda part: part.reshape(4, 25, *part.shape[1:]), batches)
    sums = jax.vmap(of_device, axis_name="devices")(batches)
    return jax.tree.map(lambda leaf: leaf[3], sums)


def forgotten(batches):
    """Sums that are a third of those asked for, three times."""
    third = one_stream(batches).decay(1 / 3)
    return third.merge(third).merge(third)


@pytest.mark.slow
@pytest.mark.parametrize("penalize_bias", [True, False])
@pytest.mark.parametrize("sums_of", [one_stream, two_merged, four_devices, forgotten])
@pytest.mark.parametrize(
    ("feature_mean", "target_mean"), [(10, 0), (1e3, 0), (1e4, 1e3), (0, 1e4), (0, 1e6)]
)
def test_means_cost_no_digits_of_the_kernel(feature_mean, target_mean, sums_of, penalize_bias):
    features = (RNG.normal(size=(100, 64, 4)) + feature_mean).astype(np.float32)
    kernel = np.array([[3.0], [1.0], [-5.0], [2.0]])
    targets = ((features - np.float64(feature_mean)) @ kernel + target_mean).astype(np.float32)
    head, info = sums_of((features, targets)).solve(
        cfll.LinearHead.zeros(4, 1), 1e-3, penalize_bias=penalize_bias
    )
    rows = np.hstack([features.reshape(-1, 4), np.ones((6400, 1))]).astype(float)
    penalty = np.diag([1e-3] * 4 + [1e-3 * penalize_bias])
    stacked = np.vstack([rows, np.sqrt(penalty)])
    exact = np.linalg.lstsq(stacked, np.vstack([targets.reshape(-1, 1), np.zeros((5, 1))]))[0]
    assert np.linalg.norm(head.kernel - exact[:4]) < 5e-6 * np.linalg.norm(exact[:4])
    assert np.abs(head.bias - exact[4]) < 5e-6 * (
        np.abs(exact[:4]).max() * max(feature_mean, 1) + target_mean
    )
    assert cfll.Route(info.route) == cfll.Route.PRIMAL
    assert info.rcond > 1e-2


@pytest.mark.parametrize(
    ("d", "mean", "spread", "lam"),
    [
        (16, 30, 1, 10.0),
        (16, 1e3, 1, 10.0),
        (16, 1e3, 1, 100.0),
        (16, 3e3, 1, 1e3),
        (1, 30, 0.01, 0.01),
        (1, 1e3, 0.1, 0.01),
    ],
)
def test_a_penalized_bias_costs_no_digits_of_the_kernel(d, mean, spread, lam):
    noise = spread * np.random.default_rng(1).normal(size=(1000, d))
    features = (noise + mean).astype(np.float32)
    kernel = np.random.default_rng(2).normal(size=(d, 1)) / spread
    targets = ((features - np.float64(mean)) @ kernel + 5).astype(np.float32)
    stats = cfll.GramStats.zeros(d, 1).add(features, targets)
    head, info = stats.solve(cfll.LinearHead.zeros(d, 1), lam)
    rows = np.vstack([np.hstack([features, np.ones((1000, 1))]), np.sqrt(lam) * np.eye(d + 1)])
    exact = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((d + 1, 1))]).astype(float))[0]
    assert np.linalg.norm(head.kernel - exact[:d]) < 5e-6 * np.linalg.norm(exact[:d])
    assert np.abs(head.bias - exact[d]) < 1e-5
    assert info.rcond > 1e-2


def test_a_constant_feature_without_a_penalty_takes_the_mean():
    rng = np.random.default_rng(3)
    features = np.hstack([rng.normal(size=(50, 2)), np.full((50, 1), 2.0)]).astype(np.float32)
    targets = (features[:, :1] + 6).astype(np.float32)
    stats = cfll.GramStats.zeros(3, 1).add(features, targets)
    head = stats.ridge(jnp.array([1e-3, 1e-3, 0.0]))
    np.testing.assert_allclose(head(features), targets, atol=1e-3)
    np.testing.assert_allclose(head.bias, 0, atol=1e-3)


def test_sums_without_remainders_are_sums():
    bare = cfll.GramStats(*SUMS.add(F, Y)[:-1])  # from elsewhere
    close(bare.merge(SUMS).ridge(0.5), cfll.ridge_solve(F, Y, 0.5))
    close(bare.ridge(0.5), cfll.ridge_solve(F, Y, 0.5))
    close(SUMS.prox(cfll.LinearHead(jnp.ones((8, 2)), jnp.ones(2)), 1.0).kernel, np.ones((8, 2)))
