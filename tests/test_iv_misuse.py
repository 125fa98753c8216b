"""cfll.iv and its backbones where something is missing or does not fit: errors name the fix."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cfll
from cfll import iv
from tests.test_iv import make_batch, make_networks, optimizers

X = jax.random.normal(jax.random.key(0), (16, 3)) + 4


def started(covariate):
    networks, batch = make_networks(covariate), make_batch(8, covariate)
    method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0)
    return networks, batch, method, method.init(batch)


@pytest.mark.parametrize(
    "call",
    [
        lambda networks, batch, method, state: method.init(batch),
        lambda networks, batch, method, state: method.stage2(state, batch, batch),
        lambda networks, batch, method, state: method.round(state, batch, batch),
        lambda networks, batch, method, state: iv.refit(networks, state, [batch], [batch]),
        lambda networks, batch, method, state: iv.predict(
            networks, state, batch.treatment, batch.covariate
        ),
    ],
)
def test_a_covariate_that_no_network_sees_is_refused(call):
    networks, batch, method, state = started(covariate=False)
    call(networks, batch, method, state)
    batch = make_batch(8, covariate=True)
    with pytest.raises(TypeError, match=r"no network for it: write Networks\(..., covariate"):
        call(networks, batch, method, state)


@pytest.mark.parametrize("field", ["treatment", "instrument", "covariate"])
def test_a_missing_field_is_named(field):
    networks, batch, method, state = started(covariate=True)
    bad = batch._replace(**{field: None})
    calls = [
        lambda: method.stage2(state, bad, bad),
        lambda: method.round(state, bad, bad),
        lambda: iv.refit(networks, state, [bad], [bad]),
    ]
    if field != "covariate":
        calls.append(lambda: method.stage1(state, bad))
    for call in calls:
        with pytest.raises(ValueError, match=f"no {field}|covariate=c"):
            call()


def test_heads_and_batches_that_do_not_fit_are_refused():
    networks, batch, _, state = started(covariate=False)
    refitted = iv.refit(networks, state, [batch], [batch])
    for head in (refitted, refitted.stage1):
        with pytest.raises(TypeError, match=r"write stage2=cfll\.iv\.refit\(\.\.\.\)\.stage2"):
            iv.predict(networks, state, batch.treatment, stage2=head)
    wider = batch._replace(outcome=jnp.ones((8, 3)))
    with pytest.raises(ValueError, match=r"targets of shape \(8, 3\) do not fit"):
        iv.refit(networks, state, [batch], [wider])
    with pytest.raises(TypeError, match=r"stage1_data has a tuple: write cfll\.iv\.IVBatch"):
        iv.refit(networks, state, [tuple(batch)], [batch])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(x)

    def trained(self, x, training=False):
        return self(x, train=training)


class NnxNormed(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, train=False):
        return self.norm(x, use_running_average=not train)

    def features(self, x):
        return self.norm(x)


def test_a_mode_that_nobody_would_set_is_refused():
    variables = Normed().init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="keyword for the mode is training"):
        cfll.flax.backbone(Normed(), variables, method="trained")
    for net in (
        cfll.flax.backbone(Normed(), variables),
        cfll.flax.backbone(NnxNormed()),
        cfll.flax.backbone(NnxNormed(), method="features"),
        cfll.flax.backbone(NnxNormed(), method=NnxNormed.features),
        cfll.flax.backbone(NnxNormed(), method=NnxNormed().features),
        cfll.flax.backbone(NnxNormed(), method="norm"),
    ):
        features, stats = net.apply(net.params, net.stats, X, train=True)
        np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
        assert not all(
            np.array_equal(new, old)
            for new, old in zip(jax.tree.leaves(stats), jax.tree.leaves(net.stats), strict=True)
        )
        features, _ = net.apply(net.params, net.stats, X, train=False)
        np.testing.assert_allclose(features, X, rtol=1e-4)


def test_a_mode_that_is_set_stays():
    variables = Normed().init(jax.random.key(0), X)
    frozen = functools.partial(Normed.trained, training=False)
    net = cfll.flax.backbone(Normed(), variables, method=frozen)
    features, _ = net.apply(net.params, net.stats, X, train=True)
    np.testing.assert_allclose(features, X, rtol=1e-4)


def test_a_linen_module_needs_its_variables():
    variables = nn.Dense(4).init(jax.random.key(0), X)
    for bad in (None, variables["params"]):
        with pytest.raises(TypeError, match=r"write cfll\.flax\.backbone\(module, module\.init"):
            cfll.flax.backbone(nn.Dense(4), bad)
    bare = nn.BatchNorm(True, use_scale=False, use_bias=False)
    assert cfll.flax.backbone(bare, bare.init(jax.random.key(0), X)).params == {}
    fixed = cfll.flax.backbone(nn.Sequential([jnp.sin]), {})
    np.testing.assert_allclose(fixed.apply({}, {}, X, train=True)[0], jnp.sin(X))


def test_a_method_may_be_a_function():
    model = NnxNormed()
    by_name = cfll.flax.feature_fn(model, X, method="features")
    by_function = cfll.flax.feature_fn(model, X, method=NnxNormed.features)
    params = nnx.state(model, nnx.Param)
    np.testing.assert_array_equal(by_function(params), by_name(params))
