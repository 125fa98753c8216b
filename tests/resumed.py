"""A training run that can be killed: a program that `test_scale.py` runs.

``python -m tests.resumed FOLDER KILL_AFTER``. The quickstart's network, optimizer and state, small.
Saves to FOLDER every few steps with Orbax, goes on from the last checkpoint it finds there, dies by
SIGKILL after step KILL_AFTER (0: never), and writes its last state to ``FOLDER/last.npz``.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import cfll
from benchmarks.core.optimizers import OPTIMIZERS, cosine_decay
from benchmarks.core.training import batches
from benchmarks.models.fno import FNO1d

STEPS, SAVE_EVERY = 20, 3
MODEL = FNO1d(width=4, modes=4, depth=2, num_features=8)
RULE = cfll.prox(lam=10.0)
TX = cfll.closed_form(OPTIMIZERS["Muon"](cosine_decay(0.01, STEPS)), RULE, head="head")


@jax.jit
def init(inputs):
    params = MODEL.init(jax.random.key(0), inputs)["params"]
    return params, TX.init(params)


@jax.jit
def train_step(state, inputs, targets):
    """Eq. (17), as in the quickstart."""
    params, opt_state = state

    def loss_fn(params):
        features = MODEL.apply({"params": params}, inputs, method="features")
        return RULE.loss(features, targets, cfll.get_state(opt_state))

    grads, solution = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = TX.update(grads, opt_state, params, solution=solution)
    return optax.apply_updates(params, updates), opt_state


def main(folder, kill_after):
    """Train to the end, or to the kill."""
    jax.config.update("jax_platforms", "cpu")
    inputs = np.asarray(np.random.default_rng(0).normal(size=(8, 16, 2)), np.float32)
    targets = np.sin(inputs[..., :1])
    state = init(inputs[:1])

    options = ocp.CheckpointManagerOptions(save_interval_steps=SAVE_EVERY, max_to_keep=2)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as checkpoints:
        done = checkpoints.latest_step() or 0
        print(f"from step {done}", flush=True)
        if done:
            target = ocp.args.StandardRestore(jax.tree.map(jnp.zeros_like, state))
            state = checkpoints.restore(done, args=target)
        data = batches(inputs, targets, batch_size=4, epochs=STEPS // 2, seed=0)
        for count, batch in enumerate(data, start=1):
            if count <= done:
                continue
            state = train_step(state, *batch)
            checkpoints.save(count, args=ocp.args.StandardSave(state))  # in the background
            if count == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    np.savez(folder / "last.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
