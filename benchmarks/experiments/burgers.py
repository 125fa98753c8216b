"""burgers: Figure 2, a Fourier neural operator on Burgers' equation at three batch sizes.

Top of the benchmarks. The paper's methods with SGD, and the baselines that its reviewers missed.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from benchmarks.core.comparison import Comparison, Data, Outcome, Problem, compare, network
from benchmarks.core.methods import (
    ALGORITHM_1,
    ALGORITHM_2,
    AVERAGE,
    EQUATION_17,
    GRADIENT,
    PROXIMAL,
    RIDGE,
    TWO_TIMESCALE,
    Batch,
    Method,
)
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Records
from benchmarks.data import burgers as data
from benchmarks.experiments.quickstart import scaling_of, standardize
from benchmarks.models.fno import FNO1d
from benchmarks.reporting import findings, summary

Preset = Literal["cpu", "paper"]


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset means.

    Attributes:
      epochs: passes over the training functions.
      batch_sizes: functions per step; the head sees 256 times as many samples.
      seeds: of initialization and shuffling; the search runs on the first.
      model: the network.
    """

    epochs: int
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    model: FNO1d


SIZES = {
    "cpu": Size(10, (16, 64, 256), (0, 1, 2), FNO1d()),
    "paper": Size(100, (16, 64, 256), (0, 1, 2), FNO1d(width=64, num_features=64)),
}

METHODS = (
    *(
        method
        for optimizer in ("SGD", "Adam", "Muon")
        for method in (
            Method(optimizer, GRADIENT),
            Method(optimizer, PROXIMAL, ALGORITHM_1),
            Method(optimizer, PROXIMAL, EQUATION_17),
        )
    ),
    Method("SGD", RIDGE, ALGORITHM_1),
    Method("SGD", PROXIMAL, ALGORITHM_2),
    Method("SGD", TWO_TIMESCALE),
    Method("SGD", AVERAGE),
)

RUNS_PER_ROW = 9  # about; what the progress bar expects

# Where searches start, in the middle of what planning runs found; every search walks on from there.
START_RATES = {"SGD": 0.1, "Adam": 0.003, "Muon": 0.01}
START_STRENGTHS = {PROXIMAL: 10.0, RIDGE: 1.0, AVERAGE: 1.0, TWO_TIMESCALE: 3.0, GRADIENT: None}


def load(folder: Path, mat: Path | None) -> Data:
    """Standardized splits. Curves are measured on 256 points, the reported error on all 8192."""
    splits = data.load_burgers(folder, mat=mat)
    scalings = scaling_of(splits.train.initial), scaling_of(splits.train.final)
    train, validation, fine = (Batch(*standardize(part, *scalings)) for part in splits)
    stride = data.FINE_POINTS // data.COARSE_POINTS
    coarse = Batch(fine.inputs[:, ::stride], fine.targets[:, ::stride])
    return Data(train, validation, coarse, fine, scale=scalings[1].std ** 2)


def make_problem(size: Size, folder: Path, mat: Path | None) -> Problem:
    """Burgers' equation as a `Problem`; errors in units of u squared."""
    return Problem(
        settings={
            "experiment": "burgers",
            "data": "burgers_data_R10.mat" if mat else data.DEFAULTS._asdict(),
            "model": repr(size.model),
        },
        epochs=lambda batch_size: size.epochs,
        load=partial(load, folder, mat),
        network=partial(network, size.model),
        metric="MSE",
        start=lambda method: (START_RATES[method.optimizer], START_STRENGTHS[method.head]),
    )


def summarize(records: Records, figures: Path, preset: Preset = "cpu") -> summary.Summary:
    """Replay the experiment on its records.

    Args:
      records: finished runs.
      figures: folder for the figure.
      preset: which sizes.
    """
    size = SIZES[preset]
    comparison = Comparison(make_problem(size, Path(), None), records, train=False)
    outcomes = compare(comparison, METHODS, size.batch_sizes, size.seeds)
    return summary_of(outcomes, size, figures, preset)


def summary_of(
    outcomes: list[Outcome], size: Size, figures: Path, preset: Preset
) -> summary.Summary:
    """Table, figure and claims."""
    batch_sizes = size.batch_sizes
    smallest, largest = min(batch_sizes), max(batch_sizes)
    ridge, sgd = Method("SGD", RIDGE, ALGORITHM_1), Method("SGD", PROXIMAL, ALGORITHM_1)
    claims = [
        findings.compare_pairs(
            "Our approach outperforms the l2 loss across batch sizes (Section 6; SGD, Alg. 1).",
            outcomes,
            batch_sizes,
            sgd,
            Method("SGD", GRADIENT),
            findings.lower,
        ),
        findings.compare_pairs(
            "Ridge is worse than proximal for small batch sizes (Section 6).",
            outcomes,
            (smallest,),
            sgd,
            ridge,
            findings.lower,
        ),
        findings.compare_pairs(
            "Ridge matches proximal for large batch sizes: the intervals overlap (Section 6).",
            outcomes,
            (largest,),
            sgd,
            ridge,
            findings.level,
        ),
        *(
            findings.compare_pairs(
                f"Proximal, {order}, is better than the gradient head with {optimizer} at every "
                "batch size.",
                outcomes,
                batch_sizes,
                Method(optimizer, PROXIMAL, order),
                Method(optimizer, GRADIENT),
                findings.lower,
            )
            for optimizer in ("SGD", "Adam", "Muon")
            for order in (ALGORITHM_1, EQUATION_17)
        ),
        findings.compare_pairs(
            "Proximal is better than two-timescale SGD at every batch size.",
            outcomes,
            batch_sizes,
            sgd,
            Method("SGD", TWO_TIMESCALE),
            findings.lower,
        ),
        findings.compare_pairs(
            "Proximal is better than the average of ridge heads at every batch size.",
            outcomes,
            batch_sizes,
            sgd,
            Method("SGD", AVERAGE),
            findings.lower,
        ),
    ]
    drawn = []
    if outcomes:
        figures.mkdir(parents=True, exist_ok=True)
        ylabel = "test MSE (units of u²)"
        papers = [o for o in outcomes if o.method.optimizer == "SGD"]
        others = [o for o in outcomes if o.method.head in (GRADIENT, PROXIMAL) and o not in papers]
        for name, chosen in (("burgers", papers), ("burgers_optimizers", others)):
            if chosen:
                path = figures / f"{name}.png"
                drawn.append(
                    findings.curves_figure(chosen, batch_sizes, path, ylabel=ylabel, yscale="log")
                )
    setup = (
        f"1448 / 200 / 400 functions, {size.epochs} epochs (the paper: 100), cosine decay, "
        f"a Fourier neural operator of width {size.model.width} with {size.model.modes} modes, "
        f"{size.model.depth} layers and {size.model.num_features} features. Every method is tuned "
        "by the last validation error on the same grids, half decades of rates and decades of lam "
        "or beta, searched along one axis after the other on seed "
        f"{size.seeds[0]}; the best is run on seeds "
        f"{', '.join(map(str, size.seeds))}. Curves: 256 points; table: all 8192 points. "
        "The axes are the paper's: iterations, test MSE."
    )
    return summary.Summary(
        title="Figure 2: Burgers' equation",
        command=f"python -m benchmarks burgers --preset {preset}",
        setup=setup,
        tables=(
            findings.number_table(
                outcomes,
                batch_sizes,
                "Test MSE in units of u² on 8192 points, mean ± half the 95 % interval.",
            ),
            findings.tuned_table(outcomes, batch_sizes),
        ),
        claims=claims,
        figures=drawn,
    )


def burgers(
    preset: Preset = "cpu",
    batch_sizes: tuple[int, ...] = (),
    data: Path | None = None,
    out: Path = Path("benchmarks/out/burgers"),
) -> None:
    """Figure 2: closed-form heads against gradient heads on Burgers' equation.

    Stop it when you like; the same command goes on where it stopped. Two processes may share a
    folder if they have different batch sizes.

    Args:
      preset: "cpu" for two cores and an hour, "paper" for the paper's own size on an accelerator.
      batch_sizes: only these; all of the preset if empty.
      data: burgers_data_R10.mat of the FNO paper; generated if absent.
      out: folder of finished runs, figures and generated data.
    """
    start = time.perf_counter()
    size = SIZES[preset]
    chosen = batch_sizes or size.batch_sizes
    console = Console()
    records = Records(out / "burgers.jsonl")
    with SweepProgress(console, RUNS_PER_ROW * len(METHODS) * len(chosen)) as progress:
        comparison = Comparison(make_problem(size, out, data), records, progress=progress)
        outcomes = compare(comparison, METHODS, chosen, size.seeds)
    shown = dataclasses.replace(size, batch_sizes=tuple(chosen))
    summary.show(console, summary_of(outcomes, shown, out, preset))
    console.print(f"{time.perf_counter() - start:.0f} s. Runs and figures are in {out}.")
