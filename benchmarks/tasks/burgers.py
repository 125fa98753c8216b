"""A Fourier neural operator on Burgers' equation."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.core.methods import Batch
from benchmarks.core.problem import Data, Problem, network, starts
from benchmarks.data import burgers as data
from benchmarks.models.fno import FNO1d

Preset = Literal["cpu", "paper"]


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset means."""

    epochs: int  # passes over the training functions
    batch_sizes: tuple[int, ...]  # functions per step; the head sees 256 times as many samples
    seeds: tuple[int, ...]  # of initialization and shuffling; the search runs on the first
    model: FNO1d  # the network


SIZES: dict[str, Size] = {
    "cpu": Size(10, (16, 64, 256), (0, 1, 2), FNO1d()),
    "paper": Size(100, (16, 64, 256), (0, 1, 2), FNO1d(width=64, num_features=64)),
}

# Where searches start, in the middle of what planning runs found; every search walks on from there.
START_RATES = {"SGD": 0.1, "Adam": 0.003, "Muon": 0.01}


class Scaling(NamedTuple):
    """Mean and standard deviation of the training data, in units of u."""

    mean: float
    std: float


def scaling_of(values: np.ndarray) -> Scaling:
    """The scaling that standardizes these values."""
    return Scaling(float(values.mean()), float(values.std()))


def standardize(fields: data.Fields, initial: Scaling, final: Scaling) -> Batch:
    """Inputs u(x, 0) and x, (samples, points, 2); targets u(x, 1), (samples, points, 1)."""
    state = (fields.initial - initial.mean) / initial.std
    x = (data.grid(state.shape[1]) - np.pi) / (np.pi / math.sqrt(3))  # uniform: variance 1
    inputs = np.stack([state, np.broadcast_to(x, state.shape)], axis=-1)
    targets = (fields.final - final.mean) / final.std
    return Batch(inputs.astype(np.float32), targets[..., None].astype(np.float32))


def load(folder: Path, mat: Path | None) -> Data:
    """Standardized splits. Curves are measured on 256 points, the reported error on all 8192."""
    splits = data.load_burgers(folder, mat=mat)
    scalings = scaling_of(splits.train.initial), scaling_of(splits.train.final)
    train, validation, fine = (standardize(part, *scalings) for part in splits)
    stride = data.FINE_POINTS // data.COARSE_POINTS
    coarse = Batch(fine.inputs[:, ::stride], fine.targets[:, ::stride])
    return Data(train, validation, coarse, fine, scale=scalings[1].std ** 2)


def make_problem(size: Size, folder: Path, mat: Path | None = None) -> Problem:
    """Burgers' equation as a `Problem`; errors in units of u squared.

    Data are generated in the folder, or those of the FNO paper's burgers_data_R10.mat.
    """
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
        start=starts(START_RATES, lam=10.0),
    )


# For the older search, of which the records of Figure 2 are.
start_by_axes = starts(START_RATES, lam=10.0, ratio=3.0)
