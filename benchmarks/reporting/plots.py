"""Figures. Knows numbers and names, nothing of how they came about.

Lines differ by dash as well as by color, so that prints in grey can be read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.reporting.intervals import half_interval

# Okabe-Ito colors and one dash pattern each.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#0072B2", "linestyle": "-."},
    {"color": "#009E73", "linestyle": ":"},
    {"color": "#CC79A7", "linestyle": (0, (6, 1, 1, 1, 1, 1))},
)

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def subplots(path: Path, *shape: int, **options: Any) -> Iterator[Any]:
    """The axes of `plt.subplots` in our style; the figure is saved in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(*shape, layout="constrained", **options)
        yield axes
        figure.savefig(path)
        plt.close(figure)


def learning_curves(
    panels: Mapping[str, Mapping[str, tuple[list[int], np.ndarray]]], *, path: Path, baseline: str
) -> None:
    """Validation error against steps, one panel per optimizer.

    panels: optimizer -> head -> (steps, errors of shape (seeds, steps)). Lines are means over
    seeds, shades span them; a thin line marks the final error of the baseline.
    """
    with subplots(path, 1, len(panels), figsize=(10.5, 3.8), sharey=True, squeeze=False) as grid:
        labels = dict.fromkeys(label for curves in panels.values() for label in curves)
        styles = dict(zip(labels, LINES, strict=False))
        legend = {}
        for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
            for label, (steps, errors) in curves.items():
                mean, line = errors.mean(axis=0), styles[label]
                (legend[label],) = axes.plot(steps, mean, **line)
                if len(errors) > 1:
                    low, high = errors.min(axis=0), errors.max(axis=0)
                    axes.fill_between(steps, low, high, color=line["color"], alpha=0.15, lw=0)
                if label == baseline:
                    legend[f"{label}, final"] = axes.axhline(mean[-1], color="0.5", lw=0.8)
            axes.set(title=title, xlabel="training steps", yscale="log")
            axes.set_xlim(left=0)
        grid[0, 0].set_ylabel("validation MSE (units of u²)")
        grid[0, 0].figure.legend(
            legend.values(), legend.keys(), loc="outside upper center", ncols=3, title="head"
        )


def prediction(
    x: np.ndarray,
    *,
    initial: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    path: Path,
    title: str,
) -> None:
    """One solution on a grid x in radians and its predictions, and below them the errors."""
    with subplots(path, 2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 2)) as (
        above,
        below,
    ):
        above.plot(x, initial, color="0.6", linewidth=1, label="initial state, t = 0")
        above.plot(x, truth, color="0.8", linewidth=6, label="solution, t = 1")
        for line, (name, values) in zip(LINES, predictions.items(), strict=False):
            rms = np.sqrt(np.mean(np.square(values - truth)))
            above.plot(x, values, label=name, **line)
            below.plot(x, values - truth, label=f"{name}, RMS {rms:.1e}", **line)
        above.set(title=title, ylabel="u")
        above.legend()
        below.set(xlabel="x (radians)", ylabel="error of u at t = 1", xlim=(x[0], x[-1]))
        below.set_ylim(top=below.get_ylim()[1] * 1.4)  # room for the legend
        below.legend(ncols=len(predictions), loc="upper right")


class Line(NamedTuple):
    """A curve of several runs."""

    x: Sequence[float]  # (points,)
    runs: np.ndarray  # (runs, points)
    style: Mapping[str, Any] | None = None  # of the line, one of `LINES` unless given


def panels_by_batch_size(
    panels: Mapping[str, Mapping[str, Line]],
    *,
    path: Path,
    ylabel: str,
    xlabel: str = "iterations",
    yscale: str = "linear",
    xscale: str = "linear",
    window: int = 5,
) -> list[Path]:
    """The paper's figures: one column per batch size, one line per method.

    Lines are means over the runs, shades their 95 % confidence intervals, both smoothed over a
    rolling window. Labels keep their style in all columns.
    """
    if not panels:
        return []
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    styles = {label: style_of(index) for index, label in enumerate(labels)}
    width = max(5.0, 3.3 * len(panels))
    columns = max(1, int(width / 2.6))  # of the legend
    rows = -(-len(labels) // columns)
    with subplots(
        path, 1, len(panels), figsize=(width, 3.6 + 0.25 * rows), sharey=True, squeeze=False
    ) as grid:
        legend = {}
        for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
            for label, line in curves.items():
                style = {**styles[label], **(line.style or {})}
                runs = np.array([rolling_mean(run, window) for run in line.runs])
                mean = runs.mean(axis=0)
                (legend[label],) = axes.plot(line.x, mean, **style)
                if len(runs) > 1:
                    half = half_interval(runs)
                    low, high = mean - half, mean + half
                    if yscale == "log":
                        low = np.maximum(low, mean / 10)
                    axes.fill_between(line.x, low, high, color=style["color"], alpha=0.12, lw=0)
            axes.set(title=title, xlabel=xlabel, yscale=yscale, xscale=xscale)
        grid[0, 0].set_ylabel(ylabel)
        grid[0, 0].figure.legend(
            legend.values(), legend.keys(), loc="outside upper center", ncols=columns
        )
    return [path]


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, of fewer at the beginning. NaN where one is not finite."""
    values = np.where(np.isfinite(values), values, np.nan)
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def style_of(index: int) -> dict[str, Any]:
    """Color and dash of a line; markers tell further rounds of the five apart."""
    markers = ("", "o", "s", "^")
    style = dict(LINES[index % len(LINES)])
    marker = markers[index // len(LINES) % len(markers)]
    return {**style, "marker": marker, "markersize": 4, "markevery": 4} if marker else style
