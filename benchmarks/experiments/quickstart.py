"""quickstart: what does a closed-form head add to the optimizer you already use?

A Fourier neural operator learns Burgers' equation with SGD, Adam and Muon, each with a head trained
by gradients like any other layer, and with a head in closed form. `step` in `core/methods.py` is
the whole difference, and an example of how to use the library: read it first.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import cfll
from benchmarks.core import methods
from benchmarks.core.comparison import Comparison, Config, Outcome
from benchmarks.core.methods import ALGORITHM_1, EQUATION_17, Method
from benchmarks.core.problem import Problem
from benchmarks.core.records import Record
from benchmarks.core.runner import running
from benchmarks.core.search import descend
from benchmarks.core.training import first_at_or_below
from benchmarks.core.tuner import Tuner
from benchmarks.data import burgers as data
from benchmarks.experiments import Experiment
from benchmarks.models.fno import FNO1d
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Summary, Table, markdown_table, show
from benchmarks.tasks import burgers

MODEL = FNO1d()
START_RATES = {"SGD": 0.07, "Adam": 0.005, "Muon": 0.02}  # for all heads alike
BETA = 1.0  # of ridge, not tuned

GRADIENT, PROXIMAL = "gradient", "proximal"
HEADS: Mapping[str, tuple[str, str]] = {  # name in the table -> head and order
    GRADIENT: (methods.GRADIENT, ""),
    PROXIMAL: (methods.PROXIMAL, EQUATION_17),
    "proximal, Alg. 1": (methods.PROXIMAL, ALGORITHM_1),
    "ridge": (methods.RIDGE, EQUATION_17),
}
ROWS = (
    ("SGD", GRADIENT),
    ("SGD", PROXIMAL),
    ("Adam", GRADIENT),
    ("Adam", PROXIMAL),
    ("Adam", "proximal, Alg. 1"),
    ("Adam", "ridge"),
    ("Muon", GRADIENT),
    ("Muon", PROXIMAL),
)
RUNS_PER_ROW = 4  # about; what the progress bar expects

HEADINGS = ("optimizer", "head", "test MSE", "ratio", "steps to match", "ms/step", "rate")
EXPLANATION = "\n".join(  # a line each: the terminal wraps them where it ends
    (
        "ratio: to the gradient head with the same optimizer, after as many steps.",
        "steps to match: until the validation error, measured twice an epoch, is at or below the "
        "last one of that gradient head; *: in a run of half the length, with its own decay.",
        "ms/step: median, compilation excluded. rate: the best by the last validation error.",
    )
)


class Result(NamedTuple):
    """A row at its best rate."""

    head: str  # its name in the table
    outcome: Outcome  # of its runs
    half: Outcome | None  # of runs of half the length at that rate, or None; see `result_of`
    test_errors: list[float]  # one per seed

    @property
    def optimizer(self) -> str:
        return self.outcome.method.optimizer


def make_problem(epochs: int, folder: Path) -> Problem:
    """Burgers' equation, without test curves: the test set is for the best rates alone."""
    problem = burgers.make_problem(burgers.Size(epochs, (), (), MODEL), folder)
    versions = {"cfll": cfll.__version__, "jax": jax.__version__}
    return problem._replace(
        settings={**problem.settings, "experiment": "quickstart", **versions},
        load=cache(lambda: burgers.load(folder, None)._replace(test=None)),
        start=lambda method: (START_RATES[method.optimizer], 1.0),
        num_measurements=2 * epochs,
    )


def tuner_of(optimizer: str, lam: float, num_seeds: int) -> Tuner:
    """By factors of two from the start downhill, by the mean over all seeds."""
    rates = [START_RATES[optimizer] * 2.0**k for k in range(-5, 6)]
    penalties = {"lam": (lam,), "beta": (BETA,)}
    return Tuner(descend, rates, penalties, search_seeds=num_seeds)


def result_of(
    comparison: Comparison,
    head: str,
    method: Method,
    batch_size: int,
    seeds: Sequence[int],
    baseline: Result | None,
) -> Result:
    """Find the best rate of a row by validation error, and test it.

    A run decays its rate to zero, and most of its progress may come with the decay: where it passes
    another run's last error then says little about how many steps it needs. So a row that passes
    the baseline only in its second half also gets runs of half the length.
    """
    outcome = comparison.tune(method, batch_size, seeds)
    configs = [Config(*outcome[:4], seed) for seed in seeds]
    matched = steps_to_match(outcome, baseline)
    half, epochs = None, comparison.problem.epochs(batch_size)
    if matched is not None and matched > outcome.steps[-1] / 2 and epochs > 1:
        problem = comparison.problem._replace(
            epochs=lambda batch_size: epochs // 2, num_measurements=2 * (epochs // 2)
        )
        half = Comparison(problem, comparison.runner).outcome(configs)
    return Result(head, outcome, half, [error_on_test_set(comparison, c) for c in configs])


def error_on_test_set(comparison: Comparison, config: Config) -> float:
    """The test error of a finished run."""

    def measure() -> Record:
        data = comparison.data()
        state, measured = comparison.finished(config)
        assert data.final is not None
        return {"test_error": data.scale * measured(state, data.final)}

    key = {**comparison.key(config), "what": "test"}
    return comparison.runner.run(key, measure, f"{config.label} on the test set")["test_error"]


def steps_to_match(outcome: Outcome | None, baseline: Result | None) -> int | None:
    """After how many steps a row is as good as its baseline at the end; None if never."""
    if outcome is None or baseline is None:
        return None
    level = baseline.outcome.validation[:, -1].mean()
    return first_at_or_below(outcome.steps, outcome.validation.mean(axis=0), level)


def numbers_of(result: Result, baseline: Result) -> dict[str, Any]:
    """A row of results.json."""
    outcome, test_mse = result.outcome, float(np.mean(result.test_errors))
    return {
        "optimizer": result.optimizer,
        "head": result.head,
        "test_mse": test_mse,
        "test_mse_per_seed": result.test_errors,
        "ratio": test_mse / float(np.mean(baseline.test_errors)),
        "num_steps": outcome.steps[-1],
        "steps_to_match": steps_to_match(outcome, baseline),
        "steps_to_match_in_half_run": steps_to_match(result.half, baseline),
        "seconds_per_step": outcome.seconds_per_step,
        "rate": outcome.rate,
        "validation_mse_per_rate": {
            f"{values[0]:.4g}": error if np.isfinite(error) else None
            for values, error in sorted(outcome.tried.items())
        },
    }


def cells(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    whole, half = numbers["steps_to_match"], numbers["steps_to_match_in_half_run"]
    matched = f"{half} *" if half is not None else "never" if whole is None else f"{whole}"
    return (
        numbers["optimizer"],
        numbers["head"],
        f"{numbers['test_mse']:.2e}",
        f"{numbers['ratio']:.2f}",
        f"{matched} / {numbers['num_steps']}",
        f"{1e3 * numbers['seconds_per_step']:.1f}",
        f"{numbers['rate']:.4g}",
    )


def write(out: Path, table: Table, rows: Sequence[Mapping[str, Any]], settings: Any) -> None:
    """The table as results.md, the numbers behind it as results.json."""
    text = f"{markdown_table(table.headings, table.rows)}\n\n{table.caption}\n"
    (out / "results.md").write_text(text.replace("*", r"\*"))
    results = {
        "settings": settings,
        "versions": {"cfll": cfll.__version__, "jax": jax.__version__, "optax": optax.__version__},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "rows": rows,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def draw(comparison: Comparison, results: Sequence[Result], seed: int, out: Path) -> list[Path]:
    """Both figures."""
    panels: dict[str, dict[str, tuple[list[int], np.ndarray]]] = {}
    for result in results:
        curves = panels.setdefault(result.optimizer, {})
        curves[result.head] = (result.outcome.steps, result.outcome.validation)
        if result.head == PROXIMAL and result.half:
            curves[f"{PROXIMAL}, half the steps"] = (result.half.steps, result.half.validation)
    drawn = [out / "curves.png", out / "prediction.png"]
    plots.learning_curves(panels, path=drawn[0], baseline=GRADIENT)

    # An ordinary sample: that of median steepness, chosen by the data and not by a model's error.
    splits = data.load_burgers(out)
    steepness = np.abs(np.diff(splits.test.final, axis=1)).max(axis=1)
    sample = int(np.argsort(steepness)[len(steepness) // 2])
    scalings = burgers.scaling_of(splits.train.initial), burgers.scaling_of(splits.train.final)
    inputs = burgers.standardize(splits.test, *scalings).inputs[[sample]]

    def prediction(outcome: Outcome) -> np.ndarray:
        state, _ = comparison.finished(Config(*outcome[:4], seed))
        outputs: Any = MODEL.apply({"params": state.params}, inputs)
        return scalings[1].mean + scalings[1].std * np.asarray(outputs)[0, :, 0]

    optimizer = results[-1].optimizer
    plots.prediction(
        data.grid(data.FINE_POINTS),
        initial=splits.test.initial[sample],
        truth=splits.test.final[sample],
        predictions={
            f"{optimizer}, {result.head} head": prediction(result.outcome)
            for result in results
            if result.optimizer == optimizer and result.head in (GRADIENT, PROXIMAL)
        },
        path=drawn[1],
        title="Burgers' equation on 8192 points: the test sample of median steepness",
    )
    return drawn


def quickstart(
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    repeats: int = 1,
    lam: float = 10.0,
    out: Path = Path("benchmarks/out/quickstart"),
) -> None:
    """Train an operator network with SGD, Adam and Muon, with and without a closed-form head.

    Generates Burgers data, finds the best learning rate of every row on validation data and prints
    a table: test error, steps to the gradient head's error, time per step. Under five minutes on
    two CPU cores.

    Args:
      epochs: passes over the 1448 training samples, the same for every row.
      batch_size: samples per step; the head is solved on batch size x 256 grid points.
      seed: of initialization and shuffling.
      repeats: number of seeds, counted from the first; results are means over them.
      lam: the proximal coefficient of the closed-form heads, the same for all and not tuned.
      out: folder of results, figures, finished runs and generated data.
    """
    if min(epochs, repeats) < 1 or not 1 <= batch_size <= 1448 or lam <= 0:
        raise SystemExit("Needed: --epochs and --repeats from 1, --batch-size 1 to 1448, --lam > 0")
    seeds, problem = tuple(range(seed, seed + repeats)), make_problem(epochs, out)
    results: list[Result] = []
    baselines: dict[str, Result] = {}
    with running(out, "runs", RUNS_PER_ROW * len(ROWS) * repeats) as runner:
        for optimizer, head in ROWS:
            tuner = tuner_of(optimizer, lam, repeats)
            comparison = Comparison(problem, runner, tuner, keep=out / "params")
            method = Method(optimizer, *HEADS[head], init=methods.OF_NETWORK)
            baseline = baselines.get(optimizer)
            result = result_of(comparison, head, method, batch_size, seeds, baseline)
            baselines.setdefault(optimizer, result)
            results.append(result)
        drawn = draw(comparison, results, seed, out)

    rows = [numbers_of(result, baselines[result.optimizer]) for result in results]
    caption = (
        f"Burgers' equation, {epochs} epochs, batch {batch_size}, lam {lam:g}, beta {BETA:g}, "
        f"{'mean of seeds' if repeats > 1 else 'seed'} {', '.join(map(str, seeds))}. All heads but "
        "'gradient' are in closed form. Test MSE on 400 samples and 8192 points, in units of u^2 "
        f"(variance {data.load_burgers(out).train.final.var():.2f})."
    )
    table = Table(f"{caption}\n{EXPLANATION}", HEADINGS, tuple(map(cells, rows)))
    write(out, table, rows, {**problem.settings, "lam": lam, "epochs": epochs, "seeds": seeds})
    title, command = "The quickstart", "python -m benchmarks quickstart"
    show(Summary(title, command, "", [table], [], drawn))


EXPERIMENTS = (Experiment(quickstart, None, place=0),)
