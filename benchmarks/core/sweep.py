"""Rows of a table, each at its best learning rate: what every comparison of optimizers needs.

Between the loop of `training.py` and the experiments. Knows neither models nor cfll: a `Task` hands
over its functions and arrays. Finished runs are kept on disk and never repeated.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Record, Records, load_params, name_of, save_params
from benchmarks.core.training import Batch, batches, first_at_or_below, train

RATES_AT_MOST = 8

State = tuple[Any, Any]  # params, opt_state
Step = Callable[..., tuple[State, jax.Array]]  # rate, num_steps, state, inputs, targets


class Row(NamedTuple):
    """A row of the table: which optimizer trains the network, and what sets its head."""

    optimizer: str
    head: str


class Task(NamedTuple):
    """What is learned, and how one step of a row is made.

    Attributes:
      train, validation, test: inputs and targets.
      init: seed -> parameters, the same for every row.
      transformation: row, rate, number of steps -> the optimizer.
      step: row -> jitted step; it takes rate and number of steps, so it is compiled once per row.
      error: parameters, inputs, targets -> what is reported.
      rates: optimizer -> two neighboring rates to start from, the same for every head.
      settings: everything else that determines a result; part of the key of a finished run.
    """

    train: Batch
    validation: Batch
    test: Batch
    init: Callable[[int], Any]
    transformation: Callable[[Row, float, int], optax.GradientTransformation]
    step: Callable[[Row], Step]
    error: Callable[[Any, np.ndarray, np.ndarray], float]
    rates: Mapping[str, tuple[float, float]]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how often to train.

    Attributes:
      task: what.
      epochs: passes over the training samples.
      batch_size: samples per step.
      seeds: one run for each.
      out: folder of finished runs.
      records: their results.
    """

    task: Task
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    out: Path
    records: Records

    @property
    def steps_per_epoch(self) -> int:
        return len(self.task.train[0]) // self.batch_size

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def key(self, row: Row, rate: float, seed: int, what: str = "training") -> Record:
        """All that determines a result."""
        return {
            "what": what,
            **row._asdict(),
            "rate": rate,
            "seed": seed,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            **self.task.settings,
        }

    def params_path(self, row: Row, rate: float, seed: int) -> Path:
        """Where a finished run leaves its parameters."""
        return self.out / "params" / f"{name_of(self.key(row, rate, seed))}.npz"

    def params(self, row: Row, rate: float, seed: int) -> Any:
        """The parameters of a finished run."""
        return load_params(self.params_path(row, rate, seed), like=self.task.init(seed))


class Runs(NamedTuple):
    """The runs of a row at one rate, one per seed.

    Attributes:
      steps: after how many steps the validation error was measured.
      errors: the errors, (seeds, steps); infinite from divergence on.
      seconds_per_step: median.
    """

    steps: list[int]
    errors: np.ndarray
    seconds_per_step: float

    @property
    def mean_errors(self) -> np.ndarray:
        """Mean over the seeds, (steps,)."""
        return self.errors.mean(axis=0)

    @property
    def last_error(self) -> float:
        """Mean over the seeds, at the end: what rates are chosen by."""
        return float(self.mean_errors[-1])

    def steps_to(self, level: float) -> int | None:
        """After how many steps the mean error is first at or below a level; None if never."""
        return first_at_or_below(self.steps, self.mean_errors, level)


class Outcome(NamedTuple):
    """A row at its best rate.

    Attributes:
      row: which.
      rate: the best.
      runs: at that rate.
      half: runs of half the length at that rate, or None; see `outcome_of`.
      rates: every rate tried and its last validation error, in ascending order.
      test_errors: one per seed.
    """

    row: Row
    rate: float
    runs: Runs
    half: Runs | None
    rates: dict[float, float]
    test_errors: list[float]


def outcomes_of(
    plan: Plan, rows: tuple[Row, ...], baseline: str, progress: SweepProgress
) -> list[Outcome]:
    """All rows; those with the head `baseline` must come before others of the same optimizer."""
    outcomes: list[Outcome] = []
    to_match: dict[str, float] = {}
    for row in rows:
        outcome = outcome_of(plan, row, to_match.get(row.optimizer), progress)
        if row.head == baseline:
            to_match[row.optimizer] = outcome.runs.last_error
        outcomes.append(outcome)
    return outcomes


def outcome_of(plan: Plan, row: Row, to_match: float | None, progress: SweepProgress) -> Outcome:
    """Find the best rate of a row by validation error, and test it.

    A run decays its rate to zero, and most of its progress may come with the decay: where it passes
    another run's last error then says little about how many steps it needs. So a row that passes
    `to_match` only in its second half also gets runs of half the length.

    Args:
      plan: how to train.
      row: which.
      to_match: the last validation error of the row to compare with, or None.
      progress: told about every run.
    """
    runs_at = partial(runs_of, step=plan.task.step(row), row=row, progress=progress)
    tried = search(
        plan.task.rates[row.optimizer], lambda rate: runs_at(plan, rate=rate), plan, progress
    )
    rate = min(tried, key=lambda rate: tried[rate].last_error)
    half = None
    if to_match is not None and plan.epochs > 1:
        matched = tried[rate].steps_to(to_match)
        if matched is not None and matched > plan.num_steps / 2:
            progress.plan_more(len(plan.seeds))
            half = runs_at(dataclasses.replace(plan, epochs=plan.epochs // 2), rate=rate)
    return Outcome(
        row=row,
        rate=rate,
        runs=tried[rate],
        half=half,
        rates={rate: tried[rate].last_error for rate in sorted(tried)},
        test_errors=[error_on_test_set(plan, row, rate, seed) for seed in plan.seeds],
    )


def search(
    start: tuple[float, float],
    runs_at: Callable[[float], Runs],
    plan: Plan,
    progress: SweepProgress,
) -> dict[float, Runs]:
    """From two neighboring rates downhill by factors of two, until the best is between worse ones.

    Returns:
      Rate -> runs, for the three rates or more that were tried.
    """
    tried: dict[float, Runs] = {}
    todo = list(start)
    while todo and len(tried) < RATES_AT_MOST:
        for rate in todo:
            tried[rate] = runs_at(rate)
        best = min(tried, key=lambda rate: tried[rate].last_error)
        todo = [rate for rate in (best / 2, best * 2) if not min(tried) <= rate <= max(tried)]
        if len(tried) > len(start):  # the first further rate is always planned
            progress.plan_more(len(todo) * len(plan.seeds))
    return tried


def runs_of(plan: Plan, *, step: Step, row: Row, rate: float, progress: SweepProgress) -> Runs:
    """Train once per seed."""
    records = [run(plan, step, row, rate, seed, progress) for seed in plan.seeds]
    return Runs(
        steps=records[0]["steps"],
        errors=np.array([record["errors"] for record in records]),
        seconds_per_step=float(np.median([record["seconds_per_step"] for record in records])),
    )


def run(
    plan: Plan, step: Step, row: Row, rate: float, seed: int, progress: SweepProgress
) -> Record:
    """Train once, or read what an earlier call has left."""
    task, key, params_path = plan.task, plan.key(row, rate, seed), plan.params_path(row, rate, seed)
    run_of = f"rate {rate:<7.4g} seed {seed} {plan.num_steps:>5} steps"
    label = f"{row.optimizer:<4} {row.head:<16} {run_of}"
    record = plan.records.get(key)
    if record is None or not params_path.exists():
        progress.start(label, plan.num_steps)
        params = task.init(seed)
        state = (params, task.transformation(row, rate, plan.num_steps).init(params))
        half_epoch = max(1, plan.steps_per_epoch // 2)
        (params, _), curve = train(
            partial(step, rate, plan.num_steps),
            state,
            batches(*task.train, batch_size=plan.batch_size, epochs=plan.epochs, seed=seed),
            error=lambda state: task.error(state[0], *task.validation),
            measure_at={*range(half_epoch, plan.num_steps, half_epoch), plan.num_steps},
            on_step=progress.step,
        )
        save_params(params_path, params)
        record = curve._asdict()
        plan.records.add(key, record)
        note = f"{1e3 * record['seconds_per_step']:.0f} ms/step"
    else:
        note = "from disk"
    error = record["errors"][-1]
    result = f"MSE {error:.2e}" if math.isfinite(error) else "diverged"
    progress.finish(f"{label}  {result:<12} {note}")
    return record


def error_on_test_set(plan: Plan, row: Row, rate: float, seed: int) -> float:
    """The test error of a finished run."""
    key = plan.key(row, rate, seed, what="test")
    record = plan.records.get(key)
    if record is None:
        error = plan.task.error(plan.params(row, rate, seed), *plan.task.test)
        record = {"test_error": error}
        plan.records.add(key, record)
    return record["test_error"]
