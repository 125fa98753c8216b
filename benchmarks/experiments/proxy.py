"""proxy: deep feature proxy variables (DFPV), original and proximal, against published errors.

The data of Xu et al. (2021) at the sizes at which Kompa et al. (2022)
compared their method with it; both methods are tuned alike, on other seeds than the table's.
"""

import contextlib
import functools
import itertools
import math
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cfll.flax
from benchmarks.core.records import Record, Records
from benchmarks.core.runner import MissingError, Runner, running
from benchmarks.core.search import Point, descend, finalists
from benchmarks.data import proxy as data
from benchmarks.experiments import Experiment
from benchmarks.models import proxy as models
from benchmarks.reporting.summary import Claim, Summary, Table, show
from cfll import iv

Preset = Literal["small", "cpu"]
Design = Literal["demand", "dsprites"]
PROXIMAL, ORIGINAL, AS_PUBLISHED = "DFPV proximal", "DFPV, tuned", "DFPV, settings of its code"
METHODS = (PROXIMAL, ORIGINAL, AS_PUBLISHED)

BATCH_SIZES = (64, 256, 0)  # 0 is all of a half
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LAMS, BETAS = (1.0, 10.0, 100.0, 1e3, 1e4), (1e-3, 1e-2, 0.1, 1.0, 10.0)  # betas per sample
STARTS = {"demand": ((0, 1, 2, 2), (0, 0, 2, 2), (0, 0, 4, 1)), "dsprites": ((0, 1, 2, 2),)}
AT_MOST = 16  # points from each start, with raw and with standardized data
FINALISTS = 3  # points of the smallest N that are run at every N
# The heads that may be judged: the current ones, or ridge with this beta per sample on the halves.
EVALUATIONS = (None, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
REFITTED, CURRENT = "", ", current heads"
HEADS = {REFITTED: range(1, len(EVALUATIONS)), CURRENT: range(1)}  # which of `EVALUATIONS`
LAM12 = 1.0
CAPTIONS = (
    "Squared error of f, median (quartiles) over seeds, in squared units of y.",
    "Rate; lam1, lam2 or beta1, beta2; heads, and their beta per sample; batch size; data.",
)
CODE_RATE, CODE_PENALTY, CODE_DECAY = 1e-3, 0.1, 0.1  # the latter two per sample


class Size(NamedTuple):
    """A preset: numbers of observations, rounds, seeds of the search and of the table, widths."""

    num_train: tuple[int, ...]
    rounds: int
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    width_factor: float = 1.0


TUNING = tuple(range(100, 108))
SIZES: dict[tuple[str, str], Size] = {
    ("demand", "small"): Size((1000,), 100, TUNING[:5], tuple(range(5))),
    ("demand", "cpu"): Size((1000, 5000, 10_000), 100, TUNING, tuple(range(20))),
    ("dsprites", "small"): Size((1000,), 20, TUNING[:3], tuple(range(3)), 0.125),
    ("dsprites", "cpu"): Size((1000, 5000), 20, TUNING[:3], tuple(range(5)), 0.25),
}


class Config(NamedTuple):
    """One run. Penalties are lam1 and lam2 of proximal, beta1 and beta2 of the original."""

    method: str
    num_train: int
    batch_size: int
    scaled: bool
    rate: float
    penalty1: float
    penalty2: float
    seed: int


class Outcome(NamedTuple):
    """A row with its best settings: which of `EVALUATIONS`, and errors (seeds,)."""

    config: Config
    evaluation: int
    errors: np.ndarray


rows_of = jax.jit(lambda batch, rows: jax.tree.map(lambda array: array[rows], batch))
initialized = jax.jit(lambda module, key, x: module.init(key, x, train=False), static_argnums=0)


class Task(NamedTuple):
    """Both halves as batches, all outcome proxies, the grid, and the unit of its outcomes."""

    halves: tuple[iv.IVBatch, ...]
    outcome_proxy: jax.Array
    test: data.Grid
    outcome_scale: float


@functools.lru_cache(maxsize=4)
def load(design: Design, num_train: int, seed: int, scaled: bool) -> Task:
    """The data of one seed, on the device."""
    if design == "demand":
        drawn = data.make_demand(num_train, seed)
    else:
        drawn = data.make_dsprites(num_train, seed, data.dsprites.render_hearts())
    drawn, scale = data.standardize(drawn) if scaled else (drawn, 1.0)
    batch = iv.proxy.batch(**jax.tree.map(jnp.asarray, drawn.train._asdict()))
    halves = np.array_split(np.random.default_rng(seed).permutation(num_train), 2)
    rows = tuple(rows_of(batch, half) for half in halves)
    return Task(rows, batch.treatment, jax.tree.map(jnp.asarray, drawn.test), scale)


def make_networks(design: Design, width_factor: float, seed: int, batch: iv.IVBatch) -> iv.Networks:
    """Published networks, initialized."""
    a, z = batch.instrument
    inputs = {"treatment1": a, "treatment_proxy": z, "outcome_proxy": batch.treatment}
    backbones = {}
    for index, (name, module) in enumerate(models.modules(design, width_factor).items()):
        key = jax.random.fold_in(jax.random.key(seed), index)
        variables = initialized(module, key, inputs.get(name, a)[:2])
        backbones[name] = cfll.flax.backbone(module, variables)
    return iv.proxy.networks(**backbones)


def make_method(networks: iv.Networks, name: str, hyper: Any) -> iv.IVMethod:
    """A method from (rate, penalty 1, penalty 2, weight decay), all traceable."""
    rate, penalty1, penalty2, decay = hyper
    adam = optax.chain(optax.add_decayed_weights(decay), optax.adam(rate))
    optimizers: dict[str, Any] = {"treatment_optimizer": adam, "instrument_optimizer": adam}
    if name == PROXIMAL:
        return iv.proximal(networks, **optimizers, lam1=penalty1, lam2=penalty2, lam12=LAM12)
    return iv.original(networks, **optimizers, beta1=penalty1, beta2=penalty2)


def evaluate(networks: iv.Networks, state: iv.IVState, task: Task) -> jax.Array:
    """Errors with the heads `EVALUATIONS`, in squared units of the outcome."""
    first, second = task.halves

    def error(head: cfll.LinearHead | None) -> jax.Array:
        grid, w = task.test, task.outcome_proxy
        predicted = iv.proxy.predict(networks, state, grid.treatment, w, stage2=head)
        return task.outcome_scale**2 * jnp.mean(jnp.square(predicted - grid.structural))

    def refitted(beta: jax.Array) -> jax.Array:
        return error(iv.refit(networks, state, [first], [second], beta).stage2)

    betas = jnp.array(EVALUATIONS[1:]) * len(second.outcome)
    return jnp.concatenate([error(None)[None], jax.lax.map(refitted, betas)])


def errors_of(record: Record) -> list[float]:
    """Errors of a run, infinite where it diverged."""
    return [math.inf if error is None else error for error in record["errors"]]


class Runs:
    """Runs of one design."""

    def __init__(self, design: Design, size: Size, runner: Runner):
        self.design, self.size, self.runner = design, size, runner
        self._compiled: dict[str, tuple[Any, ...]] = {}

    def outcomes(self) -> dict[tuple[str, int], Outcome]:
        """All rows at all sizes; those with missing runs are left out."""
        found = {}
        for n, method, heads in itertools.product(self.size.num_train, METHODS, HEADS):
            with contextlib.suppress(MissingError):
                found[method + heads, n] = self._outcome(method, heads, n)
        return found

    def _outcome(self, method: str, heads: str, num_train: int) -> Outcome:
        if method == AS_PUBLISHED:
            penalty = CODE_PENALTY * (num_train // 2)
            best = Config(method, num_train, 0, False, CODE_RATE, penalty, penalty, 0)
            evaluation = EVALUATIONS.index(CODE_PENALTY if heads == REFITTED else None)
        else:
            best, evaluation = self._tune(method, HEADS[heads], num_train)
        errors = [errors_of(self.run(best._replace(seed=seed))) for seed in self.size.seeds]
        return Outcome(best, evaluation, np.array(errors)[:, evaluation])

    def _tune(self, method: str, heads: range, num_train: int) -> tuple[Config, int]:
        """Search at the smallest size, finalists at this one: the settings, and which heads."""
        penalties = LAMS if method == PROXIMAL else BETAS
        axes: tuple[Any, ...] = (BATCH_SIZES, RATES, penalties, penalties)

        def config(n: int, scaled: int, *point: int) -> Config:
            size, rate, *two = (axis[i] for axis, i in zip(axes, point, strict=True))
            one, other = (x * (1 if method == PROXIMAL else size or n // 2) for x in two)
            return Config(method, n, size, bool(scaled), rate, one, other, 0)

        def costs(point: Point, n: int) -> np.ndarray:
            seeds = self.size.tuning_seeds
            runs = [self.run(config(n, *point)._replace(seed=seed)) for seed in seeds]
            return np.exp(np.mean(np.log([errors_of(run) for run in runs]), axis=0))[heads]

        def searched(scaled: int, point: Point) -> float:
            return float(costs((scaled, *point), self.size.num_train[0]).min())

        tried: dict[Point, float] = {}
        scalings = (0, 1) if self.design == "demand" else (0,)
        for start, scaled in itertools.product(STARTS[self.design], scalings):
            cost = functools.partial(searched, scaled)
            found = descend(cost, start, list(map(len, axes)), AT_MOST)
            tried |= {(scaled, *point): found[point] for point in found}
        best = finalists(tried, FINALISTS)
        means = np.array([costs(point, num_train) for point in best])
        which, head = np.unravel_index(np.argmin(means), means.shape)
        return config(num_train, *best[which]), heads[int(head)]

    def run(self, config: Config) -> Record:
        """One run."""
        key: Record = {"experiment": "proxy", "design": self.design, "evaluations": EVALUATIONS}
        key |= {"rounds": self.size.rounds, "width_factor": self.size.width_factor}
        key |= config._asdict()
        return self.runner.run(
            key,
            functools.partial(self._trained, config),
            " ".join(map(str, config)),
            lambda record: str(np.round(errors_of(record), 1)),
        )

    def _trained(self, config: Config) -> Record:
        task = load(self.design, config.num_train, config.seed, config.scaled)
        networks = make_networks(self.design, self.size.width_factor, config.seed, task.halves[0])
        if config.method not in self._compiled:  # for every seed: networks differ in values only

            def step(hyper, state, batches):
                return make_method(networks, config.method, hyper).round(state, *batches)

            self._compiled[config.method] = (
                jax.jit(step),
                jax.jit(functools.partial(evaluate, networks)),
            )
        step, measure = self._compiled[config.method]
        half = len(task.halves[1].outcome)
        decay = CODE_DECAY / half if config.method == AS_PUBLISHED else 0.0
        hyper = jnp.array([config.rate, config.penalty1, config.penalty2, decay], jnp.float32)
        state = make_method(networks, config.method, hyper).init(task.halves[0])
        rng, seconds = np.random.default_rng(config.seed), []
        for _ in range(self.size.rounds):
            start, batches = time.perf_counter(), task.halves
            if 0 < config.batch_size < half:
                chosen = [rng.permutation(half)[: config.batch_size] for _ in batches]
                batches = tuple(map(rows_of, batches, chosen))
            state, losses = step(hyper, state, batches)
            self.runner.progress.step(float(losses[1]))  # waits for the step
            seconds.append(time.perf_counter() - start)
        errors = [float(error) for error in measure(state, task)]
        return {
            "errors": [error if math.isfinite(error) else None for error in errors],
            "seconds_per_round": float(np.median(seconds[2:] or seconds)),
            "skipped_heads": int(state.stage1.info.skipped + state.stage2.info.skipped),
        }


def quartiles(errors: Any) -> str:
    """Median (quartiles); of three numbers, those; of one, it alone."""
    low, median, high = np.percentile(errors, (25, 50, 75) if len(errors) > 3 else (0, 50, 100))
    return f"{median:.3g}" + (f" ({low:.3g} to {high:.3g})" if len(errors) > 1 else "")


def settings(outcome: Outcome) -> str:
    """What a search chose."""
    config, beta = outcome.config, EVALUATIONS[outcome.evaluation]
    heads = "current" if beta is None else f"refit {beta:g}"
    size, inputs = config.batch_size or "half", "standardized" if config.scaled else "raw"
    return f"{config.rate:g}; {config.penalty1:g}, {config.penalty2:g}; {heads}; {size}; {inputs}"


def summarize(records: Records, figures: Path, preset: str, design: Design = "demand") -> Summary:
    """Tables and claims, from the records."""
    return summary_of(Runs(design, SIZES[design, preset], Runner(records, make=False)), preset)


def summary_of(runs: Runs, preset: str) -> Summary:
    """Tables and claims of all runs."""
    design, size, found = runs.design, runs.size, runs.outcomes()
    rows = [method + heads for method in METHODS for heads in HEADS]
    sizes = [n for n in size.num_train if all((row, n) in found for row in rows)]
    published = data.PUBLISHED if design == "demand" and sizes else {}
    errors, chosen = [], []
    for row in rows if sizes else ():
        outcomes = [found[row, n] for n in sizes]
        chosen.append((row, *map(settings, outcomes)))
        errors.append((row, *(quartiles(outcome.errors) for outcome in outcomes)))
    medians = {row: {n: float(np.median(found[row, n].errors)) for n in sizes} for row in rows}
    for name, theirs in published.items():
        errors.append((f"{name}, published", *(quartiles(theirs[n]) for n in sizes)))
        medians[f"{name} as published"] = {n: float(np.median(theirs[n])) for n in sizes}

    def claim(row: str, other: str) -> Claim:
        pairs = {n: (medians[row][n], medians[other][n]) for n in sizes}
        return Claim(
            f"The median error of {row} is at or below that of {other}.",
            all(ours <= their for ours, their in pairs.values()),
            "; ".join(f"N = {n}: {x:.3g} against {y:.3g}" for n, (x, y) in pairs.items()),
        )

    current = PROXIMAL + CURRENT
    pairs = [(PROXIMAL, other) for other in medians if other not in (PROXIMAL, *rows[1::2])]
    pairs += [(current, PROXIMAL), (current, ORIGINAL + CURRENT)]
    pairs += [(row, "DFPV as published") for row in (current, *METHODS[1:])]
    headings = ("", *(f"N = {n}" for n in sizes))
    return Summary(
        title=f"Deep feature proxy variables: {design}",
        command=f"python -m benchmarks proxy --design {design} --preset {preset}",
        setup=f"{data.SETUPS[design].format(size.width_factor)} Half of the observations for each "
        f"stage, {size.rounds} rounds of 20 and 1 updates, Adam. {AS_PUBLISHED}: rate "
        f"{CODE_RATE:g}, beta = {CODE_PENALTY:g} n, weight decay, full batch, raw data. The others "
        "are tuned alike: batch size, rate and penalties along one axis after the other, at most "
        f"{AT_MOST} points from each of {len(STARTS[design])} starts, raw and standardized data "
        "(images: raw), for refitted heads and again for current ones, by the geometric mean error "
        f"to the truth over {len(size.tuning_seeds)} seeds at the smallest N; the best {FINALISTS} "
        f"run at every N. The table has {len(size.seeds)} other seeds. Published methods were not "
        f"tuned so. lam12 = {LAM12:g}.",
        tables=list(map(Table, CAPTIONS, [headings] * 2, map(tuple, (errors, chosen)))),
        claims=[claim(*pair) for pair in pairs if sizes and pair[1] in medians],
        figures=[],
        reasons=data.REASONS[design] if sizes and preset == RECORDED[design] else "",
    )


def proxy(
    design: Design = "demand", preset: Preset = "small", out: Path = Path("benchmarks/out/proxy")
) -> None:
    """Deep feature proxy variables with proximal and with ridge heads; goes on where it stopped.

    Args:
      design: "demand", or "dsprites" with hearts rendered by us.
      preset: "small": minutes on two cores (images: most of an hour); "cpu": an hour.
      out: folder of finished runs.
    """
    size = SIZES[design, preset]
    with running(out, "proxy", 200 * len(size.num_train)) as runner:  # about
        found = summary_of(Runs(design, size, runner), preset)
    show(found)


RECORDED: dict[Design, Preset] = {"demand": "cpu", "dsprites": "small"}
EXPERIMENTS = tuple(
    Experiment(proxy, functools.partial(summarize, design=design), place, presets=(preset,))
    for place, (design, preset) in enumerate(RECORDED.items(), start=33)
)
