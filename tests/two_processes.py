"""One of several processes that train together: a program that `test_scale.py` runs.

``python -m tests.two_processes PROCESS PROCESSES PORT``. All processes hold the parameters, each
feeds its own rows of the batch to its own two devices. Prints the losses as JSON. The tests call
`train` on its own for the same on one device.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

import cfll

ROWS, STEPS, LAM = 64, 6, 5.0


def main(process, processes, port):
    """Join the others, train, print the losses."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, processes, process, initialization_timeout=60)
    print(json.dumps({"devices": jax.device_count(), "losses": train()}), flush=True)
    jax.distributed.shutdown()


def train():
    """Eq. (17) on fresh batches, the rows sharded over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, jax.P("batch"))
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": np.asarray(rng.normal(size=(4, 16)) / 2, np.float32)},
        "head": cfll.LinearHead.zeros(16, 3)._asdict(),
    }
    truth = np.asarray(rng.normal(size=(4, 3)), np.float32)
    rule = cfll.prox(LAM)
    tx = cfll.closed_form(optax.adam(1e-2), rule, head="head")

    @jax.jit
    def step(params, state, inputs, targets):
        def loss_fn(params):
            features = jnp.tanh(inputs @ params["hidden"]["kernel"])
            return rule.loss(features, targets, cfll.get_state(state))

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, solution=solution)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    with jax.set_mesh(mesh):
        # By a jitted function: it may make arrays on devices of other processes.
        everywhere = NamedSharding(mesh, jax.P())
        params, state = jax.jit(lambda: (params, tx.init(params)), out_shardings=everywhere)()
        for _ in range(STEPS):
            inputs = np.asarray(rng.normal(size=(ROWS, 4)), np.float32)
            batch = inputs, np.sin(inputs @ truth)
            sharded = [
                jax.make_array_from_callback(array.shape, rows, lambda index, a=array: a[index])
                for array in batch
            ]
            params, state, loss = step(params, state, *sharded)
            losses.append(float(loss))
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
