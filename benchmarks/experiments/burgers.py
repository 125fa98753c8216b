"""burgers: Figure 2, a Fourier neural operator on Burgers' equation at three batch sizes.

The paper's methods with SGD, and the baselines that its reviewers missed.
"""

import dataclasses
from pathlib import Path

from benchmarks.core.comparison import Comparison, Outcome, compare
from benchmarks.core.methods import (
    ALGORITHM_1,
    ALGORITHM_2,
    AVERAGE,
    EQUATION_17,
    GRADIENT,
    PROXIMAL,
    RIDGE,
    TWO_TIMESCALE,
    Method,
)
from benchmarks.core.problem import Problem
from benchmarks.core.records import Records
from benchmarks.core.runner import Runner, running
from benchmarks.core.tuner import BY_AXES
from benchmarks.experiments import Experiment
from benchmarks.reporting.comparisons import (
    Pair,
    curves_by_optimizer,
    decide,
    level,
    lower,
    number_table,
    tuned_table,
)
from benchmarks.reporting.summary import Summary, show
from benchmarks.tasks.burgers import SIZES, Preset, Size, make_problem, start_by_axes

OPTIMIZERS = ("SGD", "Adam", "Muon")
METHODS = (
    *(
        method
        for optimizer in OPTIMIZERS
        for method in (
            Method(optimizer, PROXIMAL, EQUATION_17),
            Method(optimizer, PROXIMAL, ALGORITHM_1),
            Method(optimizer, GRADIENT),
        )
    ),
    Method("SGD", RIDGE, ALGORITHM_1),
    Method("SGD", PROXIMAL, ALGORITHM_2),
    Method("SGD", TWO_TIMESCALE),
    Method("SGD", AVERAGE),
)
RUNS_PER_ROW = 9  # about; what the progress bar expects


def pairs_of(smallest: int, largest: int) -> list[Pair]:
    """What is claimed of two methods."""
    ridge, sgd = Method("SGD", RIDGE, ALGORITHM_1), Method("SGD", PROXIMAL, ALGORITHM_1)
    return [
        Pair(
            "Our approach outperforms the l2 loss across batch sizes (Section 6; SGD, Alg. 1).",
            sgd,
            Method("SGD", GRADIENT),
            lower,
        ),
        Pair(
            "Ridge is worse than proximal for small batch sizes (Section 6).",
            sgd,
            ridge,
            lower,
            (smallest,),
        ),
        Pair(
            "Ridge matches proximal for large batch sizes: the two are level (Section 6).",
            sgd,
            ridge,
            level,
            (largest,),
        ),
        *(
            Pair(
                f"Proximal, {order}, is better than the gradient head with {optimizer} at every "
                "batch size.",
                Method(optimizer, PROXIMAL, order),
                Method(optimizer, GRADIENT),
                lower,
            )
            for optimizer in OPTIMIZERS
            for order in (EQUATION_17, ALGORITHM_1)
        ),
        Pair(
            "Proximal is better than two-timescale SGD at every batch size.",
            sgd,
            Method("SGD", TWO_TIMESCALE),
            lower,
        ),
        Pair(
            "Proximal is better than the average of ridge heads at every batch size.",
            sgd,
            Method("SGD", AVERAGE),
            lower,
        ),
    ]


def by_axes(problem: Problem, runner: Runner) -> Comparison:
    """The comparison by the older search, of which the records are."""
    return Comparison(problem._replace(start=start_by_axes), runner, BY_AXES)


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Replay the experiment on its records."""
    size = SIZES[preset]
    comparison = by_axes(make_problem(size, Path()), Runner(records, make=False))
    outcomes = compare(comparison, METHODS, size.batch_sizes, size.seeds)
    return summary_of(outcomes, size, figures, preset)


def summary_of(outcomes: list[Outcome], size: Size, figures: Path, preset: str) -> Summary:
    """Tables, figures and claims."""
    batch_sizes = size.batch_sizes
    setup = (
        f"1448 / 200 / 400 functions, {size.epochs} epochs (the paper: 100), cosine decay, "
        f"a Fourier neural operator of width {size.model.width} with {size.model.modes} modes, "
        f"{size.model.depth} layers and {size.model.num_features} features. {BY_AXES.words}; the "
        f"best on seeds {', '.join(map(str, size.seeds))}. Curves: 256 points; table: all 8192 "
        "points. The axes are the paper's: iterations, test MSE. Gradient heads of any ratio, by "
        "joint search: 'Which head to take'."
    )
    caption = "Test MSE in units of u² on 8192 points, mean ± half the 95 % interval."
    pairs = pairs_of(min(batch_sizes), max(batch_sizes))
    return Summary(
        title="Figure 2: Burgers' equation",
        command=f"python -m benchmarks burgers --preset {preset}",
        setup=setup,
        tables=(number_table(outcomes, batch_sizes, caption), tuned_table(outcomes, batch_sizes)),
        claims=[decide(pair, outcomes, batch_sizes) for pair in pairs],
        figures=curves_by_optimizer(
            outcomes, batch_sizes, figures / "burgers.png", "test MSE (units of u²)", "log"
        ),
    )


def burgers(
    preset: Preset = "cpu",
    batch_sizes: tuple[int, ...] = (),
    data: Path | None = None,
    out: Path = Path("benchmarks/out/burgers"),
) -> None:
    """Figure 2: closed-form heads against gradient heads on Burgers' equation.

    Two processes may share a folder if they have different batch sizes.

    Args:
      preset: "cpu" for two cores and an hour, "paper" for the paper's own size on an accelerator.
      batch_sizes: only these; all of the preset if empty.
      data: burgers_data_R10.mat of the FNO paper; generated if absent.
      out: folder of finished runs, figures and generated data.
    """
    size = SIZES[preset]
    size = dataclasses.replace(size, batch_sizes=batch_sizes or size.batch_sizes)
    with running(out, "burgers", RUNS_PER_ROW * len(METHODS) * len(size.batch_sizes)) as runner:
        comparison = by_axes(make_problem(size, out, data), runner)
        outcomes = compare(comparison, METHODS, size.batch_sizes, size.seeds)
    show(summary_of(outcomes, size, out, preset))


EXPERIMENTS = (Experiment(burgers, summarize, place=20, presets=("cpu", "paper")),)
