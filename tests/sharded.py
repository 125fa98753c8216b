"""Eight devices in one process: a program that `test_scale.py` runs, not a test module itself.

Solves and trains with the samples sharded over a mesh, compares with one device, reads from the
compiled HLO what the devices tell each other, and prints all of it as one JSON object. A process of
its own because the number of devices is fixed when JAX starts.
"""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

import cfll

DEVICES = 8
N, D, O = 256, 16, 4  # noqa: E741
LAM = 10.0

COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<op>all-reduce|all-gather|all-to-all|reduce-scatter|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)


def main():
    """Print the report."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    report = {
        "devices": jax.device_count(),
        "solves": solves(),
        "outputs": sharded_outputs(),
        "training": training(),
    }
    print(json.dumps(report))


# What the devices tell each other -----------------------------------------------------------------


def collectives(text, guarded=False):
    """The collectives of a compiled program.

    Args:
      text: HLO, ``compiled.as_text()``.
      guarded: those in branches of conditionals other than the first and in loops, which are for
        systems that are ill-conditioned, rather than those that always run.

    Returns:
      A list of [operation, number of elements of its result].
    """
    computations, entry = {}, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("  "):
            computations[name].append(line)

    def walk(name, seen):
        if name in seen:
            return
        seen.add(name)
        for line in computations[name]:
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"[\w.-]+", branches[1])[:1] if branches else []
            names += re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
            for called in names:
                walk(called, seen)

    always = set()
    walk(entry, always)
    names = set(computations) - always if guarded else always
    found = []
    for name in sorted(names):
        for match in filter(None, map(COLLECTIVE.search, computations[name])):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["type"])
            sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
            found.append([match["op"], sum(sizes)])
    return found


# One solve ----------------------------------------------------------------------------------------


def problem():
    """Well-conditioned features, targets and an anchor."""
    rng = np.random.default_rng(0)
    shapes = (N, D), (N, O), (D, O), (O,)
    features, targets, kernel, bias = (
        np.asarray(rng.normal(size=shape), np.float32) for shape in shapes
    )
    return features, targets, cfll.LinearHead(kernel, bias)


@jax.jit
def solve_alone(features, targets, anchor):
    """The head and its diagnostics on one device."""
    return cfll.penalized_solve(features, targets, anchor, LAM)


def exact_head(features, targets, anchor):
    """The head in float64."""
    rows = np.column_stack([features, np.ones(len(features))]).astype(float)
    old = np.vstack([anchor.kernel, anchor.bias]).astype(float)
    gram = rows.T @ rows + LAM * np.eye(len(old))
    new = old + np.linalg.solve(gram, rows.T @ (targets - rows @ old))
    return cfll.LinearHead(new[:-1], new[-1])


def kernel_solve(features, targets, anchor):
    return cfll.prox_solve(features, targets, anchor, LAM)


def sums_solve(features, targets, anchor):
    return cfll.GramStats.zeros(D, O).add(features, targets).prox(anchor, LAM)


def mapped_solve(features, targets, anchor):
    """The solve of one device of a `jax.shard_map`: its own rows, everybody's sums."""
    # Of the targets a device may hold only some of the outputs.
    stats = cfll.GramStats.zeros(D, targets.shape[-1]).add(features, targets)
    return stats.psum("batch").prox(anchor, LAM)


def mapped(mesh, in_specs):
    """`mapped_solve` on all devices, the head sharded as the anchor is."""
    # In a tuple: jax before 0.9.1 takes specs that can be called, as a head can, for a function.
    solve = jax.shard_map(
        lambda *args: (mapped_solve(*args),),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=in_specs[-1:],
    )
    return lambda *args: solve(*args)[0]


def run(solve, mesh, samples, anchor_specs):
    """Solve on a mesh; the error of the head, its sharding, and the collectives."""
    exact = exact_head(*problem())
    args = jax.device_put(
        problem(), jax.tree.map(partial(NamedSharding, mesh), (*samples, anchor_specs))
    )
    compiled = jax.jit(solve).lower(*args).compile()
    head = compiled(*args)
    return {
        "error": relative_error(head, exact),
        "sharding": [list(leaf.sharding.spec) for leaf in head],
        "collectives": collectives(compiled.as_text()),
        "guarded": collectives(compiled.as_text(), guarded=True),
    }


def solves():
    """The head, replicated, from the kernel and from sums, by jit and by shard_map."""
    mesh = make_mesh(batch=DEVICES)
    samples, replicated = (jax.P("batch"), jax.P("batch")), cfll.LinearHead(jax.P(), jax.P())
    _, info = solve_alone(*problem())
    return {
        "rcond": float(info.rcond),
        "jit, prox_solve": run(kernel_solve, mesh, samples, replicated),
        "jit, GramStats": run(sums_solve, mesh, samples, replicated),
        "shard_map, GramStats": run(
            mapped(mesh, (*samples, replicated)), mesh, samples, replicated
        ),
    }


def sharded_outputs():
    """Samples over one axis of the mesh and the outputs of the head over the other."""
    mesh = make_mesh(batch=DEVICES // 2, outputs=2)
    samples = jax.P("batch"), jax.P("batch", "outputs")
    specs = cfll.LinearHead(jax.P(None, "outputs"), jax.P("outputs"))
    pinned = jax.tree.map(partial(NamedSharding, mesh), specs)

    def solve(features, targets, anchor):
        head = kernel_solve(features, targets, anchor)
        return jax.lax.with_sharding_constraint(head, pinned)

    return {
        "jit, prox_solve": run(solve, mesh, samples, specs),
        "shard_map, GramStats": run(mapped(mesh, (*samples, specs)), mesh, samples, specs),
    }


# Training -----------------------------------------------------------------------------------------


def training_problem():
    """Inputs, targets and parameters of a network with one hidden layer of width D."""
    rng = np.random.default_rng(1)
    inputs = np.asarray(rng.normal(size=(N, 8)), np.float32)
    targets = np.sin(inputs @ np.asarray(rng.normal(size=(8, O)), np.float32))
    params = {
        "hidden": {"kernel": np.asarray(rng.normal(size=(8, D)) / 3, np.float32)},
        "head": cfll.LinearHead.zeros(D, O)._asdict(),
    }
    return params, inputs, targets


RULE = cfll.prox(LAM)
TX = cfll.closed_form(optax.adam(1e-2), RULE, head="head")


def features_of(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]["kernel"])


def train_step(mesh, params, state, inputs, targets):
    """Eq. (17), the same code on one device and on many."""
    del mesh

    def loss_fn(params):
        return RULE.loss(features_of(params, inputs), targets, cfll.get_state(state))

    (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = TX.update(grads, state, params, solution=solution)
    return optax.apply_updates(params, updates), state, loss


def mapped_train_step(mesh, params, state, inputs, targets):
    """The same by `jax.shard_map`: sums, loss and gradients of the devices are added by name."""

    def on_device(params, state, inputs, targets):
        anchor = cfll.get_state(state).anchor
        features = features_of(params, inputs)
        head = cfll.GramStats.zeros(D, O).add(features, targets).psum("batch").prox(anchor, LAM)
        distance = sum(jnp.sum((a - b) ** 2) for a, b in zip(head, anchor, strict=True))

        def loss_fn(params):  # Theorem 2: the gradient at the fixed head
            squares = jnp.sum((targets - head(features_of(params, inputs))) ** 2)
            return (jax.lax.psum(squares, "batch") + LAM * distance) / N

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = TX.update(grads, state, params, solution=head)
        return optax.apply_updates(params, updates), state, loss

    samples = jax.P("batch")
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(jax.P(), jax.P(), samples, samples), out_specs=jax.P()
    )(params, state, inputs, targets)


def training(steps=5):
    """Train on one device and in both ways on the mesh.

    Returns:
      The losses, and for either way: the differences to one device, whether types and shardings of
      parameters and state are the same after each step as at the start, how many programs the
      steps needed, and the collectives of a step.
    """
    params, inputs, targets = training_problem()
    step, one, losses = jax.jit(partial(train_step, None)), (params, TX.init(params)), []
    for _ in range(steps):
        *one, loss = step(*one, inputs, targets)
        losses.append(float(loss))

    mesh = make_mesh(batch=DEVICES)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, jax.P()))
        batch = jax.device_put((inputs, targets), NamedSharding(mesh, jax.P("batch")))
        start = params, jax.jit(TX.init)(params)
        report = {
            "jit": on_mesh(jax.jit(partial(train_step, mesh)), start, batch, steps, one),
            "shard_map": on_mesh(
                jax.jit(partial(mapped_train_step, mesh)), start, batch, steps, one
            ),
        }
    return {"losses": losses, "backbone": params["hidden"]["kernel"].size, **report}


def on_mesh(step, many, batch, steps, one):
    text = step.lower(*many, *batch).compile().as_text()
    types, losses = [types_of(many)], []
    for _ in range(steps):
        *many, loss = step(*many, *batch)
        types.append(types_of(many))
        losses.append(float(loss))
    anchors = (cfll.get_state(state).anchor for _, state in (many, one))
    return {
        "losses": losses,
        "params_error": relative_error(many[0], one[0]),
        "anchor_error": relative_error(*anchors),
        "stable": [later == types[0] for later in types[1:]],
        "programs": step._cache_size(),
        "collectives": collectives(text),
    }


def types_of(tree):
    """Type and sharding of every leaf, comparable."""
    return [f"{jax.typeof(leaf)} {leaf.sharding}" for leaf in jax.tree.leaves(tuple(tree))]


def relative_error(tree, exact):
    """The largest difference of two trees, over the largest entry of the leaf."""
    errors = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))), tree, exact
    )
    return max(jax.tree.leaves(errors))


def make_mesh(**axes):
    """A mesh whose shardings XLA chooses."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


if __name__ == "__main__":
    main()
