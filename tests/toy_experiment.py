"""toy: an experiment of one's own, as a file of `benchmarks/experiments/`."""

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.core.comparison import Comparison, compare
from benchmarks.core.methods import EQUATION_17, GRADIENT, PROXIMAL, Batch, Method
from benchmarks.core.problem import Data, Problem, network
from benchmarks.core.records import Records
from benchmarks.core.runner import Runner, running
from benchmarks.core.search import descend
from benchmarks.core.tuner import Tuner
from benchmarks.experiments import Experiment
from benchmarks.models.mlp import MLP
from benchmarks.reporting.comparisons import Pair, decide, lower, number_table
from benchmarks.reporting.summary import Summary, show

MODEL = MLP(widths=(8,), num_outputs=1)
ROWS = (Method("SGD", GRADIENT), Method("SGD", PROXIMAL, EQUATION_17))
PAIR = Pair("A closed-form head fits a sine better.", ROWS[1], ROWS[0], lower)
BATCH_SIZES, SEEDS = (16,), (0, 1)
TUNER = Tuner(descend, rates=(0.03, 0.1), strengths={"lam": (1.0, 10.0)})


def load() -> Data:
    """A sine, sampled three times."""
    x = np.random.default_rng(0).uniform(-3, 3, (3, 64, 1)).astype(np.float32)
    return Data(*(Batch(part, np.sin(part)) for part in x))


def make_problem() -> Problem:
    """The sine as a `Problem`."""
    return Problem(
        settings={"experiment": "toy", "model": repr(MODEL)},
        epochs=lambda batch_size: 2,
        load=load,
        network=partial(network, MODEL),
        metric="MSE",
        start=lambda method: (0.1, 1.0),
    )


def answer(runner: Runner, preset: str) -> Summary:
    """Train what is missing, if that is allowed, and say what was found."""
    outcomes = compare(Comparison(make_problem(), runner, TUNER), ROWS, BATCH_SIZES, SEEDS)
    return Summary(
        title="A toy",
        command=f"python -m benchmarks toy --preset {preset}",
        setup="64 points of a sine.",
        tables=[number_table(outcomes, BATCH_SIZES, "Test MSE.")],
        claims=[decide(PAIR, outcomes, BATCH_SIZES)],
        figures=[],
    )


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Replay the experiment on its records."""
    return answer(Runner(records, make=False), preset)


def toy(preset: str = "cpu", out: Path = Path("benchmarks/out/toy")) -> None:
    """Fit a sine with a gradient head and with a head in closed form.

    Args:
      preset: there is one only.
      out: folder of finished runs.
    """
    with running(out, "toy", num_runs=12) as runner:
        found = answer(runner, preset)
    show(found)


EXPERIMENTS = (Experiment(toy, summarize, place=1000),)
