"""Outcomes of a comparison as tables, figures and claims: what all its experiments share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.core.comparison import Outcome
from benchmarks.core.methods import Method
from benchmarks.reporting import plots
from benchmarks.reporting.intervals import all_of, are_level, half_interval, is_below
from benchmarks.reporting.summary import Claim, Table


def number_table(
    outcomes: Sequence[Outcome], batch_sizes: Sequence[int], caption: str, digits: str = ".2e"
) -> Table:
    """Methods down, batch sizes across: mean and half the 95 % interval of the reported number."""
    return _table(outcomes, batch_sizes, caption, lambda o: mean_and_interval(o.final, digits))


def tuned_table(outcomes: Sequence[Outcome], batch_sizes: Sequence[int]) -> Table:
    """The hyperparameters behind `number_table`."""

    def cell(one: Outcome) -> str:
        strength = "" if one.strength is None else f", {one.method.strength} {one.strength:g}"
        return f"{one.rate:g}{strength}"

    caption = "Best rate and second hyperparameter by validation."
    return _table(outcomes, batch_sizes, caption, cell)


def _table(
    outcomes: Sequence[Outcome],
    batch_sizes: Sequence[int],
    caption: str,
    cell: Callable[[Outcome], str],
) -> Table:
    rows = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        found = [find(outcomes, method, batch_size) for batch_size in batch_sizes]
        cells = (cell(outcome) if outcome else "" for outcome in found)
        rows.append((method.optimizer, method.name, *cells))
    headings = ("optimizer", "head", *(f"B = {size}" for size in batch_sizes))
    return Table(caption, headings, tuple(rows))


def curves_figure(
    outcomes: Sequence[Outcome], batch_sizes: Sequence[int], path: Path, ylabel: str, yscale: str
) -> list[Path]:
    """Test curves, one panel per batch size; nothing where there are no outcomes."""
    panels: dict[str, dict[str, plots.Line]] = {}
    for batch_size in batch_sizes:
        lines = {
            f"{one.method.optimizer}, {one.method.name}": plots.Line(one.steps, one.test)
            for one in outcomes
            if one.batch_size == batch_size
        }
        if lines:
            panels[f"batch size {batch_size}"] = lines
    return plots.panels_by_batch_size(panels, path=path, ylabel=ylabel, yscale=yscale)


def curves_by_optimizer(
    outcomes: Sequence[Outcome], batch_sizes: Sequence[int], path: Path, ylabel: str, yscale: str
) -> list[Path]:
    """A figure each: the first optimizer's at the path, the others' beside it."""
    drawn: list[Path] = []
    for name in dict.fromkeys(outcome.method.optimizer for outcome in outcomes):
        shown = [outcome for outcome in outcomes if outcome.method.optimizer == name]
        at = path.with_stem(f"{path.stem}_{name.lower()}") if drawn else path
        drawn += curves_figure(shown, batch_sizes, at, ylabel, yscale)
    return drawn


def find(outcomes: Iterable[Outcome], method: Method, batch_size: int) -> Outcome | None:
    """The outcome of a method at a batch size, if it was run."""
    for outcome in outcomes:
        if outcome.method == method and outcome.batch_size == batch_size:
            return outcome
    return None


class Pair(NamedTuple):
    """A sentence about two methods at every one of some batch sizes."""

    sentence: str  # what is claimed
    one: Method  # the method said to be better (or level)
    other: Method  # the method it is compared with
    better: Callable[[Outcome, Outcome], bool | None]  # decides for one batch size; None: level
    batch_sizes: Sequence[int] | None = None  # where it is claimed; `None`: everywhere


def decide(
    pair: Pair, outcomes: Sequence[Outcome], batch_sizes: Sequence[int], digits: str = ".2e"
) -> Claim:
    """A pair as a claim, by the outcomes of a comparison at these batch sizes."""
    pairs = {}
    for batch_size in pair.batch_sizes or batch_sizes:
        left, right = (find(outcomes, method, batch_size) for method in (pair.one, pair.other))
        if left is None or right is None:
            return Claim(pair.sentence, None, f"runs at B = {batch_size} are missing")
        pairs[f"B = {batch_size}"] = left, right
    return compared(pair.sentence, pairs, pair.better, digits)


def compared(
    sentence: str,
    pairs: Mapping[str, tuple[Outcome, Outcome]],
    better: Callable[[Outcome, Outcome], bool | None],
    digits: str,
) -> Claim:
    """A claim about two outcomes at every one of some places.

    One place where it is wrong refutes it; one where the two are level leaves it undecided.
    """
    finals = {place: (left.final, right.final) for place, (left, right) in pairs.items()}
    return judged(sentence, finals, [better(*pair) for pair in pairs.values()], digits)


def judged(
    sentence: str,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    verdicts: Sequence[bool | None],
    digits: str,
) -> Claim:
    """A claim about two numbers, one per seed, at every one of some places, and its verdicts."""
    words = {True: "", False: " (no)", None: " (level)"}
    evidence = (
        f"{place}: {left.mean():{digits}} against {right.mean():{digits}}{words[verdict]}"
        for (place, (left, right)), verdict in zip(pairs.items(), verdicts, strict=True)
    )
    return Claim(sentence, all_of(verdicts), "; ".join(evidence))


def lower(left: Outcome, right: Outcome) -> bool | None:
    """Whether the mean of the left is smaller; None if they are level."""
    return is_below(left.final, right.final)


def higher(left: Outcome, right: Outcome) -> bool | None:
    """Whether the mean of the left is larger; None if they are level."""
    return is_below(right.final, left.final)


def level(left: Outcome, right: Outcome) -> bool:
    """Whether the 95 % interval of the difference contains zero."""
    return are_level(left.final, right.final)


def mean_and_interval(values: np.ndarray, digits: str) -> str:
    """`mean +- half width of the 95 % interval`."""
    if not np.all(np.isfinite(values)):
        return "diverged"
    half = half_interval(values)
    mean = f"{values.mean():{digits}}"
    return mean if np.isnan(half) else f"{mean} ± {half:{digits}}"
