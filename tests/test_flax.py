"""Linen and NNX: the paper's three orders, batch norm, dropout, checkpoints."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state as flax_train_state

import cfll
import cfll.flax
from tests import oracles

LAM, RATE = 0.5, 0.05
RULE = cfll.prox(LAM)


class LinenNet(nn.Module):
    def setup(self):
        self.hidden = nn.Dense(6, param_dtype=jnp.float64)
        self.head = nn.Dense(2, param_dtype=jnp.float64)

    def features(self, x):
        return nn.tanh(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


def linen_state(net, first_batch=None):
    params = {
        "hidden": {"kernel": jnp.asarray(net.a), "bias": jnp.asarray(net.c)},
        "head": {"kernel": jnp.asarray(net.w), "bias": jnp.asarray(net.b)},
    }
    model = LinenNet()
    if first_batch is not None:
        x, y = first_batch
        features = model.apply({"params": params}, x, method="features")
        first = cfll.prox_solve(features, y, cfll.get_head(params, "head"), LAM)
        params = cfll.set_head(params, "head", first)
    tx = cfll.closed_form(optax.sgd(RATE), RULE, head="head")
    return cfll.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def linen_leaves(state):
    hidden, head = state.params["hidden"], state.params["head"]
    return hidden["kernel"], hidden["bias"], head["kernel"], head["bias"]


@jax.jit
def linen_algorithm_1(state, x, y):
    def loss_fn(params):
        return jnp.mean(jnp.sum((y - state.apply_fn({"params": params}, x)) ** 2, axis=-1))

    grads = jax.grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, targets=y, feature_fn=cfll.flax.feature_fn(state, x))


@jax.jit
def linen_algorithm_2(state, x, y, x_next, y_next):
    def loss_fn(params):
        return jnp.mean(jnp.sum((y - state.apply_fn({"params": params}, x)) ** 2, axis=-1))

    grads = jax.grad(loss_fn)(state.params)
    feature_fn = cfll.flax.feature_fn(state, x_next)
    return state.apply_gradients(grads=grads, targets=y_next, feature_fn=feature_fn)


@jax.jit
def linen_equation_17(state, x, y):
    def loss_fn(params):
        features = state.apply_fn({"params": params}, x, method="features")
        return RULE.loss(features, y, cfll.get_state(state))

    (_, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, solution=solution)


class NnxNet(nnx.Module):
    def __init__(self, net):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(3, 6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)
        for layer, kernel, bias in ((self.hidden, net.a, net.c), (self.head, net.w, net.b)):
            layer.kernel = nnx.Param(jnp.asarray(kernel))
            layer.bias = nnx.Param(jnp.asarray(bias))

    def features(self, x):
        return nnx.tanh(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


def nnx_pair(net, first_batch=None):
    model = NnxNet(net)
    if first_batch is not None:
        x, y = first_batch
        params = nnx.state(model, nnx.Param)
        first = cfll.prox_solve(model.features(x), y, cfll.get_head(params, "head"), LAM)
        nnx.update(model, cfll.set_head(params, "head", first))
    tx = cfll.closed_form(optax.sgd(RATE), RULE, head="head")
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_leaves(model):
    layers = (model.hidden, model.head)
    return tuple(leaf[...] for layer in layers for leaf in (layer.kernel, layer.bias))


def squared_loss(model, x, y):
    return jnp.mean(jnp.sum((y - model(x)) ** 2, axis=-1))


@nnx.jit
def nnx_algorithm_1(model, optimizer, x, y):
    grads = nnx.grad(squared_loss)(model, x, y)
    optimizer.update(model, grads, targets=y, feature_fn=cfll.flax.feature_fn(model, x))


@nnx.jit
def nnx_algorithm_2(model, optimizer, x, y, x_next, y_next):
    grads = nnx.grad(squared_loss)(model, x, y)
    feature_fn = cfll.flax.feature_fn(model, x_next)
    optimizer.update(model, grads, targets=y_next, feature_fn=feature_fn)


@nnx.jit
def nnx_equation_17(model, optimizer, x, y):
    head = cfll.get_state(optimizer)

    def loss_fn(model):
        return RULE.loss(model.features(x), y, head)

    (_, solution), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, solution=solution)


def run_linen(step, net, batches, first_batch=None):
    state, history = linen_state(net, first_batch), []
    for batch in batches:
        state = step(state, *batch)
        history.append(linen_leaves(state))
    return history


def run_nnx(step, net, batches, first_batch=None):
    (model, optimizer), history = nnx_pair(net, first_batch), []
    for batch in batches:
        step(model, optimizer, *batch)
        history.append(nnx_leaves(model))
    return history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "steps"),
    [
        (run_linen, (linen_algorithm_1, linen_algorithm_2, linen_equation_17)),
        (run_nnx, (nnx_algorithm_1, nnx_algorithm_2, nnx_equation_17)),
    ],
    ids=["linen", "nnx"],
)
@pytest.mark.parametrize("order", ["algorithm_1", "algorithm_2", "equation_17"])
def test_trajectories_are_the_papers(x64, run, steps, order):
    net, batches = oracles.network_problem()
    step = steps[["algorithm_1", "algorithm_2", "equation_17"].index(order)]
    if order == "algorithm_2":
        pairs = [(*now, *after) for now, after in itertools.pairwise(batches)]
        history = run(step, net, pairs, first_batch=batches[0])
    else:
        history = run(step, net, batches)
    expected = getattr(oracles, order)(net, batches, RATE, LAM)
    assert len(history) == len(expected)
    nets = [(net.a, net.c, net.w, net.b) for net in expected]
    chex.assert_trees_all_close(history, nets, rtol=1e-9, atol=1e-9)


# Batch norm and dropout ---------------------------------------------------------------------------


class LinenNormNet(nn.Module):
    @nn.compact
    def __call__(self, x, train, features_only=False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return x if features_only else nn.Dense(1, name="head")(x)


X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)
Y = jnp.sum(X, axis=-1, keepdims=True)


def test_linen_batch_norm_and_dropout(standard_promotion):
    model = LinenNormNet()
    variables = model.init(jax.random.key(0), X, train=False)
    state = cfll.flax.TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=cfll.closed_form(optax.adam(1e-2), cfll.prox(1.0), head="head"),
    )

    @jax.jit
    def step(state, key):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, new = state.apply_fn(
                variables, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
            return jnp.mean((Y - outputs) ** 2), new["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
        feature_fn = cfll.flax.feature_fn(
            state, X, method=None, train=True, features_only=True, rngs={"dropout": key}
        )
        return state.apply_gradients(
            grads=grads, batch_stats=batch_stats, targets=Y, feature_fn=feature_fn
        )

    # One pass of the loss moves the statistics; the second pass, for the features, must not.
    expected = model.apply(variables, X, train=True, rngs={"dropout": jax.random.key(1)},
                           mutable=["batch_stats"])[1]["batch_stats"]  # fmt: skip
    state = step(state, jax.random.key(1))
    chex.assert_trees_all_close(state.batch_stats, expected, rtol=1e-5, atol=1e-6)
    for i in range(5):
        state = step(state, jax.random.key(i))
    assert bool(jnp.isfinite(cfll.get_state(state).anchor.kernel).all())
    assert int(state.step) == 6


class NnxNormNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def features(self, x):
        return self.dropout(nnx.relu(self.norm(self.hidden(x))))

    def __call__(self, x):
        return self.head(self.features(x))


def test_nnx_batch_norm_and_dropout(standard_promotion):
    model, twin = NnxNormNet(nnx.Rngs(0)), NnxNormNet(nnx.Rngs(0))
    tx = cfll.closed_form(optax.adam(1e-2), cfll.prox(1.0), head="head")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(squared_loss)(model, X, Y)
        optimizer.update(model, grads, targets=Y, feature_fn=cfll.flax.feature_fn(model, X))

    step(model, optimizer)
    squared_loss(twin, X, Y)  # one forward pass
    np.testing.assert_allclose(model.norm.mean[...], twin.norm.mean[...], rtol=1e-5, atol=1e-6)
    assert int(model.dropout.rngs.count[...]) == int(twin.dropout.rngs.count[...])
    for _ in range(5):
        step(model, optimizer)
    assert bool(jnp.isfinite(model.head.kernel[...]).all())


def test_linen_step_does_not_recompile(x64):
    net, batches = oracles.network_problem()
    state = linen_state(net)
    linen_equation_17.clear_cache()
    for x, y in batches:
        state = linen_equation_17(state, x, y)
    assert linen_equation_17._cache_size() == 1


def test_nnx_step_does_not_recompile():
    net, batches = oracles.network_problem()
    model, optimizer = nnx_pair(
        oracles.Network(*(np.float32(a) for a in (net.a, net.c, net.w, net.b)))
    )
    chex.clear_trace_counter()

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, x, y):
        grads = nnx.grad(squared_loss)(model, x, y)
        optimizer.update(model, grads, targets=y, feature_fn=cfll.flax.feature_fn(model, x))

    for x, y in batches:
        step(model, optimizer, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


# The TrainState -----------------------------------------------------------------------------------


def small_state(tx, cls=cfll.flax.TrainState, **fields):
    model = nn.Dense(1)
    params = {"head": model.init(jax.random.key(0), X)["params"], "scale": jnp.ones(())}
    return cls.create(
        apply_fn=lambda variables, x, method=None: variables["params"]["scale"] * x,
        params=params,
        tx=tx,
        **fields,
    )


TX = cfll.closed_form(optax.sgd(0.1), cfll.prox(1.0))


def test_fields_of_a_subclass_are_replaced_and_the_rest_passed_on():
    class WithLoss(cfll.flax.TrainState):
        loss: jax.Array | None = None

    state = small_state(TX, WithLoss)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    feature_fn = cfll.flax.feature_fn(state, X)
    state = state.apply_gradients(grads=zeros, targets=Y, feature_fn=feature_fn, loss=1.5)
    assert state.loss == 1.5
    assert state.tx is TX


def test_a_plain_optimizer_works_too():
    state = small_state(optax.sgd(0.1))
    ones = jax.tree.map(jnp.ones_like, state.params)
    state = state.apply_gradients(grads=ones)
    np.testing.assert_allclose(state.params["scale"], 0.9)
    with pytest.raises(TypeError, match="it would be lost"):
        state.apply_gradients(grads=ones, targets=Y, features=X)


def test_flax_own_train_state_is_named_in_the_error():
    state = small_state(TX, flax_train_state.TrainState)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    with pytest.raises(TypeError, match=r"use cfll\.flax\.TrainState"):
        state.apply_gradients(grads=zeros)


def test_orbax_round_trip(tmp_path, standard_promotion):
    import orbax.checkpoint as ocp

    state = small_state(cfll.closed_form(optax.adam(1e-2), cfll.prox(1.0)))

    def step(state):
        grads = jax.tree.map(jnp.ones_like, state.params)
        feature_fn = cfll.flax.feature_fn(state, X)
        return state.apply_gradients(grads=grads, targets=Y, feature_fn=feature_fn)

    state = step(state)
    saved = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, saved))
    resumed = step(state.replace(**restored))
    undisturbed = step(state)
    chex.assert_trees_all_equal(resumed.params, undisturbed.params)
    chex.assert_trees_all_equal(resumed.opt_state, undisturbed.opt_state)
