"""Methods against each other at several batch sizes: tuning, training, records.

Between `methods.py` and the experiments. A run's result depends on its key alone, so the same code
that trains also reads finished runs back: `RESULTS.md` is made by replaying an experiment on its
records, without data and without training.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

import cfll.flax
from benchmarks.core import methods, training
from benchmarks.core.methods import Batch, Hyper, Method, State
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Record, Records
from benchmarks.core.tuning import Point, best_of, descend
from cfll.networks import Backbone

# The grids of all experiments: half decades of rates, decades of penalties.
RATES = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-5, 2) for mantissa in (1, 3))
STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "lam": tuple(10.0**k for k in range(-5, 6)),
    "beta": tuple(10.0**k for k in range(-5, 6)),
    "ratio": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
}


class Data(NamedTuple):
    """Arrays: inputs (n, ...) and targets (n, ..., o).

    Attributes:
      train: to learn from.
      validation: to choose hyperparameters by.
      test: for the curves.
      final: for the reported number; `None`: it is the last one of the test curve.
      scale: multiplies mean squared errors into their unit.
    """

    train: Batch
    validation: Batch
    test: Batch
    final: Batch | None = None
    scale: float = 1.0


class Problem(NamedTuple):
    """What is learned.

    Attributes:
      settings: all that determines a result besides method, hyperparameters, batch size and seed;
        part of the key of every run.
      epochs: batch size -> passes over the training data.
      load: makes or reads the data; called only if something is to be trained.
      network: (seed, first inputs) -> the network, head included; its parameters as a `Backbone`.
      metric: "MSE" or "accuracy": what the curves show, and by its sign what is better.
      start: method -> first rate and strength to try.
      augment: (batch, generator) -> batch, or None.
      num_measurements: points of a curve.
    """

    settings: Mapping[str, Any]
    epochs: Callable[[int], int]
    load: Callable[[], Data]
    network: Callable[[int, Any], Backbone]
    metric: str
    start: Callable[[Method], tuple[float, float | None]]
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None
    num_measurements: int = 20

    @property
    def sign(self) -> int:
        """What to multiply the metric by so that less is better."""
        return 1 if self.metric == "MSE" else -1

    @property
    def worst(self) -> float:
        """The metric of a run that diverged."""
        return math.inf if self.metric == "MSE" else 0.0


class MissingError(Exception):
    """A run is not among the records, and nothing may be trained."""


class Config(NamedTuple):
    """One run."""

    method: Method
    batch_size: int
    rate: float
    strength: float | None
    seed: int


class Outcome(NamedTuple):
    """A method at one batch size, with its best hyperparameters.

    Attributes:
      method: which.
      batch_size: samples per step.
      rate: the best.
      strength: the best, or None.
      steps: of the curves.
      validation: (seeds, steps); infinite (accuracy: 0) from divergence on.
      test: (seeds, steps).
      final: the number to report, one per seed.
      seconds_per_step: median over steps and seeds.
      tried: every hyperparameter that was tried on the first seed: [rate, strength, validation].
    """

    method: Method
    batch_size: int
    rate: float
    strength: float | None
    steps: list[int]
    validation: np.ndarray
    test: np.ndarray
    final: np.ndarray
    seconds_per_step: float
    tried: list[tuple[float, float | None, float]]


class Comparison:
    """Runs of one problem, trained or read.

    Args:
      problem: what is learned.
      records: finished runs; new ones are added.
      train: whether missing runs may be trained.
      progress: told about every run, or None.
    """

    def __init__(
        self,
        problem: Problem,
        records: Records,
        *,
        train: bool = True,
        progress: SweepProgress | None = None,
    ):
        self.problem, self.records = problem, records
        self._train, self._progress = train, progress
        self._data: Callable[[], Data] = cache(problem.load)
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

    def tune(self, method: Method, batch_size: int, seeds: Sequence[int]) -> Outcome:
        """The best hyperparameters by the last validation metric, then all seeds.

        Args:
          method: which.
          batch_size: samples per step.
          seeds: the search runs on the first, the best is run on all.

        Raises:
          MissingError: if a run is missing and nothing may be trained.
        """
        axes: list[Sequence[float | None]] = [RATES]
        rate, strength = self.problem.start(method)
        start = [_nearest(RATES, rate)]
        if method.strength is not None:
            values = STRENGTHS[method.strength]
            axes.append(values)
            start.append(_nearest(values, strength or 1.0))

        def config(point: Point, seed: int) -> Config:
            values = [axis[index] for axis, index in zip(axes, point, strict=True)]
            second = values[1] if len(values) > 1 else None
            assert values[0] is not None
            return Config(method, batch_size, values[0], second, seed)

        def cost(point: Point) -> float:
            last = self.run(config(point, seeds[0]))["validation"][-1]
            # Not the worst accuracy, which is a plateau that a search does not leave.
            return math.inf if last is None else self.problem.sign * last

        tried = descend(cost, tuple(start), [len(axis) for axis in axes])
        best = best_of(tried)
        found = [config(point, seeds[0]) for point in sorted(tried)]
        return self.outcome(
            [config(best, seed) for seed in seeds],
            [
                (
                    c.rate,
                    c.strength,
                    self.problem.worst
                    if math.isinf(tried[point])
                    else self.problem.sign * tried[point],
                )
                for point, c in zip(sorted(tried), found, strict=True)
            ],
        )

    def outcome(
        self, configs: Sequence[Config], tried: list[tuple[float, float | None, float]]
    ) -> Outcome:
        """Run the same configuration on several seeds."""
        records = [self.run(config) for config in configs]
        worst = self.problem.worst

        def curves(name: str) -> np.ndarray:
            return np.array([[_number(x, worst) for x in record[name]] for record in records])

        first = configs[0]
        return Outcome(
            first.method,
            first.batch_size,
            first.rate,
            first.strength,
            steps=records[0]["steps"],
            validation=curves("validation"),
            test=curves("test"),
            final=np.array([_number(record["final"], worst) for record in records]),
            seconds_per_step=float(np.median([r["seconds_per_step"] for r in records])),
            tried=tried,
        )

    def run(self, config: Config) -> Record:
        """One run: from the records, or trained and added to them."""
        key = self.key(config)
        record = self.records.get(key)
        note = "from disk"
        if record is None:
            if not self._train:
                raise MissingError(str(key))
            if self._progress:
                self._progress.start(label_of(config), self.num_steps(config.batch_size))
            record = self._trained(config)
            self.records.add(key, record)
            note = f"{1e3 * record['seconds_per_step']:.0f} ms/step"
        if self._progress:
            last = record["validation"][-1]
            shown = "diverged" if last is None else f"{self.problem.metric} {last:.3g}"
            self._progress.finish(f"{label_of(config)}  {shown:<16} {note}")
        return record

    def num_steps(self, batch_size: int) -> int:
        """Steps of a run."""
        per_epoch = len(self._data().train.targets) // batch_size
        if per_epoch == 0:
            raise SystemExit(f"batch size {batch_size} exceeds the training set")
        return self.problem.epochs(batch_size) * per_epoch

    def _trained(self, config: Config) -> Record:
        problem, data, method = self.problem, self._data(), config.method
        num_steps = self.num_steps(config.batch_size)
        strength = np.float32(1.0 if config.strength is None else config.strength)
        hyper = Hyper(np.float32(config.rate), strength, np.int32(num_steps))
        network = problem.network(config.seed, data.train.inputs[:1])
        take_step, measure = self._functions(method, config.batch_size, network)
        state = methods.init(method, hyper, network.params, network.stats, config.seed)
        batches = self._batches(config)
        if method.order == methods.ALGORITHM_2:
            first, batches = _peek(batches)
            state = jax.jit(partial(methods.first_head, method, network.apply))(hyper, state, first)

        state, curve = training.train(
            partial(take_step, hyper),
            state,
            _with_following(batches),
            error=lambda state: (
                data.scale * measure(state, data.validation),
                data.scale * measure(state, data.test),
            ),
            measure_at=training.marks(num_steps, problem.num_measurements),
            on_step=self._progress.step if self._progress else lambda loss: None,
        )
        pairs = [(None, None) if isinstance(e, float) else e for e in curve.errors]
        final = pairs[-1][1]
        if final is not None and data.final is not None:
            final = data.scale * measure(state, data.final)
        return {
            "steps": curve.steps,
            "validation": [pair[0] for pair in pairs],
            "test": [pair[1] for pair in pairs],
            "final": final,
            "seconds_per_step": curve.seconds_per_step,
        }

    def _functions(self, method: Method, batch_size: int, network: Backbone) -> tuple[Any, Any]:
        """Step and measurement, compiled once per method and batch size."""
        tag = (method, batch_size)
        if self._compiled is None or self._compiled[0] != tag:
            jitted = jax.jit(partial(methods.step, method, network.apply), donate_argnames="state")
            measure = measurement(self.problem.metric, partial(methods.outputs, network.apply))
            self._compiled = (tag, (jitted, measure))
        return self._compiled[1]

    def _batches(self, config: Config) -> Iterator[Batch]:
        epochs = self.problem.epochs(config.batch_size)
        stream = training.batches(
            *self._data().train, batch_size=config.batch_size, epochs=epochs, seed=config.seed
        )
        augment = self.problem.augment
        rng = np.random.default_rng([config.seed, 1])
        for inputs, targets in stream:
            batch = Batch(inputs, targets)
            yield batch if augment is None else augment(batch, rng)


def compare(
    comparison: Comparison,
    rows: Iterable[Method],
    batch_sizes: Iterable[int],
    seeds: Sequence[int],
) -> list[Outcome]:
    """All methods at all batch sizes. If nothing may be trained, what lacks runs is left out."""
    outcomes = []
    for batch_size, method in itertools.product(batch_sizes, rows):
        try:
            outcomes.append(comparison.tune(method, batch_size, seeds))
        except MissingError:
            continue
    return outcomes


def network(model: Any, seed: int, inputs: Any) -> Backbone:
    """A linen module with a head as a backbone that keeps the head's parameters.

    Args:
      model: has a method `features` and a dense layer `head`.
      seed: of its initialization.
      inputs: sets the shapes.
    """
    variables = model.init(jax.random.key(seed), np.asarray(inputs, np.float32))
    return cfll.flax.backbone(model, variables, method="features")


def measurement(metric: str, outputs: Callable[..., jax.Array]) -> Callable[[State, Batch], float]:
    """A state's mean squared error (over samples and outputs), or its accuracy, in chunks."""

    @jax.jit
    def total(state: State, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        predicted = outputs(state, inputs)
        if metric == "MSE":
            return ((predicted - targets) ** 2).sum()
        return (predicted.argmax(axis=-1) == targets.argmax(axis=-1)).sum()

    def measure(state: State, batch: Batch) -> float:
        size = training.chunk_size(batch.targets)
        starts = range(0, len(batch.inputs), size)
        sums = [
            float(total(state, batch.inputs[i : i + size], batch.targets[i : i + size]))
            for i in starts
        ]
        count = batch.targets.size if metric == "MSE" else len(batch.targets)
        return sum(sums) / count

    return measure


def label_of(config: Config) -> str:
    """A run on one line."""
    method = config.method
    strength = "" if config.strength is None else f"{method.strength} {config.strength:g}"
    return (
        f"B {config.batch_size:<5} {method.optimizer:<5}{method.name:<26} "
        f"rate {config.rate:<7g} {strength:<11} seed {config.seed}"
    )


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


def _nearest(values: Sequence[float], value: float) -> int:
    return int(np.argmin(np.abs(np.log(values) - math.log(value))))


def _number(value: float | None, worst: float) -> float:
    return worst if value is None else value
