"""rules: which head to take, the best gradient head, a fixed penalty or one that tunes itself.

Every row is tuned jointly with the same budget.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from benchmarks.core import tuner
from benchmarks.core.comparison import Comparison, Config, Outcome
from benchmarks.core.methods import ADAPTIVE, EQUATION_17, PROXIMAL, SOFTMAX, TWO_TIMESCALE, Method
from benchmarks.core.problem import Problem
from benchmarks.core.records import Records
from benchmarks.core.runner import MissingError, Runner, running
from benchmarks.core.timing import interleaved, training_step
from benchmarks.core.training import first_at_or_below
from benchmarks.core.tuner import Values
from benchmarks.experiments import Experiment
from benchmarks.reporting.comparisons import compared, higher, level, lower, mean_and_interval
from benchmarks.reporting.summary import Claim, Summary, Table, show
from benchmarks.tasks import burgers, images, kdv, tables

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
# In the middle of the best rates of both, as trials found them; see `JOINTLY` for the search.
CLASSIFIERS_START = {"SGD": 1.0, "Adam": 0.01, "Muon": 0.03}
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
        return burgers.make_problem(burgers.SIZES["cpu"], out)
    if task == "kdv":
        return kdv.make_problem()
    if task == "rf1" or task == "california":
        return tables.make_problem(task, data)
    return images.make_problem(task, images.SIZES[task, "cpu"], data)


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
    if task in CLASSIFIERS:
        rate = CLASSIFIERS_START[row.optimizer]
    if row.head in methods:
        return comparison.tune(method, row.batch_size, SEEDS, (rate, strength or 1.0))
    # Where a slow head was good in trials: in classification. Elsewhere the ordinary one.
    start = rate, 0.01 if task in CLASSIFIERS else 1.0
    zeros = comparison.tune(method, row.batch_size, SEEDS, start)
    # The other initialization only where zeros are good: it makes a difference of a few percent.
    lecun = comparison.tune(
        method._replace(init=None), row.batch_size, SEEDS, candidates=best_candidates(zeros)
    )
    sign = comparison.problem.sign
    return min(zeros, lecun, key=lambda outcome: sign * outcome.validation[:, -1].mean())


def best_candidates(outcome: Outcome) -> list[Values]:
    """The three best of those that an outcome's search tried; among equals by their digits."""
    return sorted(outcome.tried, key=lambda values: (outcome.tried[values], str(values)))[:3]


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
        with suppress(MissingError):
            found[row] = tune(comparison, row, task)
    return found


def seconds_of(comparison: Comparison, found: Found) -> dict[Row, float]:
    """Seconds of a step, measured in turn for the rows of one optimizer and batch size."""
    seconds: dict[Row, float] = {}
    for optimizer, batch_size in dict.fromkeys((row.optimizer, row.batch_size) for row in found):
        rows = [row for row in found if (row.optimizer, row.batch_size) == (optimizer, batch_size)]

        def measure(rows: list[Row] = rows) -> dict[str, list[float]]:
            steps = {
                row.head: training_step(comparison, config_of(found[row]), num_steps=1000)
                for row in rows
            }
            return {"seconds": [float(np.median(s)) for s in interleaved(steps, 30).values()]}

        key = {"seconds per step": comparison.problem.settings, "rows": [list(row) for row in rows]}
        with suppress(MissingError):
            record = comparison.runner.run(key, measure, f"B {batch_size:<5} {optimizer} in turn")
            seconds |= dict(zip(rows, record["seconds"], strict=True))
    return seconds


def config_of(outcome: Outcome) -> Config:
    """The first of an outcome's runs."""
    return Config(outcome.method, outcome.batch_size, outcome.rate, outcome.strength, seed=0)


def near_in_error(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the self-tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() <= REGRESSION * fixed.final.mean())


def near_in_accuracy(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the self-tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() >= fixed.final.mean() - CLASSIFICATION)


def table_of(task: Task, found: Found, caption: str, cell: Callable[[Row, Outcome], str]) -> Table:
    """Rows: batch size and optimizer; columns: the heads."""
    heads, lines = heads_of(task), []
    for batch_size, optimizer in dict.fromkeys((r.batch_size, r.optimizer) for r in found):
        rows = [Row(optimizer, head, batch_size) for head in heads]
        cells = (cell(row, found[row]) if row in found else "" for row in rows)
        lines.append((str(batch_size), optimizer, *cells))
    return Table(f"{task}: {caption}", ("B", "optimizer", *heads), tuple(lines))


def task_table(task: Task, problem: Problem, found: Found, seconds: Mapping[Row, float]) -> Table:
    """Errors, each with its time to the first head's end."""
    sign = problem.sign

    def cell(row: Row, outcome: Outcome) -> str:
        text = mean_and_interval(outcome.final, digits_of(task))
        baseline = found.get(row._replace(head=GRADIENT_HEAD))
        if row not in seconds or baseline is None:
            return text
        text += f"; {1e3 * seconds[row]:.1f} ms"
        if outcome is baseline:
            return text + f", {seconds[row] * outcome.steps[-1]:.1f} s"
        curve, level = sign * outcome.test.mean(axis=0), sign * baseline.test[:, -1].mean()
        steps = first_at_or_below(outcome.steps, curve, level)
        return text + (", never" if steps is None else f", {seconds[row] * steps:.1f} s")

    caption = (
        f"test {problem.metric}, mean ± half the 95 % interval; milliseconds per step; "
        "seconds of training until the test curve is as good as the gradient head's at its end."
    )
    return table_of(task, found, caption, cell)


def tuned_table(task: Task, found: Found) -> Table:
    """The hyperparameters behind `task_table`."""

    def cell(row: Row, outcome: Outcome) -> str:
        strength = "" if outcome.strength is None else f", {outcome.strength:g}"
        lecun = outcome.method.head == TWO_TIMESCALE and outcome.method.init is None
        return f"{outcome.rate:g}{strength}{', LeCun' if lecun else ''}"

    caption = "best rate, and ratio or lam; a gradient head starts at zero or LeCun's."
    return table_of(task, found, caption, cell)


def digits_of(task: Task) -> str:
    """How its metric is printed."""
    return ".3f" if task in CLASSIFIERS else ".2e"


def claims_of(task: Task, found: Found) -> list[Claim]:
    """What is said of two heads, at every batch size with every optimizer that was run."""
    classes, digits = task in CLASSIFIERS, digits_of(task)
    better, near = (higher, near_in_accuracy) if classes else (lower, near_in_error)
    by = "2 points" if classes else "10 %"
    sentences = [
        (
            "a fixed penalty is better than a gradient head of any ratio.",
            FIXED,
            GRADIENT_HEAD,
            better,
        ),
        (f"a self-tuned penalty is within {by} of the best fixed.", TUNED, FIXED, near),
        (
            "the softmax head is better than cross entropy by gradient, of any ratio.",
            SOFTMAX_HEAD,
            CROSS_ENTROPY,
            better,
        ),
    ]
    claims = []
    for sentence, head, other, holds in sentences[: 3 if classes else 2]:
        pairs = {
            f"{row.optimizer} {row.batch_size}": (outcome, found[row._replace(head=other)])
            for row, outcome in found.items()
            if row.head == head and row._replace(head=other) in found
        }
        claims.append(compared(f"{task}: {sentence}", pairs, holds, digits))
    return claims


def glance_rows(task: Task, found: Found) -> list[tuple[str, ...]]:
    """A task's lines of the table for a decision: what each head does to the gradient head's."""
    columns = {"fixed lam": (FIXED, GRADIENT_HEAD), "self-tuned": (TUNED, GRADIENT_HEAD)}
    if task in CLASSIFIERS:
        columns["softmax, fixed lam"] = (SOFTMAX_HEAD, CROSS_ENTROPY)

    def cell(row: Row, other: str) -> str:
        ours, theirs = found.get(row), found.get(row._replace(head=other))
        if ours is None or theirs is None:
            return ""
        mean, baseline = ours.final.mean(), theirs.final.mean()
        text = f"{mean - baseline:+.3f}" if task in CLASSIFIERS else f"{mean / baseline:.2f}"
        return text + (" (level)" if level(ours, theirs) else "")

    rows = []
    for batch_size in dict.fromkeys(row.batch_size for row in found):
        for name, (head, other) in columns.items():
            cells = [cell(Row(optimizer, head, batch_size), other) for optimizer in OPTIMIZERS]
            if any(cells):
                rows.append((task, str(batch_size), name, *cells))
    return rows


GLANCE = (
    "Regression: test error, as a share of that of the best gradient head of any ratio. "
    "Classification: test accuracy minus that of the best gradient head, squared loss against "
    "squared loss and softmax against cross entropy. Level: the 95 % intervals of the two overlap."
)
Part = tuple[Table, Table, list[Claim], list[tuple[str, ...]]]


def part_of(
    task: Task, comparison: Comparison, batch_sizes: tuple[int, ...], optimizers: tuple[str, ...]
) -> Part | None:
    """What is found of a task; nothing if there is nothing."""
    found = compare(comparison, task, batch_sizes, optimizers)
    numbers = task_table(task, comparison.problem, found, seconds_of(comparison, found))
    if not found:
        return None
    return numbers, tuned_table(task, found), claims_of(task, found), glance_rows(task, found)


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """The page for a decision, of all tasks that were run."""
    parts = []
    for task in get_args(Task):
        problem, runner = make_problem(task, None, Path()), Runner(records, make=False)
        comparison = Comparison(problem, runner, tuner.JOINTLY)
        parts.append(part_of(task, comparison, BATCH_SIZES[task], OPTIMIZERS))
    return page(filter(None, parts))


def page(parts: Iterable[Part]) -> Summary:
    """Tables and claims of tasks as one summary."""
    listed = list(parts)
    return Summary(
        title="Which head to take",
        command="python -m benchmarks rules --task <task>",
        setup="`cfll.prox(lam)` and `cfll.adaptive_prox()`, in the order of Eq. (17), against "
        "gradient heads whose rate is 1e-4 to 1e3 times the backbone's, started at zero or as "
        "LeCun; with a squared loss, and for classes with cross entropy, too, against "
        "`cfll.softmax(lam)`. Every row has the same budget: 20 runs of a joint search over half "
        "decades of rates and decades of ratio or lam, the best three on a second seed, the best "
        "on five; chosen by the last validation metric. All rates decay on a cosine. Times per "
        "step are measured in turn.",
        tables=[
            Table(
                GLANCE,
                ("task", "B", "head", *OPTIMIZERS),
                tuple(row for *_, rows in listed for row in rows),
            ),
            *(table for part in listed for table in part[:2]),
        ],
        claims=[claim for part in listed for claim in part[2]],
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

    Two processes may share a folder if they have different tasks.

    Args:
      task: what is learned.
      optimizers: only these.
      batch_sizes: only these; all of the task if empty.
      data: folder of CIFAR-10's official files, of Omniglot's zips, or of the tables' .csv.
      out: folder of finished runs and generated data.
    """
    chosen = batch_sizes or BATCH_SIZES[task]
    num_runs = RUNS_PER_ROW * len(heads_of(task)) * len(optimizers) * len(chosen)
    with running(out, "rules", num_runs) as runner:
        comparison = Comparison(make_problem(task, data, out), runner, tuner.JOINTLY)
        part = part_of(task, comparison, chosen, optimizers)
    show(page(filter(None, [part])))


EXPERIMENTS = (Experiment(rules, summarize, place=1),)
