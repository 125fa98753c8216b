"""The cells of the table for a decision: a task, an optimizer and what sets its head."""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.core.comparison import Comparison, Config, Outcome
from benchmarks.core.methods import (
    ADAPTIVE,
    ADAPTIVE_FROM,
    EQUATION_17,
    PROXIMAL,
    SOFTMAX,
    TWO_TIMESCALE,
    Method,
)
from benchmarks.core.problem import Problem
from benchmarks.core.runner import MissingError
from benchmarks.core.timing import interleaved, training_step
from benchmarks.core.tuner import Values
from benchmarks.tasks import burgers, images, operators, sequences, tables

Task = Literal[
    "burgers",
    "kdv",
    "deeponet",
    "navier_stokes",
    "lorenz",
    "rf1",
    "california",
    "cifar10",
    "omniglot",
]
OPTIMIZERS = ("SGD", "Adam", "Muon")
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZES: Mapping[Task, tuple[int, ...]] = {
    "burgers": (16, 64, 256),
    "kdv": (16, 64, 256),
    "deeponet": (64,),
    "navier_stokes": (64,),
    "lorenz": (64,),
    "rf1": (128, 1024),
    "california": (128, 1024),
    "cifar10": (128, 1024),
    "omniglot": (128, 1024),
}
GRADIENT_HEAD, FIXED, TUNED = "gradient, any ratio", "fixed lam", "self-tuned lam"
CROSS_ENTROPY, SOFTMAX_HEAD = "cross entropy, any ratio", "softmax, fixed lam"
CLASSIFIERS: tuple[Task, ...] = ("cifar10", "omniglot")


class Row(NamedTuple):
    """A cell of the table: an optimizer and what sets its head, at one batch size."""

    optimizer: str
    head: str
    batch_size: int


Found = dict[Row, Outcome]

# Where a self-tuned penalty is made to start, and on how many of the seeds.
STARTS, NUM_SEEDS_OF_STARTS = (1e-3, 1e5), 3


def make_problem(task: Task, data: Path | None, out: Path) -> Problem:
    """A task, at the size of the preset "cpu" where an experiment of its own has one."""
    if task == "burgers":
        return burgers.make_problem(burgers.SIZES["cpu"], out)
    if task == "kdv" or task == "deeponet" or task == "navier_stokes":
        return operators.make_problem(task)
    if task == "lorenz":
        return sequences.make_problem()
    if task == "rf1" or task == "california":
        return tables.make_problem(task, data)
    return images.make_problem(task, images.SIZES[task, "cpu"], data)


def heads_of(task: Task) -> tuple[str, ...]:
    """The columns of a task."""
    classes = (CROSS_ENTROPY, SOFTMAX_HEAD) if task in CLASSIFIERS else ()
    return (GRADIENT_HEAD, FIXED, TUNED, *classes)


def tune(comparison: Comparison, row: Row) -> Outcome:
    """A row at its best hyperparameters."""
    loss = "cross entropy" if row.head == CROSS_ENTROPY else "l2"
    methods = {
        FIXED: Method(row.optimizer, PROXIMAL, EQUATION_17),
        TUNED: Method(row.optimizer, ADAPTIVE, EQUATION_17),
        SOFTMAX_HEAD: Method(row.optimizer, SOFTMAX, EQUATION_17),
    }
    method = methods.get(row.head, Method(row.optimizer, TWO_TIMESCALE, loss=loss, init="zeros"))
    found = comparison.tune(method, row.batch_size, SEEDS)
    if row.head not in methods:
        # The other initialization only where zeros are good: a difference of a few percent.
        lecun = comparison.tune(
            method._replace(init=None), row.batch_size, SEEDS, candidates=best_candidates(found)
        )
        sign = comparison.problem.sign
        found = min(found, lecun, key=lambda outcome: sign * outcome.validation[:, -1].mean())
    return found


def best_candidates(outcome: Outcome) -> list[Values]:
    """The three best of those that an outcome's search tried; among equals by their digits."""
    return sorted(outcome.tried, key=lambda values: (outcome.tried[values], str(values)))[:3]


def compare(
    comparison: Comparison,
    task: Task,
    batch_sizes: tuple[int, ...],
    optimizers: tuple[str, ...] = OPTIMIZERS,
) -> Found:
    """All rows of a task; if nothing may be trained, those that were."""
    found: Found = {}
    for batch_size, optimizer, head in itertools.product(batch_sizes, optimizers, heads_of(task)):
        row = Row(optimizer, head, batch_size)
        with suppress(MissingError):
            found[row] = tune(comparison, row)
    return found


def started(comparison: Comparison, found: Found) -> dict[float, Found]:
    """The self-tuned rows on fewer seeds, at the same rate, from every one of `STARTS`."""
    starts: dict[float, Found] = {lam: {} for lam in STARTS}
    for lam, (row, outcome) in itertools.product(STARTS, found.items()):
        if row.head == TUNED:
            method = outcome.method._replace(head=ADAPTIVE_FROM)
            seeds, at = SEEDS[:NUM_SEEDS_OF_STARTS], (outcome.rate, lam)
            with suppress(MissingError):
                starts[lam][row] = comparison.tune(method, row.batch_size, seeds, candidates=[at])
    return starts


def seconds_of(comparison: Comparison, found: Found) -> dict[Row, float]:
    """Seconds of a step, measured in turn for the rows of one optimizer and batch size."""
    seconds: dict[Row, float] = {}
    for optimizer, batch_size in dict.fromkeys((row.optimizer, row.batch_size) for row in found):
        rows = [row for row in found if (row.optimizer, row.batch_size) == (optimizer, batch_size)]

        def measure(rows: list[Row] = rows) -> dict[str, list[float]]:
            steps = {
                row.head: training_step(comparison, first_config(found[row]), num_steps=1000)
                for row in rows
            }
            return {"seconds": [float(np.median(s)) for s in interleaved(steps, 30).values()]}

        key = {"seconds per step": comparison.problem.settings, "rows": [list(row) for row in rows]}
        with suppress(MissingError):
            record = comparison.runner.run(key, measure, f"B {batch_size:<5} {optimizer} in turn")
            seconds |= dict(zip(rows, record["seconds"], strict=True))
    return seconds


def first_config(outcome: Outcome) -> Config:
    """The first of an outcome's runs."""
    return Config(outcome.method, outcome.batch_size, outcome.rate, outcome.strength, seed=0)
