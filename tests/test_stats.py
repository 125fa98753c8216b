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

    close(jax.grad(loss)(F.astype(float)), jax.grad(same)(F.astype(float)))


def test_errors():
    stats = cfll.GramStats.zeros(8, 2)
    with pytest.raises(ValueError, match=r"GramStats.zeros\(7, 2\)"):
        stats.add(F[:, :7], Y)
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
