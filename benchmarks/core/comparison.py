"""Methods against each other at several batch sizes: tuning, training, records.

A run's result depends on its key alone, so the same code that trains also reads finished runs back.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.core import methods, training, tuner
from benchmarks.core.methods import Batch, Hyper, Method, State
from benchmarks.core.problem import Data, Problem
from benchmarks.core.records import Record, load_params, name_of, save_params
from benchmarks.core.runner import MissingError, Runner
from benchmarks.core.tuner import Tuned, Tuner, Values
from cfll.networks import Backbone


class Config(NamedTuple):
    """One run."""

    method: Method
    batch_size: int
    rate: float
    strength: float | None
    seed: int

    @property
    def label(self) -> str:
        """A run on one line."""
        method = self.method
        strength = "" if self.strength is None else f"{method.strength} {self.strength:g}"
        return (
            f"B {self.batch_size:<5} {method.optimizer:<5}{method.name:<26} "
            f"rate {self.rate:<7g} {strength:<11} seed {self.seed}"
        )


class Outcome(NamedTuple):
    """A method at one batch size, with its best hyperparameters."""

    method: Method  # which
    batch_size: int  # samples per step
    rate: float  # the best
    strength: float | None  # the best, or None
    steps: list[int]  # of the curves
    validation: np.ndarray  # (seeds, steps); infinite (accuracy: 0) from divergence on
    test: np.ndarray  # (seeds, steps)
    final: np.ndarray  # the number to report, one per seed
    seconds_per_step: float  # median over steps and seeds
    tried: dict[Values, float]  # cost of all hyperparameters that were tried on the first seed


class Comparison:
    """Runs of one problem, trained or read; all methods are tuned by one tuner.

    With a folder `keep`, `finished` returns the last state of a run.
    """

    def __init__(
        self,
        problem: Problem,
        runner: Runner,
        tuned_by: Tuner | None = None,
        keep: Path | None = None,
    ):
        self.problem, self.runner, self._keep = problem, runner, keep
        self.tuner = tuned_by or tuner.JOINTLY
        self.data: Callable[[], Data] = cache(problem.load)
        self._compiled: tuple[Any, Any] | None = None

    def key(self, config: Config) -> Record:
        """All that determines a run."""
        method = {k: v for k, v in config.method._asdict().items() if v is not None}
        return {
            **self.problem.settings,
            "epochs": self.problem.epochs(config.batch_size),
            "method": method,
            "batch_size": config.batch_size,
            "rate": config.rate,
            "strength": config.strength,
            "seed": config.seed,
        }

    def tune(
        self,
        method: Method,
        batch_size: int,
        seeds: Sequence[int],
        candidates: Sequence[Values] = (),
    ) -> Outcome:
        """The best hyperparameters by the last validation metric, then all seeds.

        The search is the tuner's, from the problem's start, unless candidates are given. Where a
        seed diverges, the next finalist; if all do, the last. Raises MissingError if a run is
        missing and nothing may be trained.
        """

        def cost(values: Values, seed: int) -> float:
            last = self.run(config_of(method, batch_size, values, seed))["validation"][-1]
            # Not the worst accuracy, which is a plateau that a search does not leave.
            return math.inf if last is None else self.problem.sign * last

        if candidates:
            tried = {values: cost(values, seeds[0]) for values in candidates}
            found = self.tuner.choose(tried, cost, seeds)
        else:
            axes = self.tuner.axes(method.strength)
            start = self.problem.start(method)[: len(axes)]
            found = self.tuner.tune(cost, axes, [start], seeds)
        for values in found.finalists:
            configs = [config_of(method, batch_size, values, seed) for seed in seeds]
            if all(self.run(config)["validation"][-1] is not None for config in configs):
                break
        return self.outcome(configs, found)

    def outcome(self, configs: Sequence[Config], found: Tuned | None = None) -> Outcome:
        """Run the same configuration on several seeds."""
        records = [self.run(config) for config in configs]

        def numbers(values: list[float | None]) -> list[float]:
            return [self.problem.worst if value is None else value for value in values]

        return Outcome(
            *configs[0][:4],
            steps=records[0]["steps"],
            validation=np.array([numbers(record["validation"]) for record in records]),
            test=np.array([numbers(record["test"]) for record in records]),
            final=np.array(numbers([record["final"] for record in records])),
            seconds_per_step=float(np.median([r["seconds_per_step"] for r in records])),
            tried=found.tried if found else {},
        )

    def run(self, config: Config) -> Record:
        """One run: from the records, or trained and added to them."""

        def says(record: Record) -> str:
            last = record["validation"][-1]
            return "diverged" if last is None else f"{self.problem.metric} {last:.3g}"

        return self.runner.run(self.key(config), partial(self._trained, config), config.label, says)

    def num_steps(self, batch_size: int) -> int:
        """Steps of a run."""
        per_epoch = len(self.data().train.targets) // batch_size
        if per_epoch == 0:
            raise SystemExit(f"batch size {batch_size} exceeds the training set")
        return self.problem.epochs(batch_size) * per_epoch

    def _trained(self, config: Config) -> Record:
        data = self.data()
        parts = [data.validation] + ([] if data.test is None else [data.test])
        state, network, curve = self.train(
            config, lambda measure, state: [data.scale * measure(state, part) for part in parts]
        )
        if self._keep is not None:
            path = self._keep / f"{name_of(self.key(config))}.npz"
            save_params(path, (state.params, state.stats))
        errors = [[None] * len(parts) if isinstance(e, float) else e for e in curve.errors]
        final = None if data.test is None else errors[-1][1]
        if final is not None and data.final is not None:
            final = data.scale * self._functions(config, network)[1](state, data.final)
        return {
            "steps": curve.steps,
            "validation": [pair[0] for pair in errors],
            "test": [] if data.test is None else [pair[1] for pair in errors],
            "final": final,
            "seconds_per_step": curve.seconds_per_step,
        }

    def finished(self, config: Config) -> tuple[State, Callable[[State, Batch], float]]:
        """The last state of a run, made again if it was not kept, and how to measure it."""
        assert self._keep is not None
        path = self._keep / f"{name_of(self.key(config))}.npz"
        _, state, network = self.prepare(config, num_steps=1)
        if not path.exists():
            self._trained(config)
        params, stats = load_params(path, like=(state.params, state.stats))
        measure = self._functions(config, network)[1]
        return state._replace(params=params, stats=stats), measure

    def train(
        self, config: Config, error: Callable[[Any, State], Any] | None = None
    ) -> tuple[State, Backbone, training.Curve]:
        """Train, whatever the records have; the curve holds error(measurement, state)."""
        num_steps, num_points = self.num_steps(config.batch_size), self.problem.num_measurements
        step, state, network = self.prepare(config, num_steps)
        measure = self._functions(config, network)[1]
        batches = self._batches(config)
        if config.method.order == methods.ALGORITHM_2:
            first, batches = _peek(batches)
            first_head = partial(methods.first_head, config.method, network.apply)
            state = jax.jit(first_head)(hyper_of(config, num_steps), state, first)
        self.runner.progress.start(config.label, num_steps)
        measuring: dict[str, Any] = {}
        if error:
            marks = training.marks(num_steps, num_points)
            measuring = {"error": partial(error, measure), "measure_at": marks}
        state, curve = training.train(
            step, state, _with_following(batches), on_step=self.runner.progress.step, **measuring
        )
        return state, network, curve

    def prepare(self, config: Config, num_steps: int) -> tuple[Callable, State, Backbone]:
        """The step (state, batch, following) -> (state, loss), the first state, the network."""
        network = self.problem.network(config.seed, self.data().train.inputs[:1])
        hyper = hyper_of(config, num_steps)
        state = methods.init(config.method, hyper, network.params, network.stats, config.seed)
        return partial(self._functions(config, network)[0], hyper), state, network

    def _functions(self, config: Config, network: Backbone) -> tuple[Any, Any]:
        """Step and measurement, compiled once per method and batch size."""
        tag = config.method, config.batch_size
        if self._compiled is None or self._compiled[0] != tag:
            step = partial(methods.step, config.method, network.apply)
            outputs = partial(methods.outputs, network.apply)
            measure = training.measurement(self.problem.metric, outputs)
            self._compiled = tag, (jax.jit(step, donate_argnames="state"), measure)
        return self._compiled[1]

    def _batches(self, config: Config) -> Iterator[Batch]:
        stream = training.batches(
            *self.data().train,
            batch_size=config.batch_size,
            epochs=self.problem.epochs(config.batch_size),
            seed=config.seed,
        )
        augment = self.problem.augment
        rng = np.random.default_rng([config.seed, 1])
        for inputs, targets in stream:
            batch = Batch(inputs, targets)
            yield batch if augment is None else augment(batch, rng)


def config_of(method: Method, batch_size: int, values: Values, seed: int) -> Config:
    """A run with these hyperparameters: a rate, and a strength if the method has one."""
    return Config(method, batch_size, values[0], values[1] if len(values) > 1 else None, seed)


def hyper_of(config: Config, num_steps: int) -> Hyper:
    """What the compiled step is told."""
    strength = np.float32(1.0 if config.strength is None else config.strength)
    return Hyper(np.float32(config.rate), strength, np.int32(num_steps))


def compare(
    comparison: Comparison, rows: Iterable[Method], batch_sizes: Iterable[int], seeds: Sequence[int]
) -> list[Outcome]:
    """All methods at all batch sizes. If nothing may be trained, what lacks runs is left out."""
    outcomes = []
    for method, batch_size in itertools.product(rows, batch_sizes):
        with suppress(MissingError):
            outcomes.append(comparison.tune(method, batch_size, seeds))
    return outcomes


def _with_following(batches: Iterator[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Each batch with the next one; the last with itself."""
    current = next(batches)
    for following in batches:
        yield current, following
        current = following
    yield current, current


def _peek(batches: Iterator[Batch]) -> tuple[Batch, Iterator[Batch]]:
    first = next(batches)
    return first, itertools.chain([first], batches)
