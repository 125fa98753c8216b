"""What the experiments on images share: their commands, and how they are replayed.

The commands share their finished runs, so that whatever one has trained, the others read.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.core import tuner
from benchmarks.core.comparison import Comparison, Outcome
from benchmarks.core.methods import ALGORITHM_1, GRADIENT, PROXIMAL, RIDGE, Method
from benchmarks.core.records import Records
from benchmarks.core.runner import Runner, running
from benchmarks.experiments import Experiment
from benchmarks.reporting.comparisons import curves_figure
from benchmarks.reporting.summary import Summary, show
from benchmarks.tasks.images import (
    SIZES,
    DataSet,
    Preset,
    Size,
    make_problem,
    many_classes,
    start_by_axes,
)

CROSS_ENTROPY = Method("SGD", GRADIENT, loss="cross entropy")
L2 = Method("SGD", GRADIENT)
PROX = Method("SGD", PROXIMAL, ALGORITHM_1)
RIDGE_1 = Method("SGD", RIDGE, ALGORITHM_1)
PAPERS = (L2, CROSS_ENTROPY, RIDGE_1, PROX)
CAPTION = (
    "Test accuracy, mean ± half the 95 % interval. Two-timescale: a gradient head with a rate of "
    "its own. An empty field was not run."
)
RUNS_PER_ROW = 9  # about; what the progress bar expects

ARGUMENTS = """
Args:
  preset: "cpu" for a small CNN on 10,000 images of CIFAR-10, or on Omniglot's 242 characters in the
    place of CIFAR-100; "paper" for ResNet-18 on all images.
  data: folder of the official files (cifar-10-batches-py, cifar-100-python), or of Omniglot's zips.
  batch_sizes: only these; all of the preset if empty.
  out: folder of finished runs and figures, shared by the commands on images.
"""

# (comparison, data set, its size, folder for figures) -> what is found; trains what is missing.
Answer = Callable[[Comparison, DataSet, Size, Path], Summary]


def image_experiment(
    name: str, question: str, answer: Answer, num_rows: int, place: int
) -> Experiment:
    """An experiment on images: "cifar10" is about CIFAR-10, all others about many classes.

    The question is the first line of its help; `num_rows` are methods per batch size.
    """

    def data_set(preset: str) -> DataSet:
        return "cifar10" if name == "cifar10" else many_classes(preset)

    def answered(runner: Runner, data: Path | None, size: Size, figures: Path, preset: str):
        named = data_set(preset)
        problem = make_problem(named, size, data)
        comparison = Comparison(problem, runner)
        if named == "cifar10":
            comparison = Comparison(problem._replace(start=start_by_axes), runner, tuner.BY_AXES)
        found = answer(comparison, named, size, figures)
        typed = f"python -m benchmarks {name} --preset {preset} --data FOLDER"
        return found._replace(command=typed)

    def summarize(records: Records, figures: Path, preset: str) -> Summary:
        size = SIZES[data_set(preset), preset]
        return answered(Runner(records, make=False), None, size, figures, preset)

    def command(
        preset: Preset = "cpu",
        data: Path | None = None,
        batch_sizes: tuple[int, ...] = (),
        out: Path = Path("benchmarks/out/classification"),
    ) -> None:
        size = SIZES[data_set(preset), preset]
        size = dataclasses.replace(size, batch_sizes=batch_sizes or size.batch_sizes)
        num_runs = RUNS_PER_ROW * num_rows * len(size.batch_sizes)
        with running(out, data_set(preset), num_runs) as runner:
            found = answered(runner, data, size, out, preset)
        show(found)

    command.__name__, command.__doc__ = name, f"{question}\n{ARGUMENTS}"
    return Experiment(command, summarize, place, presets=("cpu", "paper"), file=data_set)


def accuracy_curves(
    outcomes: Sequence[Outcome], batch_sizes: Sequence[int], path: Path
) -> list[Path]:
    """Test accuracy against steps."""
    return curves_figure(outcomes, batch_sizes, path, "test accuracy", "linear")
