"""dfiv: Figure 3, deep-feature instrumental variables on dSprites and on the demand design.

Proximal heads, in the order of Eq. (17) and by Algorithm 3, against the original method (ridge
heads), at several batch sizes, evaluated with the current heads and with heads refitted on all
data; at constant rates, as in the paper, and at rates that decay.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import get_args

from benchmarks.core.records import Records
from benchmarks.core.runner import Runner, running
from benchmarks.experiments import Experiment
from benchmarks.experiments.dfiv.findings import summary_of
from benchmarks.experiments.dfiv.runs import DECAYING, METHODS, Runs, tune_all
from benchmarks.experiments.dfiv.stage2 import times_of
from benchmarks.reporting.summary import Summary, show
from benchmarks.tasks.dfiv import SIZES, Design, Preset


def answer(runs: Runs, figures: Path, preset: str) -> Summary:
    """Train what is missing (if allowed) and summarize."""
    found = {(b.config.method, b.config.batch_size): b for b in tune_all(runs, METHODS)}
    # Presets with the same networks share their times: alone they are no results.
    times = times_of(runs) if found else {}
    return summary_of(found, times, runs.design, runs.size, figures, preset)


def summarize(records: Records, figures: Path, preset: str, design: Design = "dsprites") -> Summary:
    """Replay the experiment on its records."""
    runs = Runs(design, SIZES[design, preset], Runner(records, make=False))
    return answer(runs, figures, preset)


def dfiv(
    design: Design = "dsprites",
    preset: Preset = "cpu",
    batch_sizes: tuple[int, ...] = (),
    data: Path | None = None,
    out: Path = Path("benchmarks/out/dfiv"),
) -> None:
    """Figure 3: deep-feature instrumental variables with proximal and with ridge heads.

    Args:
      design: the data, "dsprites" or "demand".
      preset: "cpu" for two cores and an hour, "paper" for the paper's own size on an accelerator.
      batch_sizes: only these; all of the preset if empty.
      data: the official dSprites .npz; hearts are rendered if absent.
      out: folder of finished runs and figures.
    """
    size = SIZES[design, preset]
    size = dataclasses.replace(size, batch_sizes=batch_sizes or size.batch_sizes)
    num_runs = sum(80 if method in DECAYING else 14 for method in METHODS)  # about
    with running(out, "dfiv", num_runs * len(size.batch_sizes)) as runner:
        found = answer(Runs(design, size, runner, data), out, preset)
    show(found)


EXPERIMENTS = tuple(
    Experiment(dfiv, partial(summarize, design=design), place, presets=("cpu", "paper"))
    for place, design in enumerate(get_args(Design), start=30)
)
