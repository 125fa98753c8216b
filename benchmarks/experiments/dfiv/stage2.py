"""Time of an update of stage 2: proximal, the original by `cfll.iv`, and as its code writes it.

At the published widths, whatever those of the runs.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.core.records import Record
from benchmarks.core.runner import MissingError
from benchmarks.core.timing import interleaved
from benchmarks.experiments.dfiv.runs import ORDERS, ORIGINAL, PROXIMAL, Runs, make_method
from benchmarks.tasks.dfiv import batches, load, make_networks
from cfll import iv

PUBLISHED = "DFIV, as published"
TIMED = (*ORDERS, ORIGINAL, PUBLISHED)


def published_stage2(
    networks: iv.Networks, optimizer: optax.GradientTransformation, beta1: Any, beta2: Any
) -> Callable[..., Any]:
    """Stage 2 as the original's code writes it: ones columns, inverses, and all differentiated."""

    def with_ones(features: jax.Array) -> jax.Array:
        return jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)

    def ridge(features: jax.Array, targets: jax.Array, beta: Any) -> jax.Array:
        gram = features.T @ features + beta * jnp.eye(features.shape[1])
        return jnp.linalg.inv(gram) @ (features.T @ targets)

    def step(state: iv.IVState, batch1: iv.IVBatch, batch2: iv.IVBatch) -> Any:
        net, instrument = state.treatment, state.instrument

        def instrument_features(inputs: Any) -> jax.Array:
            features, _ = networks.instrument.apply(
                instrument.params, instrument.stats, inputs, train=False
            )
            return with_ones(features)

        phi1, phi2 = map(instrument_features, (batch1.instrument, batch2.instrument))

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            psi, stats = networks.treatment.apply(
                params[0], net.stats[0], batch1.treatment, train=True
            )
            predicted = with_ones(phi2 @ ridge(phi1, psi, beta1))
            if networks.covariate is not None:
                xi, _ = networks.covariate.apply(
                    params[1], net.stats[1], batch2.covariate, train=True
                )
                products = predicted[:, :, None] * with_ones(xi)[:, None, :]
                predicted = products.reshape(len(predicted), -1)
            weight = ridge(predicted, batch2.outcome, beta2)
            residual = batch2.outcome - predicted @ weight
            loss = jnp.sum(jnp.square(residual)) + beta2 * jnp.sum(jnp.square(weight))
            return loss / len(residual), stats

        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
        updates, opt_state = optimizer.update(grads, net.opt_state, net.params)
        params = optax.apply_updates(net.params, updates)
        return state._replace(treatment=net._replace(params=params, opt_state=opt_state)), loss

    return step


def stage2_times(runs: Runs, batch_size: int, rounds: int = 15) -> Record:
    """Seconds per stage-2 step of `TIMED`, in turn: medians and quartiles."""
    task = load(runs.design, runs.size.num_train, 0, runs.file)
    networks = make_networks(runs.design, 1.0, 0, task.train)
    hyper = (1e-3, 100.0, 100.0)
    methods = {name: make_method(networks, name, hyper) for name in (*ORDERS, ORIGINAL)}
    state = methods[PROXIMAL].init(jax.tree.map(lambda a: a[:2], task.train))
    steps: dict[str, Any] = {name: jax.jit(method.stage2) for name, method in methods.items()}
    steps[PUBLISHED] = jax.jit(published_stage2(networks, optax.adam(1e-3), *hyper[1:]))
    (pair,) = batches(task.train, batch_size, rounds=1, seed=0)
    pair = jax.tree.map(jnp.asarray, pair)
    candidates = {name: partial(step, state, *pair) for name, step in steps.items()}
    return {
        name: np.percentile(seconds, (25, 50, 75)).tolist()
        for name, seconds in interleaved(candidates, rounds).items()
    }


def times_of(runs: Runs) -> dict[int, Record]:
    """Batch size -> `stage2_times`, measured or read; batch sizes without records are left out."""
    times = {}
    for batch_size in runs.size.batch_sizes:
        key = {
            "experiment": "dfiv stage-2 time",
            "design": runs.design,
            "width_factor": 1.0,
            "batch_size": batch_size,
            "methods": list(TIMED),
        }
        label = f"B {batch_size:<5} time of stage 2"
        with suppress(MissingError):
            times[batch_size] = runs.runner.run(key, partial(stage2_times, runs, batch_size), label)
    return times
