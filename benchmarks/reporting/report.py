"""The table of a comparison: on the terminal, as Markdown and as JSON.

Beside `plots.py`: knows outcomes, nothing of how they came about.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import cfll
from benchmarks.core.sweep import Outcome

HEADINGS = ("optimizer", "head", "test MSE", "ratio", "steps to match", "ms/step", "rate")

EXPLANATION = "\n".join(  # a line each: the terminal wraps them where it ends
    (
        "ratio: to the gradient head with the same optimizer, after as many steps.",
        "steps to match: until the validation error, measured twice an epoch, is at or below the "
        "last one of that gradient head; *: in a run of half the length, with its own decay.",
        "ms/step: median, compilation excluded. rate: the best by the last validation error.",
    )
)


def summarize(outcomes: Sequence[Outcome], baseline: str) -> list[dict[str, Any]]:
    """The numbers of the table, each row next to its optimizer's baseline.

    Args:
      outcomes: the rows.
      baseline: the head that the others are compared with.
    """
    baselines = {o.row.optimizer: o for o in outcomes if o.row.head == baseline}

    def numbers(outcome: Outcome) -> dict[str, Any]:
        compared = baselines[outcome.row.optimizer]
        to_match = compared.runs.last_error
        test_mse = float(np.mean(outcome.test_errors))
        return {
            **outcome.row._asdict(),
            "test_mse": test_mse,
            "test_mse_per_seed": outcome.test_errors,
            "ratio": test_mse / float(np.mean(compared.test_errors)),
            "num_steps": outcome.runs.steps[-1],
            "steps_to_match": outcome.runs.steps_to(to_match),
            "steps_to_match_in_half_run": outcome.half and outcome.half.steps_to(to_match),
            "seconds_per_step": outcome.runs.seconds_per_step,
            "rate": outcome.rate,
            "validation_mse_per_rate": {
                f"{rate:.4g}": error if math.isfinite(error) else None
                for rate, error in outcome.rates.items()
            },
        }

    return [numbers(outcome) for outcome in outcomes]


def show(console: Console, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """The table on the terminal, 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for index, numbers in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1]["optimizer"] != numbers["optimizer"]
        table.add_row(*_cells(numbers), end_section=last)
    console.print(table)
    console.print(f"{caption}\n{EXPLANATION}", highlight=False)


def write(
    out: Path, rows: Sequence[Mapping[str, Any]], caption: str, settings: Mapping[str, Any]
) -> None:
    """The table as results.md, the numbers behind it as results.json."""
    lines = [HEADINGS, ("---", "---", *["---:"] * (len(HEADINGS) - 2)), *map(_cells, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (out / "results.md").write_text(f"{table}\n\n{caption}\n{EXPLANATION}\n".replace("*", r"\*"))
    results = {
        "settings": settings,
        "versions": {"cfll": cfll.__version__, "jax": jax.__version__, "optax": optax.__version__},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "rows": rows,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def _cells(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    whole, half = numbers["steps_to_match"], numbers["steps_to_match_in_half_run"]
    matched = f"{half} *" if half is not None else "never" if whole is None else f"{whole}"
    return (
        numbers["optimizer"],
        numbers["head"],
        f"{numbers['test_mse']:.2e}",
        f"{numbers['ratio']:.2f}",
        f"{matched} / {numbers['num_steps']}",
        f"{1e3 * numbers['seconds_per_step']:.1f}",
        f"{numbers['rate']:.4g}",
    )
