"""A multi-layer perceptron on two tables: rf1, of little noise, and california, of much."""

from functools import partial
from pathlib import Path

from benchmarks.core.methods import Batch
from benchmarks.core.problem import Data, Problem, network, starts
from benchmarks.data.tables import NUM_TARGETS, TableName, load_table
from benchmarks.models.mlp import MLP

EPOCHS, SPLIT_SEED = 20, 0
START_RATES = {"SGD": 0.03, "Adam": 0.003, "Muon": 0.01}


def load(folder: Path, name: TableName) -> Data:
    """Three fifths of the rows to train, one to validate, one to test; standardized."""
    rows, test = load_table(folder, name, SPLIT_SEED)
    cut = 3 * len(rows.inputs) // 4
    train = Batch(rows.inputs[:cut], rows.targets[:cut])
    validation = Batch(rows.inputs[cut:], rows.targets[cut:])
    return Data(train, validation, Batch(*test))


def make_problem(name: TableName, folder: Path | None) -> Problem:
    """A table as a `Problem`; errors in units of the targets' variance.

    The folder of <name>.csv is needed only if something is to be trained.
    """

    def read() -> Data:
        if folder is None:
            raise SystemExit(f"{name} is read from a folder of {name}.csv: say where with --data.")
        return load(folder, name)

    model = MLP((256, 256), NUM_TARGETS[name])
    return Problem(
        settings={"experiment": name, "split": SPLIT_SEED, "model": repr(model)},
        epochs=lambda batch_size: EPOCHS,
        load=read,
        network=partial(network, model),
        metric="MSE",
        start=starts(START_RATES, lam=100.0),
    )
