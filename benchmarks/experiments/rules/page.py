"""What is said of the cells: numbers, hyperparameters, claims, and all tasks at a glance."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.core import tuner
from benchmarks.core.comparison import Outcome
from benchmarks.core.methods import TWO_TIMESCALE
from benchmarks.core.problem import Problem
from benchmarks.core.training import first_at_or_below
from benchmarks.experiments.rules.rows import (
    CLASSIFIERS,
    CROSS_ENTROPY,
    FIXED,
    GRADIENT_HEAD,
    NUM_SEEDS_OF_STARTS,
    OPTIMIZERS,
    SOFTMAX_HEAD,
    TUNED,
    Found,
    Row,
    Task,
    heads_of,
)
from benchmarks.reporting.comparisons import compared, higher, level, lower, mean_and_interval
from benchmarks.reporting.summary import Claim, Table

REGRESSION, CLASSIFICATION = 1.1, 0.02  # how far self-tuned may be from the best fixed


def near_in_error(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the self-tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() <= REGRESSION * fixed.final.mean())


def near_in_accuracy(adaptive: Outcome, fixed: Outcome) -> bool:
    """Whether the self-tuned is as good as the best fixed, or almost."""
    return bool(adaptive.final.mean() >= fixed.final.mean() - CLASSIFICATION)


def nearness_of(task: Task) -> tuple[str, Callable[[Outcome, Outcome], bool]]:
    """How near is near, in words, and what decides it."""
    return ("2 points", near_in_accuracy) if task in CLASSIFIERS else ("10 %", near_in_error)


def table_of(
    task: Task,
    found: Found,
    caption: str,
    cell: Callable[[Row, Outcome], str],
    heads: tuple[str, ...] | None = None,
) -> Table:
    """Rows: batch size and optimizer; columns: the heads, all of a task if none are given."""
    heads, lines = heads or heads_of(task), []
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
        cross_entropy = row.head in (CROSS_ENTROPY, SOFTMAX_HEAD)
        head = CROSS_ENTROPY if cross_entropy else GRADIENT_HEAD
        baseline = found.get(row._replace(head=head))
        if row not in seconds or baseline is None:
            return text
        text += f"; {1e3 * seconds[row]:.1f} ms"
        curve, level = sign * outcome.test.mean(axis=0), sign * baseline.test[:, -1].mean()
        steps = first_at_or_below(outcome.steps, curve, level)
        return text + (", never" if steps is None else f", {seconds[row] * steps:.1f} s")

    caption = (
        f"test {problem.metric}, mean ± half the 95 % interval; milliseconds per step; "
        "seconds of training, compilation excluded, until the test curve is first as good as the "
        "gradient head's at its end (cross entropy's, for it and softmax)."
    )
    return table_of(task, found, caption, cell)


def tuned_table(task: Task, found: Found) -> Table:
    """The hyperparameters behind `task_table`."""

    def cell(row: Row, outcome: Outcome) -> str:
        strength = "" if outcome.strength is None else f", {outcome.strength:g}"
        lecun = outcome.method.head == TWO_TIMESCALE and outcome.method.init is None
        axes = tuner.JOINTLY.axes(outcome.method.strength)
        chosen = zip((outcome.rate, outcome.strength), axes, strict=False)
        at_end = " (end)" if any(value in (axis[0], axis[-1]) for value, axis in chosen) else ""
        return f"{outcome.rate:g}{strength}{', LeCun' if lecun else ''}{at_end}"

    caption = (
        "best rate, and ratio or lam; a gradient head starts at zero or LeCun's. End: of its grid."
    )
    return table_of(task, found, caption, cell)


def digits_of(task: Task) -> str:
    """How its metric is printed."""
    return ".3f" if task in CLASSIFIERS else ".2e"


def claims_of(task: Task, found: Found) -> list[Claim]:
    """What is said of two heads, at every batch size with every optimizer that was run."""
    classes, digits = task in CLASSIFIERS, digits_of(task)
    better, (by, near) = higher if classes else lower, nearness_of(task)
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


def started_part(
    task: Task, found: Found, starts: Mapping[float, Found]
) -> tuple[list[Table], list[Claim]]:
    """What the start of a self-tuned penalty does; nothing if none was chosen."""
    digits, (by, near) = digits_of(task), nearness_of(task)
    tuned = {
        row: outcome._replace(final=outcome.final[:NUM_SEEDS_OF_STARTS])
        for row, outcome in found.items()
        if any(row in rows for rows in starts.values())
    }
    columns = dict(tuned)
    pairs = {}
    for lam, rows in starts.items():
        for row, outcome in rows.items():
            columns[row._replace(head=f"from {lam:g}")] = outcome
            pairs[f"{row.optimizer} {row.batch_size} from {lam:g}"] = (outcome, tuned[row])
    if not pairs:
        return [], []
    caption = f"the self-tuned lam from other starts than its own, on {NUM_SEEDS_OF_STARTS} seeds."
    heads = (TUNED, *(f"from {lam:g}" for lam in starts))

    def cell(row: Row, outcome: Outcome) -> str:
        return mean_and_interval(outcome.final, digits)

    sentence = f"{task}: from any start a self-tuned penalty is within {by} of its own start."
    return [table_of(task, columns, caption, cell, heads)], [
        compared(sentence, pairs, near, digits)
    ]


def glance_rows(task: Task, found: Found) -> list[tuple[str, ...]]:
    """A task's lines of the table for a decision: what each head does to the gradient head's."""
    compared: dict[str, tuple[tuple[str, str], ...]] = {}
    compared["lam fixed / self-tuned"] = ((FIXED, GRADIENT_HEAD), (TUNED, GRADIENT_HEAD))
    if task in CLASSIFIERS:
        against = "lam fixed / self-tuned, against cross entropy"
        compared[against] = ((FIXED, CROSS_ENTROPY), (TUNED, CROSS_ENTROPY))
        compared["softmax, lam fixed"] = ((SOFTMAX_HEAD, CROSS_ENTROPY),)

    def change(row: Row, other: str) -> str:
        ours, theirs = found.get(row), found.get(row._replace(head=other))
        if ours is None or theirs is None:
            return ""
        mean, baseline = ours.final.mean(), theirs.final.mean()
        ratio = mean / baseline
        text = f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
        if task in CLASSIFIERS:
            text = f"{mean - baseline:+.3f}"
        return text + (" (level)" if level(ours, theirs) else "")

    rows = []
    for batch_size in dict.fromkeys(row.batch_size for row in found):
        for name, pairs in compared.items():
            cells = [
                " / ".join(
                    filter(None, (change(Row(o, head, batch_size), other) for head, other in pairs))
                )
                for o in OPTIMIZERS
            ]
            if any(cells):
                rows.append((task, str(batch_size), name, *cells))
    return rows


# In milliseconds of a step with a gradient head: from, below.
STEPS = ((0, 3), (3, 10), (10, 1000))


def cost_table(seconds: Sequence[Mapping[Row, float]]) -> Table:
    """What a head in closed form adds to a step, over all that were timed in turn."""
    cases = [
        [rows[row._replace(head=head)] for head in (GRADIENT_HEAD, FIXED, TUNED)]
        for rows in seconds
        for row in rows
        if row.head == TUNED
    ]
    lines = []
    for least, most in STEPS:
        times = [case for case in cases if least <= 1e3 * case[0] < most]
        if times:
            gradient, fixed, tuned = np.array(times).T
            ratios = (
                f"{np.median(ratio):.2f} ({ratio.max():.2f})"
                for ratio in (fixed / gradient, tuned / fixed)
            )
            lines.append((f"{least} to {most} ms", str(len(times)), *ratios))
    return Table(
        "Time of a step, by that of the gradient head: medians (largest) of ratios over tasks, "
        "optimizers and batch sizes.",
        ("gradient head", "cases", "fixed / gradient", "self-tuned / fixed"),
        tuple(lines),
    )


GLANCE = (
    "Regression: test error, as a share of that of the best gradient head of any ratio. "
    "Classification: test accuracy minus that of the best gradient head, squared loss against "
    "squared loss where nothing else is said, softmax against cross entropy. Level: the 95 % "
    "interval of the difference contains zero (Welch's test)."
)
