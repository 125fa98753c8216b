"""How direct and iterative solves grow with n, d and o, and what fewer and rougher solves cost."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cfll
from benchmarks.core import methods, training
from benchmarks.core.methods import Batch
from benchmarks.core.problem import network
from benchmarks.core.records import Record
from benchmarks.core.timing import interleaved
from benchmarks.experiments.speed.ratios import BETA, ROUNDS, Cell, Rows, make_batch, ratio
from benchmarks.models.mlp import MLP
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Table, tabulate

AXES: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "d": tuple((4096, d, 10) for d in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    "n": tuple((n, 512, 10) for n in (16, 64, 256, 1024, 4096, 16384, 65536)),
    "o": tuple((2048, 512, o) for o in (1, 10, 100, 1000)),
}
CG_TOLERANCES = (1e-2, 1e-4)
CHOLESKY = "Cholesky"


def growth_case(shape: tuple[int, int, int]) -> Record:
    """Direct and iterative solves of one shape, and how far apart their predictions are."""
    features, targets = map(jnp.asarray, make_batch(*shape))
    solvers: dict[str, Any] = {CHOLESKY: "auto"}
    solvers |= {f"cg, {tol:g}": cfll.CG(tolerance=tol) for tol in CG_TOLERANCES}
    anchor = cfll.LinearHead.zeros(shape[1], shape[2])
    solves = {
        name: jax.jit(partial(cfll.penalized_solve, penalty=BETA, solver=solver))
        for name, solver in solvers.items()
    }
    found = {name: run(features, targets, anchor) for name, run in solves.items()}
    exact = found[CHOLESKY][0](features)
    return {
        "seconds": interleaved(
            {name: partial(run, features, targets, anchor) for name, run in solves.items()}, ROUNDS
        ),
        "iterations": {name: int(info.iterations) for name, (_, info) in found.items()},
        "difference": {
            name: float(jnp.linalg.norm(head(features) - exact) / jnp.linalg.norm(exact))
            for name, (head, _) in found.items()
        },
    }


SPARINGLY: Mapping[str, cfll.Rule] = {
    "every step": cfll.prox(BETA),
    "every 2nd": cfll.every(2, cfll.prox(BETA)),
    "every 4th": cfll.every(4, cfll.prox(BETA)),
    "every 8th": cfll.every(8, cfll.prox(BETA)),
    "cg, 0.1": cfll.prox(BETA, solver=cfll.CG(tolerance=0.1)),
    "cg, 0.001": cfll.prox(BETA, solver=cfll.CG(tolerance=1e-3)),
}


def sparing_case(name: str, num_steps: int = 600, width: int = 512, batch: int = 256) -> Record:
    """Train a network on a teacher's outputs; its test error at the end."""
    rng = np.random.default_rng(0)
    teacher = [
        rng.standard_normal(s, np.float32) / np.sqrt(s[0]) for s in ((8, 64), (64, 64), (64, 4))
    ]

    def draw(count: int) -> Batch:
        x = rng.standard_normal((count, 8), np.float32)
        hidden = np.tanh(2 * np.tanh(2 * x @ teacher[0]) @ teacher[1])
        return Batch(x, (hidden @ teacher[2]).astype(np.float32))

    train, test = draw(num_steps // 4 * batch), draw(4096)
    model = MLP(widths=(width, width), num_outputs=4)
    backbone = network(model, 0, train.inputs[:1])
    rate = optax.cosine_decay_schedule(1e-3, num_steps)
    tx = cfll.closed_form(optax.adam(rate), SPARINGLY[name], methods.HEAD)

    @partial(jax.jit, donate_argnums=0)
    def step(state, inputs, targets):
        params, opt_state = state

        def feature_fn(params):
            return backbone.apply(params, {}, inputs, train=True)[0]

        def loss_fn(params):
            return methods.l2_loss(cfll.get_head(params, methods.HEAD)(feature_fn(params)), targets)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, targets=targets, feature_fn=feature_fn
        )
        return (optax.apply_updates(params, updates), opt_state), loss

    params = jax.tree.map(jnp.asarray, backbone.params)
    params = cfll.set_head(params, methods.HEAD, cfll.LinearHead.zeros(width, 4))
    rows = (rng.integers(0, len(train.inputs), batch) for _ in range(num_steps))
    batches = ((train.inputs[chosen], train.targets[chosen]) for chosen in rows)
    (params, _), curve = training.train(step, (params, tx.init(params)), batches)
    features, _ = backbone.apply(params, {}, test.inputs, train=False)
    outputs = cfll.get_head(params, methods.HEAD)(features)
    error = float(jnp.mean(jnp.square(outputs - test.targets)) / np.var(test.targets))
    return {"seconds": {name: [curve.seconds_per_step]}, "error": error}


def growth_table(rows: Rows) -> Table:
    """Where conjugate gradients overtake Cholesky."""

    def cell(name: str) -> Cell:
        return lambda row: (
            f"{ratio(row[1], name, CHOLESKY)}, {row[1]['iterations'][name]}, "
            f"{row[1]['difference'][name]:.0e}"
        )

    return tabulate(
        "Conjugate gradients (with their tolerance) from an anchor of zeros: time divided by that "
        "of the direct solve, iterations, relative difference of the predictions on the batch.",
        rows,
        {
            "(n, d, o)": lambda row: str(tuple(row[0]["shape"])),
            "direct, ms": lambda row: f"{1e3 * np.median(row[1]['seconds'][CHOLESKY]):.2f}",
            **{name: cell(name) for name in (f"cg, {tol:g}" for tol in CG_TOLERANCES)},
        },
    )


def growth_figure(rows: Rows, path: Path) -> list[Path]:
    """Milliseconds along d, n and o."""
    by_shape = {tuple(key["shape"]): record for key, record in rows}
    panels: dict[str, dict[str, plots.Line]] = {}
    for axis, shapes in AXES.items():
        present = [shape for shape in shapes if shape in by_shape]
        if not present:
            continue
        position = {"n": 0, "d": 1, "o": 2}[axis]
        fixed = ", ".join(
            f"{name} = {present[0][i]}" for i, name in enumerate("ndo") if i != position
        )
        panels[f"{axis} grows, {fixed}"] = {
            name: plots.Line(
                [shape[position] for shape in present],
                np.array([[1e3 * np.median(by_shape[s]["seconds"][name]) for s in present]]),
            )
            for name in by_shape[present[0]]["seconds"]
        }
    return plots.panels_by_batch_size(
        panels,
        path=path,
        ylabel="time of a solve (ms)",
        xlabel="size",
        xscale="log",
        yscale="log",
        window=1,
    )


def sparing_table(rows: Rows) -> Table:
    """What fewer and rougher solves cost and save."""
    return tabulate(
        "Training with fewer or rougher solves: 600 steps of Adam with Algorithm 1, 512 features, "
        "batch 256, on a teacher network's outputs; one seed. Test error as a share of the "
        "targets' variance.",
        rows,
        {
            "head solved": lambda row: row[0]["name"],
            "ms per step": lambda row: f"{1e3 * np.median(*row[1]['seconds'].values()):.1f}",
            "test error": lambda row: f"{row[1]['error']:.2e}",
        },
    )
