"""Averaged gradients on four devices: a program that `test_rules.py` runs, not a test module.

Trains replicas of a network with ``axis_name`` under pmap and shard_map, compares with one device
on the whole batch, and prints the relative errors as one JSON object.
"""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cfll
from tests import sharded

DEVICES = 4
OPTIMIZER = optax.sgd(0.3)
RULES = {"prox": partial(cfll.prox, optax.linear_schedule(1.0, 3.0, 2)), "ridge": cfll.ridge}
ARGUMENTS = {"prox": {}, "ridge": {"beta": 0.5}}


def features_of(params, x):
    return jnp.tanh(x @ params["w"])


def make_step(name, order, axis_name):
    """A data-parallel step as users write it; without an axis the same on one device."""
    rule = RULES[name](axis_name=axis_name, **ARGUMENTS[name])
    tx = cfll.closed_form(OPTIMIZER, rule)

    def mean(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def step(params, state, x, y, weights):
        def loss_fn(params):
            features = features_of(params, x)
            if order == "Eq. (17)":
                head = cfll.get_state(state)
                loss, solution = rule.loss(features, y, head, sample_weight=weights)
                return mean(loss), solution
            squares = (y - cfll.get_head(params, "head")(features)) ** 2
            return mean(jnp.sum(weights[:, None] * squares)) / mean(jnp.sum(weights)), None

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        keywords = {"solution": solution}
        if solution is None:
            keywords = {"targets": y, "feature_fn": lambda params: features_of(params, x)}
            keywords["sample_weight"] = weights
        updates, state = tx.update(mean(grads), state, params, **keywords)
        return optax.apply_updates(params, updates), state, loss

    return tx, step


def train(step, params, state, batch, steps=3):
    for _ in range(steps):
        params, state, loss = step(params, state, *batch)
    return params, cfll.get_state(state).anchor, cfll.get_state(state).lam, loss


def problem():
    """A batch for all devices, one of which has nothing but padding, and parameters."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 3)), rng.normal(size=(64, 2))
    weights = rng.integers(0, 3, size=64)
    weights[-16:] = 0
    params = {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)}
    params["head"] = {"kernel": jnp.ones((5, 2)), "bias": jnp.zeros(2)}
    return [jnp.asarray(array, jnp.float32) for array in (x, y, weights)], params


@cache
def on_one_device(name, order):
    batch, params = problem()
    tx, step = make_step(name, order, None)
    return jax.tree.map(np.asarray, train(jax.jit(step), params, tx.init(params), batch))


def error(name, order, mapped):
    """The largest relative difference of a replica to one device, after three steps."""
    batch, params = problem()
    tx, step = make_step(name, order, "i")
    if mapped == "pmap":
        batch = [array.reshape(DEVICES, -1, *array.shape[1:]) for array in batch]
        start = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), (params, tx.init(params)))
        many = train(jax.pmap(step, axis_name="i"), *start, batch)
        replicas = [jax.tree.map(lambda leaf: leaf[k], many) for k in range(DEVICES)]  # noqa: B023
    else:
        specs = (jax.P(), jax.P(), *3 * (jax.P("i"),))
        mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        check = mapped == "shard_map, check_vma"
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=check)
        many = train(jax.jit(step), params, tx.init(params), batch)
        replicas = [
            jax.tree.map(lambda leaf: leaf.addressable_shards[k].data, many)  # noqa: B023
            for k in range(DEVICES)
        ]
    return max(sharded.relative_error(tuple(r), on_one_device(name, order)) for r in replicas)


def accepted_without_axis():
    """Whether replicas under pmap may part."""
    batch, params = problem()
    tx, step = make_step("prox", "Eq. (17)", None)
    try:
        batch = [array.reshape(DEVICES, -1, *array.shape[1:]) for array in batch]
        jax.pmap(partial(step, params, tx.init(params)), axis_name="i")(*batch)
    except ValueError as error:
        return float("axis_name='i'" not in str(error))
    return 1.0


def main():
    """Print the report."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    cases = [
        ("prox", "Eq. (17)", "pmap"),
        ("prox", "Eq. (17)", "shard_map"),
        ("prox", "Eq. (17)", "shard_map, check_vma"),
        ("ridge", "Algorithm 1", "shard_map"),
        ("prox", "Algorithm 1", "shard_map, check_vma"),
    ]
    report = {", ".join(case): error(*case) for case in cases}
    report["accepted without axis_name"] = accepted_without_axis()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
