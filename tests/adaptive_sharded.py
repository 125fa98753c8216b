"""A rule that tunes itself on a batch that four devices share: a program of `test_adaptive.py`.

Prints how far lam and head are from those of one device, relative to them.
"""

import json

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

import cfll
from cfll.rules.rule import advance, initial_state


def train(batches, state):
    rule = cfll.adaptive_prox()

    @jax.jit
    def step(state, x, y):
        return advance(state, rule.loss(x, y, state)[1])

    for x, y in batches:
        state = step(state, x, y)
    return jax.tree.map(np.asarray, (state.lam, state.anchor))


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    rng = np.random.default_rng(0)
    batches = np.asarray(rng.normal(size=(5, 32, 2, 6)), np.float32)
    batches = [(x, np.asarray(x[..., :2] ** 2, np.float32)) for x in batches]
    state = initial_state(cfll.adaptive_prox(), cfll.LinearHead.zeros(6, 2))
    one, errors = train(batches, state), {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            put = NamedSharding(mesh, jax.P("data"))
            many = train(
                jax.device_put(batches, put), jax.device_put(state, NamedSharding(mesh, jax.P()))
            )
        errors[kind.name] = max(
            float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
            for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True)
        )
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
