"""Outcomes of a comparison as tables, figures and claims: what all its experiments share.

Between `comparison.py` and the experiments.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.core.comparison import Outcome
from benchmarks.core.methods import Method
from benchmarks.reporting import plots
from benchmarks.reporting.intervals import half_interval
from benchmarks.reporting.summary import Claim, Table


def number_table(
    outcomes: Sequence[Outcome], batch_sizes: Sequence[int], caption: str, digits: str = ".2e"
) -> Table:
    """Methods down, batch sizes across: mean and half the 95 % interval of the reported number."""
    rows = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        cells = [method.optimizer, method.name]
        for batch_size in batch_sizes:
            found = find(outcomes, method, batch_size)
            cells.append("" if found is None else mean_and_interval(found.final, digits))
        rows.append(tuple(cells))
    headings = ("optimizer", "head", *(f"B = {size}" for size in batch_sizes))
    return Table(caption, headings, tuple(rows))


def tuned_table(outcomes: Sequence[Outcome], batch_sizes: Sequence[int]) -> Table:
    """The hyperparameters behind `number_table`, and the time of a step."""
    rows = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        cells = [method.optimizer, method.name]
        for batch_size in batch_sizes:
            found = find(outcomes, method, batch_size)
            if found is None:
                cells.append("")
                continue
            strength = "" if found.strength is None else f", {method.strength} {found.strength:g}"
            cells.append(f"{found.rate:g}{strength} ({1e3 * found.seconds_per_step:.0f} ms)")
        rows.append(tuple(cells))
    headings = ("optimizer", "head", *(f"B = {size}" for size in batch_sizes))
    caption = "Best rate and second hyperparameter by validation, and median milliseconds per step."
    return Table(caption, headings, tuple(rows))


def curves_figure(
    outcomes: Sequence[Outcome],
    batch_sizes: Sequence[int],
    path: Path,
    *,
    ylabel: str,
    yscale: str,
    label: Callable[[Method], str] = lambda method: f"{method.optimizer}, {method.name}",
) -> Path:
    """Test curves, one panel per batch size."""
    panels: dict[str, dict[str, plots.Line]] = {}
    for batch_size in batch_sizes:
        lines = {
            label(outcome.method): plots.Line(outcome.steps, outcome.test)
            for outcome in outcomes
            if outcome.batch_size == batch_size
        }
        if lines:
            panels[f"batch size {batch_size}"] = lines
    plots.panels_by_batch_size(panels, path=path, ylabel=ylabel, yscale=yscale)
    return path


def find(outcomes: Iterable[Outcome], method: Method, batch_size: int) -> Outcome | None:
    """The outcome of a method at a batch size, if it was run."""
    for outcome in outcomes:
        if outcome.method == method and outcome.batch_size == batch_size:
            return outcome
    return None


def compare_pairs(
    sentence: str,
    outcomes: Sequence[Outcome],
    batch_sizes: Sequence[int],
    one: Method,
    other: Method,
    better: Callable[[Outcome, Outcome], bool],
    digits: str = ".2e",
) -> Claim:
    """A claim about two methods at every one of some batch sizes.

    Args:
      sentence: what is claimed.
      outcomes: of the comparison.
      batch_sizes: where it is claimed.
      one: the method said to be better (or level).
      other: the method it is compared with.
      better: decides for one batch size.
      digits: format of the numbers.
    """
    verdicts, evidence = [], []
    for batch_size in batch_sizes:
        left, right = find(outcomes, one, batch_size), find(outcomes, other, batch_size)
        if left is None or right is None:
            return Claim(sentence, None, f"runs at B = {batch_size} are missing")
        verdicts.append(better(left, right))
        evidence.append(
            f"B = {batch_size}: {left.final.mean():{digits}} against "
            f"{right.final.mean():{digits}}{'' if verdicts[-1] else ' (no)'}"
        )
    return Claim(sentence, all(verdicts), "; ".join(evidence))


def lower(left: Outcome, right: Outcome) -> bool:
    """Whether the mean of the left is smaller."""
    return bool(left.final.mean() < right.final.mean())


def higher(left: Outcome, right: Outcome) -> bool:
    """Whether the mean of the left is larger."""
    return bool(left.final.mean() > right.final.mean())


def level(left: Outcome, right: Outcome) -> bool:
    """Whether the 95 % intervals of the means overlap."""
    apart = abs(left.final.mean() - right.final.mean())
    return bool(apart <= half_interval(left.final) + half_interval(right.final))


def mean_and_interval(values: np.ndarray, digits: str) -> str:
    """`mean +- half width of the 95 % interval`."""
    if not np.all(np.isfinite(values)):
        return "diverged"
    half = half_interval(values)
    mean = f"{values.mean():{digits}}"
    return mean if np.isnan(half) else f"{mean} ± {half:{digits}}"
