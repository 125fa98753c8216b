"""The train step that users write, in four frameworks: at most twenty lines, the penalty once."""

import inspect

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cfll
import cfll.flax

X = jax.random.normal(jax.random.key(0), (64, 3))
Y = jnp.sin(X.sum(axis=1, keepdims=True))
SCHEDULE = optax.linear_schedule(1.0, 11.0, 10)


class LinenNet(nn.Module):
    def setup(self):
        self.hidden, self.head = nn.Dense(16), nn.Dense(1)

    def features(self, x):
        return nn.tanh(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(3, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

    def features(self, x):
        return nnx.tanh(self.hidden(x))


class EquinoxNet(eqx.Module):
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden, self.head = (
            eqx.nn.Linear(3, 16, key=keys[0]),
            eqx.nn.Linear(16, 1, key=keys[1]),
        )

    def features(self, x):
        return jnp.tanh(jax.vmap(self.hidden)(x))


def linen(lam):
    net, rule = LinenNet(), cfll.prox(lam)
    tx = cfll.closed_form(optax.adam(1e-2), rule, head="head")
    params = net.init(jax.random.key(0), X)["params"]
    state = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, x, y):
        def loss_fn(params):
            features = state.apply_fn({"params": params}, x, method="features")
            return rule.loss(features, y, cfll.get_state(state))

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, solution=solution), loss

    return state, train_step


def flax_nnx(lam):
    net, rule = NnxNet(nnx.Rngs(0)), cfll.prox(lam)
    tx = cfll.closed_form(optax.adam(1e-2), rule, head="head")
    optimizer = cfll.flax.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(net, optimizer, x, y):
        head = cfll.get_state(optimizer)

        def loss_fn(net):
            return rule.loss(net.features(x), y, head)

        (loss, solution), grads = nnx.value_and_grad(loss_fn, has_aux=True)(net)
        optimizer.update(net, grads, solution=solution)
        return loss

    return optimizer, lambda optimizer, x, y: (optimizer, train_step(net, optimizer, x, y))


def plain_optax(lam):
    rule = cfll.prox(lam)
    tx = cfll.closed_form(optax.adam(1e-2), rule, head="head")
    params = {
        "w": 2 * jax.random.normal(jax.random.key(1), (3, 16)),
        "head": {"kernel": jnp.zeros((16, 1)), "bias": jnp.zeros(1)},
    }

    @jax.jit
    def train_step(carry, x, y):
        params, opt_state = carry

        def loss_fn(params):
            return rule.loss(jnp.tanh(x @ params["w"]), y, cfll.get_state(opt_state))

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return (optax.apply_updates(params, updates), opt_state), loss

    return (params, tx.init(params)), train_step


def equinox(lam):
    model, rule = EquinoxNet(jax.random.key(0)), cfll.prox(lam)
    tx = cfll.closed_form(optax.adam(1e-2), rule, head="head")

    @eqx.filter_jit
    def train_step(carry, x, y):
        model, opt_state = carry

        def loss_fn(model):
            return rule.loss(model.features(x), y, cfll.get_state(opt_state))

        (loss, solution), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_array)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return (eqx.apply_updates(model, updates), opt_state), loss

    return (model, tx.init(eqx.filter(model, eqx.is_array))), train_step


@pytest.mark.parametrize("make", [linen, flax_nnx, plain_optax, equinox])
def test_train_step(standard_promotion, make):
    carry, train_step = make(SCHEDULE)
    losses = []
    for _ in range(10):
        carry, loss = train_step(carry, X, Y)
        losses.append(float(loss))
    state = cfll.get_state(carry[1] if isinstance(carry, tuple) else carry)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(state.lam, SCHEDULE(9), rtol=1e-6)
    assert str(cfll.Route(state.info.route)) == "primal"
    assert 0 < float(state.info.rcond) < 1
    lines = [line for line in inspect.getsource(make).splitlines() if line.strip()]
    assert len(lines) <= 20
    assert sum(line.count("(lam)") for line in lines[1:]) == 1
