"""rules: which head to take, the best gradient head, a fixed penalty or one that tunes itself.

Top of the benchmarks. Every row is tuned jointly with the same budget; see `joint.py`.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rich.console import Console

from benchmarks.core import joint, training
from benchmarks.core.comparison import Comparison, Config, MissingError, Outcome, Problem
from benchmarks.core.methods import (
    ADAPTIVE,
    EQUATION_17,
    PROXIMAL,
    SOFTMAX,
    TWO_TIMESCALE,
    Method,
)
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Records
from benchmarks.core.timing import interleaved_seconds
from benchmarks.experiments import burgers, classification
from benchmarks.reporting import findings, summary
from benchmarks.tasks import kdv, tables

Task = Literal["burgers", "kdv", "rf1", "california", "cifar10", "omniglot"]
OPTIMIZERS = ("SGD", "Adam", "Muon")
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZES: Mapping[Task, tuple[int, ...]] = {
    "burgers": (16, 64, 256),
    "kdv": (16, 64, 256),
    "rf1": (128, 1024),
    "california": (128, 1024),
    "cifar10": (128, 1024),
    "omniglot": (128, 1024),
}
GRADIENT_HEAD, FIXED, TUNED = "gradient, any ratio", "fixed lam", "self-tuned lam"
CROSS_ENTROPY, SOFTMAX_HEAD = "cross entropy, any ratio", "softmax, fixed lam"
CLASSIFIERS: tuple[Task, ...] = ("cifar10", "omniglot")
REGRESSION, CLASSIFICATION = 1.1, 0.02  # how far self-tuned may be from the best fixed
RUNS_PER_ROW = 26  # about; what the progress bar expects


class Row(NamedTuple):
    """A cell of the table: an optimizer and what sets its head, at one batch size."""

    optimizer: str
    head: str
    batch_size: int


Found = dict[Row, Outcome]


def make_problem(task: Task, data: Path | None, out: Path) -> Problem:
    """A task, at the size of the preset "cpu" where an experiment of its own has one."""
    if task == "burgers":
        return burgers.make_problem(burgers.SIZES["cpu"], out, None)
    if task == "kdv":
        return kdv.make_problem()
    if task == "rf1" or task == "california":
        return tables.make_problem(task, data)
    return classification.make_problem(task, classification.SIZES[task, "cpu"], data)


def heads_of(task: Task) -> tuple[str, ...]:
    """The columns of a task."""
    classes = (CROSS_ENTROPY, SOFTMAX_HEAD) if task in CLASSIFIERS else ()
    return (GRADIENT_HEAD, FIXED, TUNED, *classes)


def tune(comparison: Comparison, row: Row, task: Task) -> Outcome:
    """A row at its best hyperparameters."""
    loss = "cross entropy" if row.head == CROSS_ENTROPY else "l2"
    methods = {
        FIXED: Method(row.optimizer, PROXIMAL, EQUATION_17),
        TUNED: Method(row.optimizer, ADAPTIVE, EQUATION_17),
        SOFTMAX_HEAD: Method(row.optimizer, SOFTMAX, EQUATION_17),
    }
    method = methods.get(row.head, Method(row.optimizer, TWO_TIMESCALE, loss=loss, init="zeros"))
    rate, strength = comparison.problem.start(Method(row.optimizer, PROXIMAL))
    if row.head in methods:
        return joint.tune(comparison, method, row.batch_size, SEEDS, (rate, strength))
    # Where a slow head was good in trials: in classification. Elsewhere the ordinary one.
    start = rate, 0.01 if task in CLASSIFIERS else 1.0
    zeros = joint.tune(comparison, method, row.batch_size, SEEDS, start)
    # The other initialization only where zeros are good: it makes a difference of a few percent.
    near = joint.best_candidates(zeros, comparison.problem.sign)
    lecun = joint.tune(
        comparison, method._replace(init=None), row.batch_size, SEEDS, start, candidates=near
    )
    sign = comparison.problem.sign
    return min(zeros, lecun, key=lambda outcome: sign * outcome.validation[:, -1].mean())


def compare(
    comparison: Comparison,
    task: Task,
    batch_sizes: tuple[int, ...],
    optimizers: tuple[str, ...] = OPTIMIZERS,
) -> Found:
    """All rows of a task; if nothing may be trained, those that were."""
    found: Found = {}
    for batch_size, optimizer, head in itertools.product(batch_sizes, optimizers, heads_of(task)):
        row = Row(optimizer, head, batch_size)
        try:
            found[row] = tune(comparison, row, task)
        except MissingError:
            continue
    return found


def near_in_error(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the self-tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() <= REGRESSION * fixed.final.mean())


def near_in_accuracy(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the self-tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() >= fixed.final.mean() - CLASSIFICATION)


def seconds_of(
    problem: Problem, records: Records, found: Found, *, train: bool = True
) -> dict[Row, float]:
    """Seconds of a step, measured in turn for the rows of one optimizer and batch size."""
    seconds: dict[Row, float] = {}
    for optimizer, batch_size in dict.fromkeys((row.optimizer, row.batch_size) for row in found):
        rows = [row for row in found if (row.optimizer, row.batch_size) == (optimizer, batch_size)]
        key = {"seconds per step": problem.settings, "rows": [list(row) for row in rows]}
        record = records.get(key)
        if record is None:
            if not train:
                continue
            configs = [config_of(found[row]) for row in rows]
            record = {"seconds": interleaved_seconds(problem, configs)}
            records.add(key, record)
        seconds |= dict(zip(rows, record["seconds"], strict=True))
    return seconds


def config_of(outcome: Outcome) -> Config:
    """The first of an outcome's runs."""
    return Config(outcome.method, outcome.batch_size, outcome.rate, outcome.strength, seed=0)


def steps_to(outcome: Outcome, level: float, sign: int) -> int | None:
    """After how many steps the mean test curve is at a level or better; None if never."""
    return training.first_at_or_below(outcome.steps, sign * outcome.test.mean(axis=0), sign * level)


def task_table(
    task: Task, problem: Problem, found: Found, seconds: Mapping[Row, float]
) -> summary.Table:
    """Rows: batch size and optimizer; columns: the heads, each with its time to the first's end."""
    digits, sign = (".3f" if task in CLASSIFIERS else ".2e"), problem.sign

    def cell(row: Row) -> str:
        outcome, baseline = found.get(row), found.get(row._replace(head=GRADIENT_HEAD))
        if outcome is None:
            return ""
        text = findings.mean_and_interval(outcome.final, digits)
        if row not in seconds or baseline is None:
            return text
        text += f"; {1e3 * seconds[row]:.1f} ms"
        if outcome is baseline:
            return text + f", {seconds[row] * outcome.steps[-1]:.1f} s"
        steps = steps_to(outcome, baseline.test[:, -1].mean(), sign)
        return text + (", never" if steps is None else f", {seconds[row] * steps:.1f} s")

    heads = heads_of(task)
    lines = [
        (str(batch_size), optimizer, *(cell(Row(optimizer, head, batch_size)) for head in heads))
        for batch_size, optimizer in dict.fromkeys((r.batch_size, r.optimizer) for r in found)
    ]
    caption = (
        f"{task}: test {problem.metric}, mean ± half the 95 % interval; milliseconds per step; "
        "seconds of training until the test curve is as good as the gradient head's at its end."
    )
    return summary.Table(caption, ("B", "optimizer", *heads), tuple(lines))


def tuned_table(task: Task, found: Found) -> summary.Table:
    """The hyperparameters behind `task_table`."""
    heads = heads_of(task)

    def cell(row: Row) -> str:
        outcome = found.get(row)
        if outcome is None:
            return ""
        strength = "" if outcome.strength is None else f", {outcome.strength:g}"
        lecun = outcome.method.head == TWO_TIMESCALE and outcome.method.init is None
        init = ", LeCun" if lecun else ""
        return f"{outcome.rate:g}{strength}{init}"

    lines = [
        (str(batch_size), optimizer, *(cell(Row(optimizer, head, batch_size)) for head in heads))
        for batch_size, optimizer in dict.fromkeys((r.batch_size, r.optimizer) for r in found)
    ]
    caption = f"{task}: best rate, and ratio or lam; a gradient head starts at zero or LeCun's."
    return summary.Table(caption, ("B", "optimizer", *heads), tuple(lines))


def claim(
    sentence: str,
    task: Task,
    found: Found,
    head: str,
    other: str,
    holds: Callable[[Outcome, Outcome], bool],
) -> summary.Claim:
    """A sentence about two heads, at every batch size with every optimizer that was run."""
    digits = ".3f" if task in CLASSIFIERS else ".2e"
    verdicts, evidence = [], []
    for row, left in found.items():
        right = found.get(row._replace(head=other))
        if row.head != head or right is None:
            continue
        verdicts.append(holds(left, right))
        evidence.append(
            f"{row.optimizer} {row.batch_size}: {left.final.mean():{digits}} against "
            f"{right.final.mean():{digits}}{'' if verdicts[-1] else ' (no)'}"
        )
    return summary.Claim(sentence, all(verdicts) if verdicts else None, "; ".join(evidence))


def claims_of(task: Task, found: Found) -> list[summary.Claim]:
    """What is said of a task."""
    if task in CLASSIFIERS:
        better, near, by = findings.higher, near_in_accuracy, "2 points"
    else:
        better, near, by = findings.lower, near_in_error, "10 %"
    claims = [
        claim(
            f"{task}: a fixed penalty is better than a gradient head of any ratio.",
            task,
            found,
            FIXED,
            GRADIENT_HEAD,
            better,
        ),
        claim(
            f"{task}: a self-tuned penalty is within {by} of the best fixed.",
            task,
            found,
            TUNED,
            FIXED,
            near,
        ),
    ]
    if task in CLASSIFIERS:
        claims.append(
            claim(
                f"{task}: the softmax head is better than cross entropy by gradient, of any ratio.",
                task,
                found,
                SOFTMAX_HEAD,
                CROSS_ENTROPY,
                better,
            )
        )
    return claims


def summarize(records: Records, figures: Path, preset: str = "cpu") -> summary.Summary:
    """The page for a decision, of all tasks that were run.

    Args:
      records: finished runs.
      figures, preset: of no effect; what all experiments take.
    """
    parts = []
    for task in get_args(Task):
        problem = make_problem(task, None, Path())
        found = compare(Comparison(problem, records, train=False), task, BATCH_SIZES[task])
        if found:
            seconds = seconds_of(problem, records, found, train=False)
            parts.append(
                (
                    task_table(task, problem, found, seconds),
                    tuned_table(task, found),
                    claims_of(task, found),
                )
            )
    return page(parts)


def page(parts: list[tuple[summary.Table, summary.Table, list[summary.Claim]]]) -> summary.Summary:
    """Tables and claims of tasks as one summary."""
    return summary.Summary(
        title="Which head to take",
        command="python -m benchmarks rules --task <task>",
        setup="`cfll.prox(lam)` and `cfll.adaptive_prox()`, in the order of Eq. (17), against "
        "gradient heads whose rate is 1e-4 to 1e3 times the backbone's, started at zero or as "
        "LeCun; with a squared loss, and for classes with cross entropy, too, against "
        "`cfll.softmax(lam)`. Every row has the same budget: 20 runs of a joint search over half "
        "decades of rates and decades of ratio or lam, the best three on a second seed, the best "
        "on five; chosen by the last validation metric. All rates decay on a cosine. Times per "
        "step are measured in turn.",
        tables=[table for numbers, tuned, _ in parts for table in (numbers, tuned)],
        claims=[claim for *_, claims in parts for claim in claims],
        figures=[],
    )


def rules(
    task: Task = "burgers",
    optimizers: tuple[str, ...] = OPTIMIZERS,
    batch_sizes: tuple[int, ...] = (),
    data: Path | None = None,
    out: Path = Path("benchmarks/out/rules"),
) -> None:
    """Which head to take: gradient heads of any ratio, a fixed penalty, one that tunes itself.

    Stop it when you like; the same command goes on where it stopped. Two processes may share a
    folder if they have different tasks.

    Args:
      task: what is learned.
      optimizers: only these.
      batch_sizes: only these; all of the task if empty.
      data: folder of CIFAR-10's official files, of Omniglot's zips, or of the tables' .csv.
      out: folder of finished runs and generated data.
    """
    start = time.perf_counter()
    console = Console()
    chosen = batch_sizes or BATCH_SIZES[task]
    num_rows = len(heads_of(task)) * len(optimizers) * len(chosen)
    problem, records = make_problem(task, data, out), Records(out / "rules.jsonl")
    with SweepProgress(console, RUNS_PER_ROW * num_rows) as progress:
        comparison = Comparison(problem, records, progress=progress)
        found = compare(comparison, task, chosen, optimizers)
    seconds = seconds_of(problem, records, found)
    summary.show(
        console,
        page(
            [
                (
                    task_table(task, problem, found, seconds),
                    tuned_table(task, found),
                    claims_of(task, found),
                )
            ]
        ),
    )
    console.print(f"{time.perf_counter() - start:.0f} s. Runs are in {out}.")
