"""Training steps in closed form against SGD on all parameters: time, memory, compilation."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.core import methods
from benchmarks.core.methods import (
    ADAPTIVE,
    ALGORITHM_1,
    EQUATION_17,
    GRADIENT,
    PROXIMAL,
    Batch,
    Hyper,
    Method,
)
from benchmarks.core.problem import network
from benchmarks.core.records import Record
from benchmarks.core.timing import interleaved
from benchmarks.experiments.speed.ratios import BETA, ROUNDS, Cell, Rows, ratio
from benchmarks.models.fno import FNO1d
from benchmarks.models.mlp import MLP
from benchmarks.models.resnet import ResNet18
from benchmarks.reporting.summary import Claim, Table, tabulate

SGD = Method("SGD", GRADIENT)
FIXED, TUNED = (Method("SGD", head, EQUATION_17) for head in (PROXIMAL, ADAPTIVE))
STEPS = (SGD, FIXED, Method("SGD", PROXIMAL, ALGORITHM_1))


class Step(NamedTuple):
    """A network and its batch."""

    model: Any
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def mlp_step(d: int, o: int, batch: int) -> Step:
    """3072-1024-1024-d with o outputs."""
    return Step(MLP(widths=(1024, 1024, d), num_outputs=o), (batch, 3072), (batch, o))


STEP_CASES = {
    "FNO, width 32, B 32": Step(FNO1d(), (32, 256, 1), (32, 256, 1)),
    "FNO, width 64, B 128": Step(FNO1d(width=64), (128, 256, 1), (128, 256, 1)),
    **{
        f"MLP, d {d}, o {o}, B {batch}": mlp_step(d, o, batch)
        for d, o, batch in (
            (512, 10, 32),
            (512, 10, 128),
            (512, 100, 1024),
            (512, 100, 4096),
            (1024, 1000, 1024),
        )
    },
    "ResNet-18, width 16, B 128": Step(ResNet18(width=16), (128, 32, 32, 3), (128, 10)),
}


class Compiled(NamedTuple):
    """A training step, ready to run."""

    run: Callable[[], Any]  # () -> loss; keeps its own state
    temp_bytes: int  # XLA's own count of what the step needs besides its arguments and results
    trace_seconds: float  # to trace and lower, without compilation
    compile_seconds: float  # XLA's part


def compiled(step: Step, method: Method) -> Compiled:
    """Compile a method's step on random data."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal(step.inputs, np.float32))
    batch = Batch(inputs, jnp.asarray(rng.standard_normal(step.targets, np.float32)))
    backbone = network(step.model, 0, inputs[:1])
    hyper = Hyper(np.float32(1e-4), np.float32(BETA), np.int32(10**6))
    state = methods.init(method, hyper, backbone.params, backbone.stats, 0)
    jitted = jax.jit(partial(methods.step, method, backbone.apply), donate_argnums=1)

    start = time.perf_counter()
    lowered = jitted.lower(hyper, state, batch, batch)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()

    def run() -> Any:
        nonlocal state
        state, loss = program(hyper, state, batch, batch)
        return loss

    memory = program.memory_analysis()
    assert memory is not None  # some platforms do not count
    return Compiled(run, memory.temp_size_in_bytes, traced - start, done - traced)


def step_case(step: Step) -> Record:
    """One row of the steps' table."""
    programs = {method.name: compiled(step, method) for method in (*STEPS, TUNED)}
    return {
        "seconds": interleaved({name: program.run for name, program in programs.items()}, ROUNDS),
        **{
            field: {name: getattr(program, field) for name, program in programs.items()}
            for field in ("temp_bytes", "trace_seconds", "compile_seconds")
        },
    }


def head_sizes(step: Step) -> tuple[int, int, int]:
    """n, d, o of a step's solve."""
    backbone = network(step.model, 0, np.zeros((1, *step.inputs[1:]), np.float32))
    d, o = backbone.params[methods.HEAD]["kernel"].shape
    return int(np.prod(step.targets[:-1])), d, o


def step_table(rows: Rows) -> Table:
    """Closed-form steps against SGD on all parameters."""

    def quotient(name: str, other: str = SGD.name) -> Cell:
        return lambda row: str(ratio(row[1], name, other))

    return tabulate(
        "Time of a training step divided by that of SGD on all parameters of the same network; in "
        "the last column by that of a fixed lam.",
        rows,
        {
            "": lambda row: row[0]["name"],
            "SGD, ms": lambda row: f"{1e3 * np.median(row[1]['seconds'][SGD.name]):.1f}",
            **{method.name: quotient(method.name) for method in STEPS[1:]},
            TUNED.name: quotient(TUNED.name, FIXED.name),
        },
    )


def cost_table(rows: Rows) -> Table:
    """Memory and compilation."""

    def each(field: str, digits: str, scale: float = 1) -> Cell:
        return lambda row: " / ".join(f"{row[1][field][m.name] / scale:{digits}}" for m in STEPS)

    return tabulate(
        "What a compiled step needs besides arguments and results (XLA's own count), and the "
        "seconds to trace and to compile it: SGD, then Eq. (17), then Algorithm 1. Budget: SGD "
        "plus 3 (d² + d o) floats plus one copy of the features.",
        rows,
        {
            "": lambda row: row[0]["name"],
            "MB": each("temp_bytes", ".1f", 1e6),
            "budget, MB": lambda row: f"{memory_budget(row[0]['name'], row[1]) / 1e6:.1f}",
            "tracing, s": each("trace_seconds", ".2f"),
            "compiling, s": each("compile_seconds", ".1f"),
        },
    )


def memory_budget(name: str, record: Record) -> float:
    """Bytes: the SGD step's, 3 (d^2 + d o) floats and one copy of the features."""
    n, d, o = head_sizes(STEP_CASES[name])
    return record["temp_bytes"][SGD.name] + 4 * (3 * (d * d + d * o) + n * d)


def step_claims(rows: Rows) -> list[Claim]:
    """Limits for time, memory and tracing."""

    def claim(sentence: str, value_of: Callable[[str, Record], float], limit: float) -> Claim:
        values = [(key["name"], value_of(key["name"], record)) for key, record in rows]
        over = [f"{name}: {value:.2f}" for name, value in values if value > limit]
        return Claim(sentence, not over, "; ".join(over) or "everywhere")

    def quotient(method: Method, other: Method = SGD) -> Callable[[str, Record], float]:
        def median(name: str, record: Record) -> float:
            found = ratio(record, method.name, other.name)
            assert found is not None
            return found.median

        return median

    def memory(name: str, record: Record) -> float:
        used = max(record["temp_bytes"][m.name] for m in STEPS[1:])
        return used / memory_budget(name, record)

    def tracing(name: str, record: Record) -> float:
        seconds = record["trace_seconds"]
        return max(seconds[m.name] for m in STEPS[1:]) - seconds[SGD.name]

    tuned = [quotient(TUNED, FIXED)(key["name"], record) for key, record in rows]
    within = "A closed-form step stays within its memory budget (value: share of it)."
    return [
        claim("A step in Eq. (17) order takes at most 1.15 SGD steps.", quotient(FIXED), 1.15),
        claim("A step of Algorithm 1 takes at most 1.4 SGD steps.", quotient(STEPS[2]), 1.4),
        Claim(
            "A self-tuned step takes at most 1.1 steps with a fixed lam, median of the networks.",
            bool(np.median(tuned) <= 1.1),
            f"{np.median(tuned):.2f}; " + ", ".join(f"{value:.2f}" for value in sorted(tuned)),
        ),
        claim(within, memory, 1.0),
        claim("Tracing takes at most one second longer than SGD's.", tracing, 1.0),
    ]
