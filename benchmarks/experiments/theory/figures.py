"""The figures of the section, from checks read back."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.experiments.theory.claims import Runs
from benchmarks.reporting import plots


def draw_convexity(convexity: Runs, critical: Runs, path: Path) -> None:
    """The lines of Theorem 3."""
    (lines,), (points,) = convexity, critical
    with plots.subplots(path, 1, 3, figsize=(10.5, 3.6)) as (left, middle, right):
        for i, (beta, line) in enumerate(zip(lines["betas"], plots.LINES, strict=False)):
            label = f"β = {beta:g}"
            left.plot(lines["position"], lines["segment"][i], label=label, **line)
            ends = lines["segment"][i][[0, -1]]
            left.plot([-1, 1], ends, color="0.6", linewidth=0.8)
            middle.loglog(points["step"], points["decrease"][i], label=label, **line)
            right.semilogx(lines["scale"], lines["scaled"][i], label=label, **line)
        left.set(xlabel="c, from -φ to φ (thin: chords)", ylabel="L*(cφ) / ||Y||²")
        left.set_title("not convex")
        middle.set(xlabel="step from features orthogonal to Y", ylabel="decrease of L* / ||Y||²")
        middle.set_title("a critical point, not a minimum")
        right.set(xlabel="c", ylabel="L*(cφ) / ||Y||²", title="no minimizer for β > 0")
        middle.legend()


def draw_flow(flows: Runs, path: Path) -> None:
    """Theorem 4's flows."""
    with plots.subplots(path, 1, 2, figsize=(10.5, 3.8)) as (left, right):
        for run, line in zip(flows, plots.LINES, strict=False):
            time, label = run["time"][1:], f"β = {run['beta']:g}"
            left.loglog(time, run["perp"][1:], label=label, **line)
            right.loglog(time, run["size"][1:], label=label, **line)
        time = flows[-1]["time"][-20:]
        perp = flows[-1]["perp"][-20]
        left.loglog(time, 3 * perp * (time / time[0]) ** -0.5, color="0.5", lw=0.8)
        left.annotate("slope -1/2", (time[6], 4 * perp * (time[6] / time[0]) ** -0.5), color="0.3")
        left.set(xlabel="time of the flow", ylabel="||Y⊥|| / ||Y||", title="unattained targets")
        right.set(
            xlabel="time of the flow", ylabel="||Φ|| / ||Φ(0)||", title="size of the features"
        )
        left.legend()


def draw_eigenvalues(eigenvalues: Runs, identities: Runs, path: Path) -> None:
    """An eigenvalue that falls, and what is left out of Eq. (40)."""
    (many,), (found,) = eigenvalues, identities
    black, orange, blue, *_ = plots.LINES
    with plots.subplots(path, 1, 2, figsize=(10.5, 3.8)) as (left, right):
        time = many["time"][1:]
        left.semilogx(time, many["worst"][1:, 1], label="larger", **black)
        left.semilogx(time, many["worst"][1:, 0], label="smaller", **orange)
        left.set(xlabel="time of the flow", ylabel="eigenvalue of Y*Y*ᵀ / largest at the end")
        left.set(title="β = 0, o = 2: the largest fall", ylim=(0, None))
        left.legend()
        # Beta = 0 is a point of the axis, too: at the left edge.
        betas, floor = found["betas"], 1e-16
        at = np.where(betas > 0, betas, betas[betas > 0].min() / 100)
        for name, label, line in (
            ("forty_star", "left side Y*Y*ᵀ, as in Eq. (40)", orange),
            ("forty", "left side YY*ᵀ", black),
            ("orthogonality", "||Y⊥Y*ᵀ|| / ||YYᵀ||, zero in Eq. (39)", blue),
        ):
            right.loglog(at, np.maximum(found[name], floor), marker="o", label=label, **line)
        right.set_xticks(at, labels=[f"{beta:g}" for beta in betas])
        right.minorticks_off()
        right.set(xlabel="β", ylabel="largest relative difference", title="Eq. (40)")
        right.legend()


def draw_width(runs: Runs, path: Path) -> None:
    """Networks and flows, and their distance."""
    shown = runs[:: max(1, (len(runs) - 1) // 2)][:3]
    black, orange, *_ = plots.LINES
    with plots.subplots(path, 1, len(shown) + 1, figsize=(10.5, 3.4), squeeze=False) as panels:
        for axes, run in zip(panels[0], shown, strict=False):
            axes.plot(run["time"], run["flow"], color="0.7", linewidth=5, label="kernel flow")
            axes.plot(run["time"], run["net"], label="network", **orange)
            axes.set_ylim(bottom=0)
            axes.set(xlabel="time (rate x steps)", title=f"width {int(run['width'])}")
        panels[0, 0].set_ylabel("||Y⊥|| / ||Y||")
        panels[0, 0].legend()
        last = panels[0, -1]
        widths = np.array([run["width"] for run in runs])
        deviations = np.array([run["deviation"] for run in runs])
        for column in deviations.T:
            last.loglog(widths, column, "o", color="0.6", markersize=3)
        last.loglog(widths, deviations.mean(axis=1), label="mean", **black)
        guide = deviations[0].mean() * 1.6 * (widths / widths[0]) ** -0.5
        last.loglog(widths, guide, label="width$^{-1/2}$", color="0.5", lw=0.8)
        last.set_xticks(widths, labels=[str(int(w)) for w in widths], rotation=45)
        last.minorticks_off()
        percent = [1, 2, 5, 10]
        last.set_yticks([p / 100 for p in percent], labels=[f"{p}%" for p in percent])
        last.set(xlabel="width", title="relative deviation of Φ")
        last.legend()


DRAWINGS: dict[tuple[str, ...], Callable[..., None]] = {
    ("convexity", "critical"): draw_convexity,
    ("flow",): draw_flow,
    ("eigenvalues", "identities"): draw_eigenvalues,
    ("width",): draw_width,
}
