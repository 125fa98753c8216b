"""Runs of both methods, tuned alike: from the records, or trained and added to them."""

import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cfll
from benchmarks.core import training
from benchmarks.core.optimizers import cosine_decay
from benchmarks.core.records import Record
from benchmarks.core.runner import MissingError, Runner
from benchmarks.core.search import descend, search
from benchmarks.core.tuner import PENALTIES, RATES, Tuner, Values
from benchmarks.tasks.dfiv import (
    Design,
    Size,
    batches,
    load,
    make_networks,
    with_running_statistics,
)
from cfll import iv

PROXIMAL, PROXIMAL_1, ORIGINAL = "DFIV proximal", "DFIV proximal, lam12 = 1", "DFIV"
PROXIMAL_17 = "DFIV proximal, Eq. (17)"
# With rates that decay on a cosine, as the paper's are not; and where the networks of stage 2 train
# with the running statistics of their batch norms.
PROXIMAL_DECAY, ORIGINAL_DECAY = f"{PROXIMAL_17}, decay", f"{ORIGINAL}, decay"
PROXIMAL_RUNNING = f"{PROXIMAL_DECAY}, running statistics"
PAPERS = (PROXIMAL_17, PROXIMAL, PROXIMAL_1, ORIGINAL)  # of the figure
DECAYING = (PROXIMAL_DECAY, ORIGINAL_DECAY, PROXIMAL_RUNNING)
METHODS = (*PAPERS, *DECAYING)  # of the tables
ORDERS = (PROXIMAL_17, PROXIMAL)  # of which the paper's sentences are decided

# The library's default, the order of Eq. (17), and the paper's Algorithm 3, which descends first;
# with the paper's lam12, and with one that small batches like better.
VARIANTS: dict[str, dict[str, Any]] = {
    PROXIMAL_17: {"lam12": 1.0, "order": "solve-then-descend"},
    PROXIMAL: {"lam12": 1e-4, "order": "descend-then-solve"},
    PROXIMAL_1: {"lam12": 1.0, "order": "descend-then-solve"},
}
VARIANTS |= dict.fromkeys((PROXIMAL_DECAY, PROXIMAL_RUNNING), VARIANTS[PROXIMAL_17])
# The paper's, taken per sample as in the code of Xu et al.: beta = 0.01 n on a sum. Read as 0.01 on
# the sum, the refitted heads overfit the confounder; those errors are recorded, too.
REFIT_BETA = 0.01
STAGE1_STEPS = 20  # updates of stage 1 in a round
WINDOW = 5  # measurements that a reported or compared error is the mean of, as in the paper's plots
NUM_MEASUREMENTS = 15

# Rate and penalties where a search may start: it walks on from the best of them. The errors have
# more than one valley.
STARTS = ((1e-3, 100.0, 100.0), (3e-3, 100.0, 1000.0), (3e-3, 10.0, 10.0))
# One seed is noisy here: the best few are run on all seeds, and the best mean is taken.
TUNER = Tuner(descend, RATES, {"beta": PENALTIES}, num_finalists=3, final_seeds=3)
# All three together, with costs that are means of two seeds: of the rows with decay.
JOINTLY = TUNER._replace(search=partial(search, at_most=36), search_seeds=2)
STARTS_OF_DECAY = ((3e-3, 100.0, 1000.0), (3e-2, 100.0, 100.0), (1e-1, 100.0, 100.0))

MEASURED = (
    "validation_refitted",
    "validation_current",
    "test_refitted",
    "test_current",
    "test_refitted_on_sum",
)


class Config(NamedTuple):
    """One run. Penalties are lam1 and lam2 of proximal, beta1 and beta2 of the original."""

    method: str
    batch_size: int
    rate: float
    penalty1: float
    penalty2: float
    seed: int

    @property
    def label(self) -> str:
        """A run on one line."""
        return (
            f"B {self.batch_size:<5} {self.method:<13} rate {self.rate:<7g} penalties "
            f"{self.penalty1:g}, {self.penalty2:g} seed {self.seed}"
        )


class Best(NamedTuple):
    """A method at one batch size with its best hyperparameters; errors are (seeds, points)."""

    config: Config
    rounds: list[int]
    refitted: np.ndarray
    current: np.ndarray
    refitted_on_sum: np.ndarray

    def last(self, name: str) -> np.ndarray:
        """The last errors, one per seed: means over the last measurements; see `window_of`."""
        return getattr(self, name)[:, -window_of(self.config.method) :].mean(axis=1)


def window_of(method: str) -> int:
    """How many measurements an error is the mean of: the last alone where rates have decayed."""
    return 1 if method in DECAYING else WINDOW


def make_method(networks: iv.Networks, name: str, hyper: Any, rounds: int = 1) -> iv.IVMethod:
    """A method of `cfll.iv` from (rate, penalty of stage 1, penalty of stage 2), all traceable.

    The rounds of the run matter to rates that decay.
    """
    rate, penalty1, penalty2 = hyper
    rates = rate, rate
    if name in DECAYING:
        rates = cosine_decay(rate, rounds), cosine_decay(rate, rounds * STAGE1_STEPS)
    optimizers: dict[str, Any] = {
        "treatment_optimizer": optax.adam(rates[0]),
        "instrument_optimizer": optax.adam(rates[1]),
        "stage1_steps": STAGE1_STEPS,
    }
    if name in VARIANTS:
        return iv.proximal(networks, **optimizers, lam1=penalty1, lam2=penalty2, **VARIANTS[name])
    return iv.original(networks, **optimizers, beta1=penalty1, beta2=penalty2)


class Runs:
    """Runs of one design.

    Args:
      design: which data.
      size: of the preset.
      runner: of finished runs.
      file: the official dSprites file; hearts are rendered if absent.
    """

    def __init__(self, design: Design, size: Size, runner: Runner, file: Path | None = None):
        self.design, self.size, self.runner, self.file = design, size, runner, file
        self._compiled: tuple[Any, Any] | None = None

    def key(self, config: Config) -> Record:
        """All that determines a run."""
        return {
            "experiment": "dfiv",
            "design": self.design,
            "hearts": "official" if self.file else "rendered",
            "num_train": self.size.num_train,
            "rounds": self.size.rounds,
            "width_factor": self.size.width_factor,
            "optimizer": "adam",
            "refit_beta_per_sample": REFIT_BETA,
            **config._asdict(),
        }

    def tune(self, method: str, batch_size: int, tuned_by: Tuner | None = None) -> Best:
        """Search by the last validation errors of refitted heads."""

        def config(values: Values, seed: int) -> Config:
            rate, penalty1, penalty2 = values
            return Config(method, batch_size, rate, penalty1, penalty2, seed)

        def cost(values: Values, seed: int) -> float:
            record = self.run(config(values, seed))
            errors = record["validation_refitted"][-window_of(method) :]
            return math.inf if None in errors else float(np.mean(errors))

        by, starts = (JOINTLY, STARTS_OF_DECAY) if method in DECAYING else (TUNER, STARTS)
        by = tuned_by or by
        found = by.tune(cost, by.axes("beta", "beta"), starts, self.size.seeds)
        configs = [config(found.best, seed) for seed in self.size.seeds]
        records = [self.run(config) for config in configs]

        def curves(name: str) -> np.ndarray:
            return np.array([[math.inf if x is None else x for x in r[name]] for r in records])

        return Best(
            configs[0],
            records[0]["rounds"],
            curves("test_refitted"),
            curves("test_current"),
            curves("test_refitted_on_sum"),
        )

    def run(self, config: Config) -> Record:
        """One run."""

        def says(record: Record) -> str:
            pair = (record["test_refitted"][-1], record["test_current"][-1])
            return "MSE " + ", ".join("diverged" if x is None else f"{x:.3g}" for x in pair)

        return self.runner.run(self.key(config), partial(self._trained, config), config.label, says)

    def _trained(self, config: Config) -> Record:
        task = load(self.design, self.size.num_train, config.seed, self.file)
        networks = make_networks(self.design, self.size.width_factor, config.seed, task.train)
        if config.method == PROXIMAL_RUNNING:
            networks = with_running_statistics(networks)
        hyper = jnp.array([config.rate, config.penalty1, config.penalty2], jnp.float32)
        step, evaluate = self._functions(config, networks)
        state = self._method(config, networks, hyper).init(
            jax.tree.map(lambda a: a[:2], task.train)
        )

        def measure(state: iv.IVState) -> tuple[float, ...]:
            errors = evaluate(state, task.train, task.validation, task.test)
            return tuple(float(error) for error in errors)

        self.runner.progress.start(config.label, self.size.rounds)
        state, curve = training.train(
            partial(step, hyper),
            state,
            batches(task.train, config.batch_size, self.size.rounds, config.seed),
            error=measure,
            measure_at=training.marks(self.size.rounds, NUM_MEASUREMENTS),
            on_step=self.runner.progress.step,
        )
        errors = [(None,) * len(MEASURED) if isinstance(e, float) else e for e in curve.errors]
        return {
            "rounds": curve.steps,
            **dict(zip(MEASURED, map(list, zip(*errors, strict=True)), strict=True)),
            "seconds_per_round": curve.seconds_per_step,
            "skipped_heads": int(state.stage1.info.skipped + state.stage2.info.skipped),
        }

    def _method(self, config: Config, networks: iv.Networks, hyper: Any) -> iv.IVMethod:
        return make_method(networks, config.method, hyper, self.size.rounds)

    def _functions(self, config: Config, networks: iv.Networks) -> tuple[Any, Any]:
        """Round and evaluation, compiled once per method and batch size."""
        tag = (config.method, config.batch_size)
        if self._compiled is None or self._compiled[0] != tag:

            def step(hyper, state, batch1, batch2):
                method = self._method(config, networks, hyper)
                state, losses = method.round(state, batch1, batch2)
                return state, losses[1]

            self._compiled = (tag, (jax.jit(step), jax.jit(partial(evaluate, networks))))
        return self._compiled[1]


def evaluate(
    networks: iv.Networks, state: iv.IVState, data: iv.IVBatch, validation: Any, test: Any
) -> tuple[jax.Array, ...]:
    """The errors `MEASURED`, in squared units of the outcome."""
    n = len(data.outcome)
    refitted = iv.refit(networks, state, [data], [data], REFIT_BETA * n).stage2
    on_sum = iv.refit(networks, state, [data], [data], REFIT_BETA).stage2

    def error(grid: Any, head: cfll.LinearHead) -> jax.Array:
        covariate = getattr(grid, "covariate", None)
        predicted = iv.predict(networks, state, grid.treatment, covariate, stage2=head)
        return jnp.mean(jnp.square(predicted - grid.structural))

    pairs = (
        (validation, refitted),
        (validation, state.stage2.anchor),
        (test, refitted),
        (test, state.stage2.anchor),
        (test, on_sum),
    )
    return tuple(error(grid, head) for grid, head in pairs)


def tune_all(runs: Runs, method_names: tuple[str, ...]) -> list[Best]:
    """These methods at all batch sizes; those with missing runs are left out."""
    found = []
    for batch_size in runs.size.batch_sizes:
        for method in method_names:
            with suppress(MissingError):
                found.append(runs.tune(method, batch_size))
    return found
