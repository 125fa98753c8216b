"""Error of the predictions over the condition number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.experiments.numerics.measure import SOLVERS, Solved
from benchmarks.experiments.numerics.problems import SPECTRUM, Settings
from benchmarks.experiments.numerics.tables import worst
from benchmarks.reporting import plots

_MARKERS = ("o", "s", "^", "D", "v")
_NO_ANSWER = 30.0  # where NaN is drawn


def draw(settings: Settings, solved: Sequence[Solved], path: Path) -> list[Path]:
    """A column per dtype; nothing if there is nothing."""
    if not solved:
        return []
    sizes = dict(settings.sizes)
    strong = min(penalty for penalty in settings.penalties if penalty)
    panels = (("tall", 0.0), ("wide", strong))
    with plots.subplots(
        path, len(panels), len(settings.dtypes), figsize=(10.5, 7), sharex=True, squeeze=False
    ) as grid:
        legend: dict[str, Any] = {}
        for axes, dtype in zip(grid[0], settings.dtypes, strict=True):
            axes.set_title(dtype)
        for line_of_axes, (shape, penalty) in zip(grid, panels, strict=True):
            for axes, dtype in zip(line_of_axes, settings.dtypes, strict=True):
                here = [
                    one
                    for one in solved
                    if (*one.case[:4],) == (dtype, SPECTRUM, sizes[shape], penalty)
                ]
                _draw_panel(axes, here, legend)
                axes.set(ylim=(1e-17, 3 * _NO_ANSWER))
        for axes, (shape, penalty) in zip(grid[:, 0], panels, strict=True):
            n, d, _ = sizes[shape]
            lam = f"lam = {penalty:g} of the largest eigenvalue" if penalty else "no penalty"
            axes.set_ylabel(f"{n} samples, {d} features\n{lam}\nrelative error of predictions")
        for axes in grid[-1]:
            axes.set_xlabel("condition number of the features")
        grid[0, 0].figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside upper center",
            ncols=len(legend),
            handlelength=4,
            title="filled: rcond is healthy; hollow: it calls the system singular; cross: NaN",
        )
    return [path]


def _draw_panel(axes: Any, solved: Sequence[Solved], legend: dict[str, Any]) -> None:
    for index, solver in enumerate(SOLVERS):
        here = [one for one in solved if one.solver == solver]
        if not here:
            continue
        conditions = list(dict.fromkeys(one.case.condition for one in here))
        groups = [[one for one in here if one.case.condition == c] for c in conditions]
        errors = np.array([worst(group)[1] for group in groups])
        warned = np.array([all(one.warned for one in group) for group in groups])
        style = plots.LINES[index]
        marker, failed = _MARKERS[index], ~np.isfinite(errors)
        shown = np.where(failed, np.nan, np.maximum(errors, 1e-16))
        # Lines that lie on each other stay visible: the first is the widest.
        width = 4.5 - 0.8 * index
        (line,) = axes.loglog(conditions, shown, **style | {"linewidth": width, "alpha": 0.8})
        for mask, face in ((~warned & ~failed, style["color"]), (warned & ~failed, "white")):
            axes.loglog(
                np.array(conditions)[mask],
                shown[mask],
                linestyle="",
                marker=marker,
                color=style["color"],
                markerfacecolor=face,
                markersize=8 - index,
            )
        # Side by side: several solvers have no answer at the same condition number.
        axes.loglog(
            np.array(conditions)[failed] * 1.35 ** (index - 2),
            np.full(failed.sum(), _NO_ANSWER),
            linestyle="",
            marker="x",
            color=style["color"],
            markersize=5,
        )
        legend.setdefault(solver, _handle(line, marker))


def _handle(line: Any, marker: str) -> mpl.lines.Line2D:
    return mpl.lines.Line2D(
        [], [], color=line.get_color(), linestyle=line.get_linestyle(), marker=marker
    )
