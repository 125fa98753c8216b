"""quickstart: what does a closed-form head add to the optimizer you already use?

A Fourier neural operator learns Burgers' equation with SGD, Adam and Muon, each with a head trained
by gradients like any other layer, and with a head in closed form. The four functions `*_step` are
the whole difference, and an example of how to use the library: read them first.

Top of the benchmarks: one experiment, one command, everything below is shared.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import cfll
from benchmarks import plots
from benchmarks.data import burgers
from benchmarks.models.fno import FNO1d
from benchmarks.optimizers import OPTIMIZERS, cosine_decay
from benchmarks.progress import SweepProgress
from benchmarks.records import Records, load_params, name_of, save_params
from benchmarks.training import batches, evaluator, first_at_or_below, train

MODEL = FNO1d()

# Training steps -----------------------------------------------------------------------------------
#
# state = (params, opt_state); inputs (batch, points, 2); targets (batch, points, 1). Every grid
# point is a sample to the head. `tx` is the optimizer, for the last three wrapped by
# `cfll.closed_form(optimizer, rule, head="head")`.

State = tuple[Any, Any]


def predict(params: Any, inputs: jax.Array) -> jax.Array:
    """What the network says, (batch, points, 1)."""
    outputs: Any = MODEL.apply({"params": params}, inputs)
    return outputs


def features_of(params: Any, inputs: jax.Array) -> jax.Array:
    """What the head sees, (batch, points, d)."""
    features: Any = MODEL.apply({"params": params}, inputs, method="features")
    return features


def squared_loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over samples, sum over outputs."""
    return jnp.mean(jnp.sum(jnp.square(predict(params, inputs) - targets), axis=-1))


def gradient_step(
    tx: optax.GradientTransformation, state: State, inputs: jax.Array, targets: jax.Array
) -> tuple[State, jax.Array]:
    """The baseline: the optimizer trains all layers."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(squared_loss)(params, inputs, targets)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def proximal_step(
    lam: float,
    tx: optax.GradientTransformationExtraArgs,
    state: State,
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[State, jax.Array]:
    """Eq. (17): solve for the head in the forward pass, then move the backbone to suit it."""
    params, opt_state = state
    anchor = optax.tree.get(opt_state, "anchor")

    def loss_and_head(params: Any) -> tuple[jax.Array, cfll.LinearHead]:
        return cfll.prox_loss(features_of(params, inputs), targets, anchor, lam)

    (loss, head), grads = jax.value_and_grad(loss_and_head, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, targets=targets, solution=head)
    return (optax.apply_updates(params, updates), opt_state), loss


def ridge_step(
    beta: float,
    tx: optax.GradientTransformationExtraArgs,
    state: State,
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[State, jax.Array]:
    """Eq. (9): the same with a head that forgets the batches before."""
    params, opt_state = state

    def loss_and_head(params: Any) -> tuple[jax.Array, cfll.LinearHead]:
        return cfll.ridge_loss(features_of(params, inputs), targets, beta)

    (loss, head), grads = jax.value_and_grad(loss_and_head, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, targets=targets, solution=head)
    return (optax.apply_updates(params, updates), opt_state), loss


def algorithm_1_step(
    tx: optax.GradientTransformationExtraArgs,
    state: State,
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[State, jax.Array]:
    """Algorithm 1: move the backbone with the old head, then solve on its new features."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(squared_loss)(params, inputs, targets)
    updates, opt_state = tx.update(
        grads, opt_state, params, targets=targets, feature_fn=lambda p: features_of(p, inputs)
    )
    return (optax.apply_updates(params, updates), opt_state), loss


# The experiment -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of the table."""

    optimizer: str
    head: str


GRADIENT, PROXIMAL = "gradient", "proximal"
ALGORITHM_1, RIDGE = "proximal, Alg. 1", "ridge"

ROWS = (
    *(Row(optimizer, head) for optimizer in OPTIMIZERS for head in (GRADIENT, PROXIMAL)),
    Row("Adam", ALGORITHM_1),
    Row("Adam", RIDGE),
)

# The same for every head. A row whose best rate is the smallest or largest tries the next one, a
# factor of two away, until the best lies between worse ones.
RATES = {
    "SGD": (0.07, 0.14, 0.28),
    "Adam": (0.0025, 0.005, 0.01),
    "Muon": (0.005, 0.01, 0.02),
}
RATES_AT_MOST = 8

BETA = 1.0  # of ridge; over 8192 samples (batch x grid points) it matters as little as lam


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that the rows share.

    Attributes:
      epochs, batch_size, lam, seeds: the options of the command.
      input_scaling, scaling: mean and standard deviation of the training inputs and targets, to
        return to original units.
      train, validation, test: inputs and targets, standardized by training statistics; the first
        two on 256 points, the test set on 8192.
      records: finished runs.
      out: the output folder.
    """

    epochs: int
    batch_size: int
    lam: float
    seeds: tuple[int, ...]
    input_scaling: tuple[float, float]
    scaling: tuple[float, float]
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    records: Records
    out: Path

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train[0]) // self.batch_size

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def key(self, row: Row, rate: float, seed: int, what: str = "training") -> dict[str, Any]:
        """All that determines a result; the name of a finished run."""
        return {
            "what": what,
            **row._asdict(),
            "rate": rate,
            "seed": seed,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lam": self.lam,
            "beta": BETA,
            "data": burgers.BurgersSettings()._asdict(),
            "model": _fields(MODEL),
            "cfll": cfll.__version__,
            "jax": jax.__version__,
        }

    def params_path(self, row: Row, rate: float, seed: int) -> Path:
        return self.out / "params" / f"{name_of(self.key(row, rate, seed))}.npz"


def _fields(model: FNO1d) -> dict[str, int]:
    names = ("width", "modes", "depth", "num_features", "num_outputs")
    return {name: getattr(model, name) for name in names}


def prepare(
    epochs: int, batch_size: int, lam: float, seeds: tuple[int, ...], out: Path
) -> Experiment:
    """Load the data and standardize them."""
    splits = burgers.load_burgers(out)
    mean_in, std_in = splits.train.initial.mean(), splits.train.initial.std()
    mean_out, std_out = splits.train.final.mean(), splits.train.final.std()

    def standardize(fields: burgers.Fields) -> tuple[np.ndarray, np.ndarray]:
        state = (fields.initial - mean_in) / std_in
        x = (burgers.grid(state.shape[1]) - np.pi) / (np.pi / math.sqrt(3))  # uniform: variance 1
        inputs = np.stack([state, np.broadcast_to(x, state.shape)], axis=-1)
        targets = (fields.final - mean_out) / std_out
        return inputs.astype(np.float32), targets[..., None].astype(np.float32)

    return Experiment(
        epochs=epochs,
        batch_size=batch_size,
        lam=lam,
        seeds=seeds,
        input_scaling=(float(mean_in), float(std_in)),
        scaling=(float(mean_out), float(std_out)),
        train=standardize(splits.train),
        validation=standardize(splits.validation),
        test=standardize(splits.test),
        records=Records(out / "runs.jsonl"),
        out=out,
    )


def transformation(
    row: Row, rate: jax.typing.ArrayLike, num_steps: jax.typing.ArrayLike, lam: float
) -> optax.GradientTransformation:
    """The optimizer of a row: on its own, or with a rule for the head."""
    optimizer = OPTIMIZERS[row.optimizer](cosine_decay(rate, num_steps))
    if row.head == GRADIENT:
        return optimizer
    rule = cfll.ridge(BETA) if row.head == RIDGE else cfll.prox(lam)
    return cfll.closed_form(optimizer, rule, head="head")


def initial_params(seed: int) -> Any:
    """The same for every row."""
    return MODEL.init(jax.random.key(seed), jnp.zeros((1, burgers.COARSE_POINTS, 2)))["params"]


def jitted_step(row: Row, lam: float) -> Callable[..., tuple[State, jax.Array]]:
    """(rate, num_steps, state, inputs, targets) -> (state, loss), compiled once for all runs."""
    steps: Mapping[str, Callable[..., tuple[State, jax.Array]]] = {
        GRADIENT: gradient_step,
        PROXIMAL: partial(proximal_step, lam),
        ALGORITHM_1: algorithm_1_step,
        RIDGE: partial(ridge_step, BETA),
    }

    @partial(jax.jit, donate_argnames="state")
    def step(rate, num_steps, state, inputs, targets):
        # Optax transformations are pairs of pure functions: made here, they may use a traced rate.
        tx = transformation(row, rate, num_steps, lam)
        return steps[row.head](tx, state, inputs, targets)

    return step


@cache
def mean_squared_error() -> Callable[[Any, np.ndarray, np.ndarray], float]:
    """(params, inputs, targets) -> error in standardized units; compiled once per grid."""
    return evaluator(predict)


def run(
    experiment: Experiment,
    row: Row,
    rate: float,
    seed: int,
    step: Callable[..., tuple[State, jax.Array]],
    progress: SweepProgress,
) -> dict[str, Any]:
    """Train once, or read what an earlier call has left; errors in original units."""
    key = experiment.key(row, rate, seed)
    params_path = experiment.params_path(row, rate, seed)
    record = experiment.records.get(key)
    label = (
        f"{row.optimizer:<4} {row.head:<16} rate {rate:<7.4g} seed {seed}  "
        f"{experiment.num_steps:>4} steps"
    )
    if record is None or not params_path.exists():
        progress.start(label, experiment.num_steps)
        variance = experiment.scaling[1] ** 2
        half_epoch = max(1, experiment.steps_per_epoch // 2)
        params = initial_params(seed)
        tx = transformation(row, rate, experiment.num_steps, experiment.lam)
        (params, _), curve = train(
            partial(step, rate, experiment.num_steps),
            (params, tx.init(params)),
            batches(
                *experiment.train,
                batch_size=experiment.batch_size,
                epochs=experiment.epochs,
                seed=seed,
            ),
            error=lambda state: variance * mean_squared_error()(state[0], *experiment.validation),
            measure_at={*range(half_epoch, experiment.num_steps, half_epoch), experiment.num_steps},
            on_step=progress.step,
        )
        save_params(params_path, params)
        record = curve._asdict()
        experiment.records.add(key, record)
        note = f"{1e3 * record['seconds_per_step']:.0f} ms/step"
    else:
        note = "from disk"
    error = record["errors"][-1]
    outcome = f"MSE {error:.2e}" if math.isfinite(error) else "diverged"
    progress.finish(f"{label}  {outcome:<12} {note}")
    return record


class Outcome(NamedTuple):
    """A row at its best rate.

    Attributes:
      row: which.
      rates: validation error (mean over seeds) of every rate tried.
      rate: the best of them.
      steps, errors: validation error on 256 points while training, errors of shape (seeds, steps).
      half_steps, half_errors: the same of runs with half the number of steps; empty if there were
        none.
      seconds_per_step: median over the seeds.
      test_errors: on 8192 points, one per seed.
    """

    row: Row
    rates: dict[float, float]
    rate: float
    steps: list[int]
    errors: np.ndarray
    half_steps: list[int]
    half_errors: np.ndarray
    seconds_per_step: float
    test_errors: list[float]


def outcome_of(
    experiment: Experiment, row: Row, to_match: float | None, progress: SweepProgress
) -> Outcome:
    """Find the best rate of a row, and test it.

    A run decays its rate to zero, and most of its progress comes with the decay: where it passes
    another run's last error says little about how many steps it needs. So a row that passes
    `to_match` only in its second half also gets runs of half the length.

    Args:
      experiment: what all rows share.
      row: which.
      to_match: the gradient head's last validation error with the same optimizer; None for itself.
      progress: told about every run.
    """
    step = jitted_step(row, experiment.lam)

    def runs(experiment: Experiment, rate: float) -> tuple[list[int], np.ndarray, float]:
        records = [run(experiment, row, rate, seed, step, progress) for seed in experiment.seeds]
        errors = np.array([record["errors"] for record in records])
        seconds = float(np.median([record["seconds_per_step"] for record in records]))
        return records[0]["steps"], errors, seconds

    swept = sweep(experiment, row, partial(runs, experiment), progress)
    last_errors = {rate: float(errors[:, -1].mean()) for rate, (_, errors, _) in swept.items()}
    best = min(last_errors, key=lambda rate: last_errors[rate])
    steps, errors, seconds = swept[best]

    half_steps: list[int] = []
    half_errors = np.zeros((len(experiment.seeds), 0))
    if to_match is not None and experiment.epochs > 1:
        matched = first_at_or_below(steps, errors.mean(axis=0), to_match)
        if matched is not None and matched > steps[-1] / 2:
            progress.plan_more(len(experiment.seeds))
            half = dataclasses.replace(experiment, epochs=experiment.epochs // 2)
            half_steps, half_errors, _ = runs(half, best)

    return Outcome(
        row=row,
        rates=dict(sorted(last_errors.items())),
        rate=best,
        steps=steps,
        errors=errors,
        half_steps=half_steps,
        half_errors=half_errors,
        seconds_per_step=seconds,
        test_errors=[test_error(experiment, row, best, seed) for seed in experiment.seeds],
    )


def sweep(
    experiment: Experiment,
    row: Row,
    runs: Callable[[float], tuple[list[int], np.ndarray, float]],
    progress: SweepProgress,
) -> dict[float, tuple[list[int], np.ndarray, float]]:
    """Run all rates of the grid, and further ones while the best is at the edge.

    The best rate is that of the least last validation error, averaged over the seeds.
    """
    done: dict[float, tuple[list[int], np.ndarray, float]] = {}
    todo = list(RATES[row.optimizer])
    while todo and len(done) < RATES_AT_MOST:
        for rate in todo:
            done[rate] = runs(rate)
        best = min(done, key=lambda rate: done[rate][1][:, -1].mean())
        todo = [r for r in (best / 2, best * 2) if not min(done) <= r <= max(done)]
        progress.plan_more(len(todo) * len(experiment.seeds))
    return done


def test_error(experiment: Experiment, row: Row, rate: float, seed: int) -> float:
    """Mean squared error on all 8192 points, in the units of u squared."""
    key = experiment.key(row, rate, seed, what="test")
    record = experiment.records.get(key)
    if record is None:
        params = load_params(experiment.params_path(row, rate, seed), like=initial_params(seed))
        error = experiment.scaling[1] ** 2 * mean_squared_error()(params, *experiment.test)
        record = {"test_mse": error}
        experiment.records.add(key, record)
    return record["test_mse"]


# What is shown ------------------------------------------------------------------------------------


def summarize(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """The numbers of the table, each row next to its optimizer's gradient head."""
    baselines = {o.row.optimizer: o for o in outcomes if o.row.head == GRADIENT}

    def numbers(outcome: Outcome) -> dict[str, Any]:
        baseline = baselines[outcome.row.optimizer]
        test_mse = float(np.mean(outcome.test_errors))
        to_match = float(baseline.errors[:, -1].mean())
        return {
            **outcome.row._asdict(),
            "test_mse": test_mse,
            "test_mse_per_seed": outcome.test_errors,
            "ratio_to_gradient": test_mse / float(np.mean(baseline.test_errors)),
            "num_steps": outcome.steps[-1],
            "steps_to_match": first_at_or_below(
                outcome.steps, outcome.errors.mean(axis=0), to_match
            ),
            "steps_to_match_in_half_run": first_at_or_below(
                outcome.half_steps, outcome.half_errors.mean(axis=0), to_match
            ),
            "seconds_per_step": outcome.seconds_per_step,
            "rate": outcome.rate,
            "validation_mse_per_rate": {
                str(rate): error if math.isfinite(error) else None
                for rate, error in outcome.rates.items()
            },
        }

    return [numbers(outcome) for outcome in outcomes]


HEADINGS = ("optimizer", "head", "test MSE", "ratio", "steps to match", "ms/step", "rate")


def cells(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the table as text."""
    whole, half = numbers["steps_to_match"], numbers["steps_to_match_in_half_run"]
    matched = f"{half} *" if half is not None else "never" if whole is None else f"{whole}"
    return (
        numbers["optimizer"],
        numbers["head"],
        f"{numbers['test_mse']:.2e}",
        f"{numbers['ratio_to_gradient']:.2f}",
        f"{matched} / {numbers['num_steps']}",
        f"{1e3 * numbers['seconds_per_step']:.1f}",
        f"{numbers['rate']:.4g}",
    )


def caption(experiment: Experiment) -> str:
    """What the numbers of the table are."""
    seeds = ", ".join(map(str, experiment.seeds))
    mean = " (means over them)" if len(experiment.seeds) > 1 else ""
    return (
        f"Burgers' equation, {experiment.epochs} epochs, batch {experiment.batch_size}, "
        f"lam {experiment.lam:g}, beta {BETA:g}, seeds {seeds}{mean}. All heads but 'gradient' are "
        "in closed form.\n"
        "test MSE: 400 samples on 8192 points, in units of u^2 (variance "
        f"{experiment.scaling[1] ** 2:.2f}).\n"
        "ratio: to the gradient head with the same optimizer, after as many steps.\n"
        "steps to match: until the validation error (256 points, twice an epoch) is at or below "
        "the gradient head's last; *: in a run of half the length, with its own decay.\n"
        "ms/step: median, compilation excluded. rate: the best by the last validation error."
    )


def show(console: Console, experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for index, numbers in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1]["optimizer"] != numbers["optimizer"]
        table.add_row(*cells(numbers), end_section=last)
    console.print(table)
    console.print(caption(experiment), highlight=False)


def write_results(experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    """The table as Markdown, the numbers behind it as JSON."""
    lines = [HEADINGS, ("---", "---", *["---:"] * (len(HEADINGS) - 2)), *map(cells, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"* {line}" for line in caption(experiment).splitlines())
    (experiment.out / "results.md").write_text(f"{table}\n\n{notes}\n")
    results = {
        "epochs": experiment.epochs,
        "batch_size": experiment.batch_size,
        "lam": experiment.lam,
        "beta": BETA,
        "seeds": experiment.seeds,
        "versions": {"cfll": cfll.__version__, "jax": jax.__version__, "optax": optax.__version__},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "rows": rows,
    }
    (experiment.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def draw(experiment: Experiment, outcomes: list[Outcome]) -> None:
    """Both figures."""
    panels: dict[str, dict[str, tuple[list[int], np.ndarray]]] = {name: {} for name in OPTIMIZERS}
    for outcome in outcomes:
        curves = panels[outcome.row.optimizer]
        curves[outcome.row.head] = (outcome.steps, outcome.errors)
        if outcome.row.head == PROXIMAL and outcome.half_steps:
            curves[f"{PROXIMAL}, half the steps"] = (outcome.half_steps, outcome.half_errors)
    plots.learning_curves(panels, path=experiment.out / "curves.png", baseline=GRADIENT)

    # An ordinary sample: that of median steepness, chosen by the data and not by a model's error.
    inputs, targets = experiment.test
    steepness = np.abs(np.diff(targets[..., 0], axis=1)).max(axis=1)
    sample = int(np.argsort(steepness)[len(steepness) // 2])
    mean, std = experiment.scaling
    seed = experiment.seeds[0]

    def prediction(outcome: Outcome) -> np.ndarray:
        path = experiment.params_path(outcome.row, outcome.rate, seed)
        params = load_params(path, like=initial_params(seed))
        return mean + std * np.asarray(predict(params, jnp.asarray(inputs[[sample]])))[0, :, 0]

    optimizer = list(OPTIMIZERS)[-1]
    plots.prediction(
        burgers.grid(burgers.FINE_POINTS),
        initial=experiment.input_scaling[0] + experiment.input_scaling[1] * inputs[sample, :, 0],
        truth=mean + std * targets[sample, :, 0],
        predictions={
            f"{optimizer}, {head} head": prediction(outcome)
            for outcome in outcomes
            for head in (GRADIENT, PROXIMAL)
            if outcome.row == Row(optimizer, head)
        },
        path=experiment.out / "prediction.png",
        title="Burgers' equation on 8192 points: the test sample of median steepness",
    )


def quickstart(
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    repeats: int = 1,
    lam: float = 10.0,
    out: Path = Path("benchmarks/out/quickstart"),
) -> None:
    """Train an operator network with SGD, Adam and Muon, with and without a closed-form head.

    Generates Burgers data, sweeps the learning rate of every row on validation data and prints a
    table: test error, steps to the gradient head's error, time per step. Under five minutes on two
    CPU cores. Stop it when you like; the same command goes on where it stopped.

    Args:
      epochs: passes over the 1448 training samples, the same for every row.
      batch_size: samples per step; the head is solved on batch size x 256 grid points.
      seed: of initialization and shuffling.
      repeats: number of seeds, counted from the first; results are means over them.
      lam: the proximal coefficient of the closed-form heads, not tuned: 1 to 100 all do.
      out: folder of results, figures, finished runs and generated data.
    """
    start = time.perf_counter()
    console = Console()
    experiment = prepare(epochs, batch_size, lam, tuple(range(seed, seed + repeats)), out)
    planned = sum(len(RATES[row.optimizer]) for row in ROWS) * repeats
    with SweepProgress(console, planned) as progress:
        outcomes: list[Outcome] = []
        to_match: dict[str, float] = {}
        for row in ROWS:
            outcome = outcome_of(experiment, row, to_match.get(row.optimizer), progress)
            outcomes.append(outcome)
            if row.head == GRADIENT:
                to_match[row.optimizer] = float(outcome.errors[:, -1].mean())
    # Rows of one optimizer next to each other, in the order of OPTIMIZERS.
    outcomes.sort(key=lambda outcome: list(OPTIMIZERS).index(outcome.row.optimizer))

    rows = summarize(outcomes)
    write_results(experiment, rows)
    draw(experiment, outcomes)
    show(console, experiment, rows)
    console.print(
        f"{time.perf_counter() - start:.0f} s. Table, numbers, curves.png and prediction.png are "
        f"in {out}."
    )
