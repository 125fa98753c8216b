"""rules: which head to take, the best gradient head, a fixed penalty or one that tunes itself.

Every row is tuned jointly with the same budget.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from benchmarks.core import tuner
from benchmarks.core.comparison import Comparison
from benchmarks.core.records import Records
from benchmarks.core.runner import Runner, running
from benchmarks.experiments import Experiment
from benchmarks.experiments.rules.page import (
    GLANCE,
    claims_of,
    cost_table,
    glance_rows,
    started_part,
    task_table,
    tuned_table,
)
from benchmarks.experiments.rules.rows import (
    BATCH_SIZES,
    OPTIMIZERS,
    Row,
    Task,
    compare,
    heads_of,
    make_problem,
    seconds_of,
    started,
)
from benchmarks.reporting.summary import Claim, Summary, Table, show

TASKS = (
    "Tasks: Fourier neural operators on Burgers' equation, on Korteweg and de Vries', and "
    "on Navier and Stokes' in two dimensions (navier_stokes); a DeepONet on "
    "Burgers'; lorenz, a recurrent network that sees one coordinate of the Lorenz system and "
    "predicts all three; rf1 and california, tables for a perceptron; cifar10 and omniglot, "
    "convolutional networks. "
)
REASONS = (
    "Why a start is not forgotten: the backbone's gradient is a multiple of the head, so a first "
    "head that is large because features cancel (kdv from 0.001) changes them more in a few steps "
    "than a penalty mends later, and one that hardly moves (from 100000) teaches the backbone "
    "little for a good part of a short run. So `cfll.adaptive_prox` has no start to set: the first "
    "batch chooses, by the error and the size of the head. Why a self-tuned step takes twice as "
    "long as a fixed one at burgers, B = 64: its temporaries (68 MiB, fixed 50) pass the 64 MiB "
    "beyond which glibc maps memory anew at every step. With MALLOC_ARENA_MAX=1, "
    "MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=8589934592 and MALLOC_TOP_PAD_=536870912 in the "
    "environment it takes 1.2 times as long."
)
RUNS_PER_ROW = 26  # about; what the progress bar expects


class Part(NamedTuple):
    """What is found of a task."""

    tables: list[Table]
    claims: list[Claim]
    glance: list[tuple[str, ...]]  # its lines of the table for a decision
    seconds: Mapping[Row, float]  # of a step


def part_of(
    task: Task, comparison: Comparison, batch_sizes: tuple[int, ...], optimizers: tuple[str, ...]
) -> Part | None:
    """What is found of a task; nothing if there is nothing."""
    found = compare(comparison, task, batch_sizes, optimizers)
    seconds = seconds_of(comparison, found)
    numbers = task_table(task, comparison.problem, found, seconds)
    if not found:
        return None
    tables, claims = started_part(task, found, started(comparison, found))
    tables = [numbers, tuned_table(task, found), *tables]
    return Part(tables, claims_of(task, found) + claims, glance_rows(task, found), seconds)


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """The page for a decision, of all tasks that were run."""
    parts = []
    for task in get_args(Task):
        problem, runner = make_problem(task, None, Path()), Runner(records, make=False)
        comparison = Comparison(problem, runner)
        parts.append(part_of(task, comparison, BATCH_SIZES[task], OPTIMIZERS))
    return page(filter(None, parts))


def page(parts: Iterable[Part]) -> Summary:
    """Tables and claims of tasks as one summary."""
    listed = list(parts)
    return Summary(
        title="Which head to take",
        command="python -m benchmarks rules --task <task>",
        setup=TASKS
        + "`cfll.prox(lam)` and `cfll.adaptive_prox()`, in the order of Eq. (17), against "
        "gradient heads whose rate is 1e-6 to 1e3 times the backbone's, started at zero or as "
        "LeCun; with a squared loss, and for classes with cross entropy, too, against "
        f"`cfll.softmax(lam)`. {tuner.JOINTLY.words}; the best on five seeds. All rates decay "
        "on a cosine. Times per step are measured in turn.",
        tables=[
            Table(
                GLANCE,
                ("task", "B", "head", *OPTIMIZERS),
                tuple(row for part in listed for row in part.glance),
            ),
            cost_table([part.seconds for part in listed]),
            *(table for part in listed for table in part.tables),
        ],
        claims=[claim for part in listed for claim in part.claims],
        reasons=REASONS,
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
        comparison = Comparison(make_problem(task, data, out), runner)
        part = part_of(task, comparison, chosen, optimizers)
    show(page(filter(None, [part])))


EXPERIMENTS = (Experiment(rules, summarize, place=1),)
