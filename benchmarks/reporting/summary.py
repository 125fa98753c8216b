"""What an experiment says in the end: tables, figures, and which sentences hold here.

An experiment turns its records into a `Summary`; the terminal and RESULTS.md show the same one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

Item = TypeVar("Item")


class Claim(NamedTuple):
    """A sentence that can be wrong, and what was measured."""

    sentence: str  # in the words of the paper, or of the hypothesis, with its place
    holds: bool | None  # here; `None` if the runs that would decide are missing
    evidence: str  # the figures that decide, in one sentence, with units


class Table(NamedTuple):
    """Cells as they are printed."""

    caption: str  # what is in it, with units
    headings: tuple[str, ...]  # one per column
    rows: tuple[tuple[str, ...], ...]  # the cells, left to right


def tabulate(
    caption: str, items: Iterable[Item], columns: Mapping[str, Callable[[Item], str]]
) -> Table:
    """A row for each item, a column for each heading and what makes its cells."""
    rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
    return Table(caption, tuple(columns), rows)


class Summary(NamedTuple):
    """What an experiment found."""

    title: str  # with the number of the paper's figure
    command: str  # what was typed
    setup: str  # data, sizes, tuning and everything that differs from the paper, in Markdown
    tables: Sequence[Table]  # the numbers
    claims: Sequence[Claim]  # what they say
    figures: Sequence[Path]  # the pictures, as paths
    reasons: str = ""  # why claims do not hold, as far as it was found out, in Markdown


def verdict(claim: Claim) -> str:
    """The word before a claim."""
    return {True: "holds", False: "does not hold here", None: "not decided"}[claim.holds]


def show(summary: Summary) -> None:
    """Print a summary on the terminal."""
    console = Console(highlight=False)
    console.rule(summary.title)
    console.print(summary.setup)
    for table in summary.tables:
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for index, heading in enumerate(table.headings):
            shown.add_column(heading, justify="left" if index == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        console.print(table.caption)
    for claim in summary.claims:
        console.print(f"[bold]{verdict(claim)}[/bold]: {claim.sentence}\n    {claim.evidence}")
    if summary.reasons:
        console.print(summary.reasons)
    for figure in summary.figures:
        console.print(f"figure: {figure}")


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True
) -> str:
    """Lines of a table; all columns but the first are numbers, set to the right."""
    rule = ("---", *["---:" if numbers else "---"] * (len(headings) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *rows))


def to_markdown(summary: Summary, folder: Path) -> str:
    """A section of RESULTS.md, which lies in this folder and the figures below it."""
    parts = [f"## {summary.title}", f"```sh\n{summary.command}\n```", summary.setup]
    parts += [f"![{summary.title}]({path.relative_to(folder)})" for path in summary.figures]
    for table in summary.tables:
        parts.append(f"{markdown_table(table.headings, table.rows)}\n\n{table.caption}")
    if summary.claims:
        rows = [(c.sentence, f"**{verdict(c)}**", c.evidence) for c in summary.claims]
        parts.append(markdown_table(("claim", "here", "measured"), rows, numbers=False))
    if summary.reasons:
        parts.append(summary.reasons)
    return "\n\n".join(parts) + "\n"
