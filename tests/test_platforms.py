"""Lowering for GPU and TPU from a CPU: every solver, the sums, the rules, and whole train steps."""

import re

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import cfll
import cfll.flax
from tests.contract import SOLVERS
from tests.nets import Linen, Nnx
from tests.test_iv_order import make_batch, make_method, make_networks

PLATFORMS = ("cuda", "rocm", "tpu")
X, Y = jax.ShapeDtypeStruct((12, 4), jnp.float32), jax.ShapeDtypeStruct((12, 2), jnp.float32)


KINDS = {"potrf": "cholesky", "geqrf": "qr", "syevd": "eigh", "gesvdj": "svd"}


def factorizations(function, *args):
    """What the program calls of cuSOLVER's and hipSOLVER's factorizations."""
    leaves, tree = jax.tree.flatten(args)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))
    exported = jax.export.export(flat, platforms=PLATFORMS)(*leaves)
    assert exported.platforms == PLATFORMS
    called = re.findall(r"custom_call @(?:cu|hip)solver_(\w+)_ffi", exported.mlir_module())
    return {KINDS[name] for name in called if name in KINDS}


# What the README says: `eigh` and `svd`, slow on accelerators, are in the fallback of "auto" alone.
CALLS = {
    "auto, tall": {"cholesky", "eigh"},
    "auto, wide": {"cholesky", "qr", "svd"},
    "primal": {"cholesky"},
    "dual": {"cholesky"},
    "qr": {"cholesky", "eigh"},
    "cg": set(),
}


@pytest.mark.parametrize("solver", [name for name in SOLVERS if SOLVERS[name][0]])
def test_solvers(solver):
    kind, n, d = SOLVERS[solver]
    x, y = (jax.ShapeDtypeStruct((n, size), jnp.float32) for size in (d, 2))

    def loss(x, y):
        head = cfll.prox_solve(x, y, cfll.LinearHead.zeros(d, 2), lam=1.0, solver=kind)
        return (head(x) ** 2).sum()

    assert factorizations(jax.value_and_grad(loss), x, y) == CALLS[solver]


def test_sums_and_posterior():
    def fit(x, y):
        stats = cfll.GramStats.zeros(4, 2).add(x, y)
        return stats.ridge(1.0), cfll.bayesian_ridge(stats)

    assert "cholesky" in factorizations(fit, X, Y)


RULES = {
    "ridge": cfll.ridge(1.0),
    "averaged": cfll.averaged_ridge(1.0, decay=0.5),
    "adaptive": cfll.adaptive_prox(),
    "kalman": cfll.kalman(1.0),
    "softmax": cfll.softmax(1.0),
    "huber": cfll.huber(1.0, delta=1.0),
    "every": cfll.every(2, cfll.prox(1.0)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name, standard_promotion):
    params = {"w": jnp.ones((4, 4)), "head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}}
    tx = cfll.closed_form(optax.adam(1e-3), RULES[name], head="head")

    def step(params, opt_state, x, y):
        def loss_fn(params):
            return RULES[name].loss(jnp.tanh(x @ params["w"]), y, cfll.get_state(opt_state))

        (_, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return optax.apply_updates(params, updates), opt_state

    assert "cholesky" in factorizations(step, params, tx.init(params), X, Y)


@pytest.mark.parametrize("order", ["solve first", "descend first"])
def test_a_linen_step(order, standard_promotion):
    net, rule = Linen(8, 2), cfll.prox(lam=1.0)
    tx = cfll.closed_form(optax.adam(1e-3), rule, head="head")
    params = net.init(jax.random.key(0), jnp.ones((12, 4)))["params"]
    start = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    leaves, tree = jax.tree.flatten(start)

    def step(leaves, x, y):
        state = jax.tree.unflatten(tree, leaves)

        def loss_fn(params):
            features = net.apply({"params": params}, x, method="features")
            if order == "solve first":
                return rule.loss(features, y, cfll.get_state(state))
            return jnp.mean((net.apply({"params": params}, x) - y) ** 2), None

        (_, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        keywords = {"solution": solution}
        if order == "descend first":
            keywords = {"targets": y, "feature_fn": cfll.flax.feature_fn(state, x)}
        return state.apply_gradients(grads=grads, **keywords)

    assert "cholesky" in factorizations(step, leaves, X, Y)


def test_an_nnx_step(standard_promotion):
    rule = cfll.prox(lam=1.0)
    model = Nnx(4, 8, 2)
    tx = cfll.closed_form(optax.adam(1e-3), rule, head="head")
    graph, start = nnx.split((model, cfll.flax.Optimizer(model, tx, wrt=nnx.Param)))

    def step(state, x, y):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            return rule.loss(model.features(x), y, cfll.get_state(optimizer))

        (_, solution), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads, solution=solution)
        return nnx.state((model, optimizer))

    assert "cholesky" in factorizations(step, start, X, Y)


def test_an_iv_round(standard_promotion):
    networks = make_networks()
    method = make_method(networks)
    assert "cholesky" in factorizations(
        method.round, method.init(make_batch(0)), make_batch(0), make_batch(1)
    )
