"""rules: a penalty that tunes itself against the best fixed one, of a joint grid of rate and lam.

Top of the benchmarks. The tasks are those of `burgers.py` and `classification.py`; the tuned method
chooses its rate alone.
"""

import itertools
import math
import time
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console

from benchmarks import findings, summary
from benchmarks.comparison import RATES, Comparison, Config, Outcome, Problem
from benchmarks.experiments import burgers, classification
from benchmarks.methods import ADAPTIVE, EQUATION_17, PROXIMAL, Method
from benchmarks.progress import SweepProgress
from benchmarks.records import Records

Preset = Literal["small", "cpu"]
Task = Literal["burgers", "cifar10", "omniglot"]


class Size(NamedTuple):
    """What a preset means.

    Attributes:
      optimizers: of the backbone.
      batch_sizes: of each task.
      seeds: of initialization and shuffling; the search runs on the first.
    """

    optimizers: tuple[str, ...]
    batch_sizes: dict[str, tuple[int, ...]]
    seeds: tuple[int, ...]


SIZES = {
    "small": Size(
        ("SGD", "Muon"), {"burgers": (16,), "cifar10": (128,), "omniglot": (128,)}, (0, 1)
    ),
    "cpu": Size(
        ("SGD", "Adam", "Muon"),
        {"burgers": (16, 64, 256), "cifar10": (128, 1024), "omniglot": (128, 1024)},
        (0, 1, 2),
    ),
}
LAMS = (1.0, 100.0, 1e4)  # of the joint grid; the search goes on in decades from its best
REGRESSION, CLASSIFICATION = 1.1, 0.02  # how far the tuned may be from the best fixed
RUNS_PER_ROW = 14  # about; what the progress bar expects


def make_problem(task: Task, data: Path | None, out: Path) -> Problem:
    """A task at the size of the preset "cpu" of its own experiment."""
    if task == "burgers":
        return burgers.make_problem(burgers.SIZES["cpu"], out, None)
    return classification.make_problem(task, classification.SIZES[task, "cpu"], data)


def tune(
    comparison: Comparison, method: Method, batch_size: int, seeds: tuple[int, ...]
) -> Outcome:
    """The best of a joint grid on the first seed, then downhill from there, then all seeds."""
    problem = comparison.problem
    rate, _ = problem.start(method._replace(head=PROXIMAL))
    middle = min(range(len(RATES)), key=lambda i: abs(math.log(RATES[i] / rate)))
    lams = LAMS if method.head == PROXIMAL else (None,)

    def cost(point: tuple[float, float | None]) -> float:
        last = comparison.run(Config(method, batch_size, *point, seeds[0]))["validation"][-1]
        return math.inf if last is None else problem.sign * last

    best = min(itertools.product(RATES[max(middle - 2, 0) : middle + 3 : 2], lams), key=cost)
    comparison.problem = problem._replace(start=lambda method: best)
    try:
        return comparison.tune(method, batch_size, seeds)
    finally:
        comparison.problem = problem


def compare(comparison: Comparison, task: Task, preset: Preset) -> list[Outcome]:
    """Both methods with each optimizer and batch size."""
    optimizers, batch_sizes, seeds = SIZES[preset]
    outcomes = []
    for row in itertools.product(batch_sizes[task], optimizers, (PROXIMAL, ADAPTIVE)):
        batch_size, optimizer, head = row
        method = Method(optimizer, head, EQUATION_17)
        outcomes.append(tune(comparison, method, batch_size, seeds))
    return outcomes


def near_in_error(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() <= REGRESSION * fixed.final.mean())


def near_in_accuracy(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() >= fixed.final.mean() - CLASSIFICATION)


def summary_of(outcomes: list[Outcome], task: Task, preset: Preset) -> summary.Summary:
    """Tables and claims of a task."""
    optimizers, batch_sizes, _ = SIZES[preset]
    digits = ".2e" if task == "burgers" else ".3f"
    tolerance = "10 %" if task == "burgers" else "2 points"
    return summary.Summary(
        title=f"A penalty that tunes itself: {task}",
        command=f"python -m benchmarks rules --task {task} --preset {preset}",
        setup=f"`cfll.adaptive_prox()` at its best rate against the best rate and lam of "
        f"`cfll.prox`: a joint grid of rates and lam {', '.join(f'{lam:g}' for lam in LAMS)}, then "
        "downhill on half decades of rates and decades of lam. All else as in the experiment that "
        "the task is from.",
        tables=(
            findings.number_table(outcomes, batch_sizes[task], "Test metric.", digits),
            findings.tuned_table(outcomes, batch_sizes[task]),
        ),
        figures=[],
        claims=[
            findings.compare_pairs(
                f"With {optimizer} it is within {tolerance} of the best fixed penalty.",
                outcomes,
                batch_sizes[task],
                Method(optimizer, ADAPTIVE, EQUATION_17),
                Method(optimizer, PROXIMAL, EQUATION_17),
                near_in_error if task == "burgers" else near_in_accuracy,
                digits,
            )
            for optimizer in optimizers
        ],
    )


def rules(
    task: Task = "burgers",
    preset: Preset = "small",
    data: Path | None = None,
    out: Path = Path("benchmarks/out/rules"),
) -> None:
    """A penalty that tunes itself against the best fixed one.

    Stop it when you like; the same command goes on where it stopped.

    Args:
      task: what is learned.
      preset: "small": a quarter of an hour for a task on two cores; "cpu": hours.
      data: folder of CIFAR-10's official files, or of Omniglot's zips.
      out: folder of finished runs and generated data.
    """
    start = time.perf_counter()
    optimizers, batch_sizes, _ = SIZES[preset]
    console = Console()
    num_rows = 2 * len(optimizers) * len(batch_sizes[task])
    with SweepProgress(console, RUNS_PER_ROW * num_rows) as progress:
        problem, records = make_problem(task, data, out), Records(out / f"rules_{task}.jsonl")
        outcomes = compare(Comparison(problem, records, progress=progress), task, preset)
    summary.show(console, summary_of(outcomes, task, preset))
    console.print(f"{time.perf_counter() - start:.0f} s. Runs are in {out}.")
