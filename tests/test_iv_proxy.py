"""Proxy variables against a NumPy transcription, a bridge in closed form, and linen against NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cfll.flax
from cfll import iv

RATE = 0.05
SHAPES = {"treatment1": (1, 3), "treatment_proxy": (2, 2), "outcome_proxy": (1, 3)}
SHAPES |= {"treatment2": (1, 2)}


def make_data(n, seed):
    """Treatment, both proxies and the outcome, float64."""
    rng = np.random.default_rng(seed)
    u, noise = rng.normal(size=(n, 1)), rng.normal(size=(n, 4))
    z, a = u + noise[:, :2], u + noise[:, 2:3]
    return a, z, u + 0.5 * noise[:, 3:], np.sin(a) + a * u


def make_parameters():
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def make_networks(parameters):
    def apply(params, stats, inputs, *, train):
        return jnp.tanh(inputs @ params), stats

    nets = {name: iv.Backbone(apply, jnp.asarray(p)) for name, p in parameters.items()}
    return iv.proxy.networks(**nets)


def as_batch(data):
    names = ("treatment", "treatment_proxy", "outcome_proxy", "outcome")
    return iv.proxy.batch(**dict(zip(names, map(jnp.asarray, data), strict=True)))


def optimizers():
    return {"treatment_optimizer": optax.sgd(RATE), "instrument_optimizer": optax.sgd(RATE)}


# A transcription in NumPy: outer products with ones columns, dense solves, complex steps ----------


def outer(left, right):
    left, right = (np.hstack([x, np.ones((len(x), 1))]) for x in (left, right))
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)


def solve(features, targets, anchor, penalty):
    gram = features.T @ features + penalty * np.eye(features.shape[1])
    return anchor + np.linalg.solve(gram, features.T @ targets - gram @ anchor + penalty * anchor)


def mean_square(residual):
    return np.mean(np.sum(residual**2, axis=1))


def descended(loss, *arrays):
    """A step of gradient descent; derivatives by complex steps, exact to rounding."""
    new = []
    for which, array in enumerate(arrays):
        grad = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            moved = [x.astype(complex) for x in arrays]
            moved[which][index] += 1e-30j
            grad[index] = loss(*moved).imag / 1e-30
        new.append(array - RATE * grad)
    return new


def transcribed(parameters, data1, data2, *, proximal, penalties, steps, rounds):
    """Parameters and both heads; the proximal order of Eq. (17), or Xu et al.'s ridge heads."""
    first, proxy, outcome, second = parameters.values()
    (a1, z1, w1, _), (a2, z2, _, y2) = data1, data2
    penalty1, penalty2, inner = penalties
    big_w, v = np.zeros((12, 3)), np.zeros((12, 1))

    def regressed(features, targets, head, penalty, fixed):
        """The loss: at a fixed head, or the ridge loss at its own head, all differentiated."""
        if proximal:
            return mean_square(targets - features @ fixed)
        head = solve(features, targets, head, penalty)
        distance = penalty * np.sum(head**2) / len(targets)
        return mean_square(targets - features @ head) + distance

    for _ in range(rounds):
        for _ in range(steps[0]):
            target = np.tanh(w1 @ outcome)

            def features1(first, proxy, a=a1, z=z1):
                return outer(np.tanh(a @ first), np.tanh(z @ proxy))

            big_w = solve(
                features1(first, proxy), target, big_w if proximal else 0 * big_w, penalty1
            )
            first, proxy = descended(
                lambda p, q, t=target, f=features1, head=big_w: regressed(
                    f(p, q), t, 0 * head, penalty1, head
                ),
                first,
                proxy,
            )
        for _ in range(steps[1]):
            on1, on2 = features1(first, proxy), features1(first, proxy, a2, z2)

            def features2(outcome, second, on1=on1, on2=on2, big_w=big_w):
                anchor = big_w if proximal else 0 * big_w
                star = solve(on1, np.tanh(w1 @ outcome), anchor, inner if proximal else penalty1)
                return outer(on2 @ star, np.tanh(a2 @ second))

            v = solve(features2(outcome, second), y2, v if proximal else 0 * v, penalty2)
            outcome, second = descended(
                lambda p, q, f=features2, head=v: regressed(f(p, q), y2, 0 * head, penalty2, head),
                outcome,
                second,
            )
    return (first, proxy, outcome, second), big_w, v


@pytest.mark.slow
@pytest.mark.parametrize("method", ["proximal", "original"])
def test_a_run_equals_the_transcription(x64, method):
    parameters, data1, data2 = make_parameters(), make_data(40, 0), make_data(30, 1)
    networks, batches = make_networks(parameters), (as_batch(data1), as_batch(data2))
    steps = {"stage1_steps": 3, "stage2_steps": 2}
    if method == "proximal":
        made = iv.proximal(networks, **optimizers(), lam1=2.0, lam2=3.0, lam12=0.5, **steps)
    else:
        made = iv.original(networks, **optimizers(), beta1=2.0, beta2=3.0, **steps)
    state, round_ = made.init(batches[0]), jax.jit(made.round)
    for _ in range(2):
        state, _ = round_(state, *batches)

    expected, big_w, v = transcribed(
        parameters,
        data1,
        data2,
        proximal=method == "proximal",
        penalties=(2.0, 3.0, 0.5),
        steps=(3, 2),
        rounds=2,
    )
    got = (*state.instrument.params, *state.treatment.params)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)

    a, z, w, _ = data2  # the heads, by what they predict: their products stand in another order
    first, proxy, outcome, second = expected
    predicted = outer(np.tanh(a @ first), np.tanh(z @ proxy)) @ big_w
    features, _ = networks.instrument.apply(
        state.instrument.params, (None, None), (a, z), train=False
    )
    np.testing.assert_allclose(state.stage1.anchor(features), predicted, rtol=1e-8)
    mean = np.repeat(np.tanh(w @ outcome).mean(0, keepdims=True), len(a), axis=0)
    structural = outer(mean, np.tanh(a @ second)) @ v
    np.testing.assert_allclose(iv.proxy.predict(networks, state, a, w), structural, rtol=1e-8)


def residual_of(values, *columns):
    basis = np.column_stack(columns)
    return values - basis @ np.linalg.lstsq(basis, values)[0]


def test_a_linear_bridge_is_recovered(x64):
    """h(a, w) = 2 a + (3 / 0.5) w: u is seen through w = u / 2 + noise and moves y by 3 u."""
    rng = np.random.default_rng(0)
    n = 400
    a, noise_z, noise_u, noise_w, noise_y = rng.normal(size=(5, n, 1))
    z, ones = 0.7 * a + noise_z, np.ones((n, 1))
    # The sample meets the moment conditions, as the population does: what is left is exact.
    conditions = (ones, a, z, a * z, a**2, a**2 * z)
    u = 0.5 * a + 0.8 * z + residual_of(noise_u, *conditions)
    w = 1 + 0.5 * u + 0.3 * residual_of(noise_w, *conditions)
    y = 2 * a + 3 * u + residual_of(noise_y, *conditions)

    def identity(params, stats, inputs, *, train):
        return inputs * params, stats

    net = iv.Backbone(identity, jnp.ones(()))
    networks = iv.proxy.networks(
        treatment1=net, treatment_proxy=net, outcome_proxy=net, treatment2=net
    )
    data = as_batch((a, z, w, y))
    state = iv.original(networks, **optimizers(), beta1=1.0, beta2=1.0).init(data)
    halves = [jax.tree.map(lambda x, part=part: x[part::2], data) for part in (0, 1)]
    stage2 = iv.refit(networks, state, halves, halves, beta=1e-9).stage2
    grid = np.linspace(-2, 2, 9)[:, None]
    structural = 2 * grid + 3 * u.mean()
    got = iv.proxy.predict(networks, state, grid, w, stage2=stage2)
    np.testing.assert_allclose(got, structural, atol=1e-6)
    bridge = iv.predict(networks, state, w, a, stage2=stage2)
    np.testing.assert_allclose(bridge, 2 * a + 6 * (w - 1), atol=1e-6)
    confounded = np.linalg.lstsq(np.hstack([a, ones]), y)[0][0, 0]
    assert confounded > 4  # and regression of y on a is wrong


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))


class Nnx(nnx.Module):
    def __init__(self, params):
        kernel, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
        self.dense = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0))
        self.dense.kernel[...], self.dense.bias[...] = kernel, bias
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.mark.slow
def test_linen_and_nnx_networks_train_alike(standard_promotion, quick_compilation):
    a, z, w, y = (x.astype(np.float32) for x in make_data(32, 3))
    data = as_batch((a, z, w, y))
    inputs = {"treatment1": a, "treatment_proxy": z, "outcome_proxy": w, "treatment2": a}
    linen, theirs = {}, {}
    for key, (name, x) in enumerate(inputs.items()):
        variables = Linen().init(jax.random.key(key), x, train=False)
        linen[name] = cfll.flax.backbone(Linen(), variables)
        theirs[name] = cfll.flax.backbone(Nnx(variables["params"]))
    predictions = []
    for nets in (linen, theirs):
        networks = iv.proxy.networks(**nets)
        method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0, stage1_steps=2)
        state, _ = jax.jit(method.round)(method.init(data), data, data)
        moved = jax.tree.map(
            lambda new, old: np.abs(new - old).max(),
            (state.instrument.stats, state.treatment.stats),
            (networks.instrument.stats, (networks.treatment.stats, networks.covariate.stats)),
        )
        assert sum(x > 1e-3 for x in jax.tree.leaves(moved)) == 8  # mean and variance of all four
        predictions.append(iv.proxy.predict(networks, state, a, w))
    np.testing.assert_allclose(*predictions, rtol=1e-4, atol=1e-5)


def test_errors_name_the_fix():
    networks, data = make_networks(make_parameters()), make_data(8, 4)
    method, batch = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0), as_batch(data)
    a, z, w, y = data
    with pytest.raises(ValueError, match=r"instrument \(8, 1\), instrument \(7, 2\)"):
        method.init(as_batch((a, z[:7], w, y)))
    with pytest.raises(ValueError, match="outcome=y"):
        method.init(batch._replace(outcome=None))
    with pytest.raises(ValueError, match="make the networks with cfll"):
        iv.proxy.predict(networks._replace(covariate=None), method.init(batch), a, w)
    with pytest.raises(TypeError, match=r"method.init\(batch\)"):
        iv.proxy.predict(networks, {}, a, w)
    stacked = iv.Backbone(lambda p, s, x, *, train: (x[..., None], s), jnp.ones(()))
    nets = dict.fromkeys(SHAPES, networks.treatment) | {"treatment1": stacked}
    wrong = iv.proxy.networks(**nets)
    with pytest.raises(ValueError, match=r"treatment1 network returned .* \(8, 1, 1\)"):
        iv.proximal(wrong, **optimizers(), lam1=1.0, lam2=1.0).init(as_batch((a, a, w, y)))
