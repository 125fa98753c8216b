"""A recurrent network on sequences of the Lorenz system."""

from functools import partial

import numpy as np

from benchmarks.core.methods import Batch
from benchmarks.core.problem import Data, Problem, network, starts
from benchmarks.data import lorenz
from benchmarks.models.gru import GRU

MODEL, EPOCHS, NUM_TRAIN, NUM_VALIDATION = GRU(), 8, 2048, 256
START_RATES = {"SGD": 0.1, "Adam": 0.003, "Muon": 0.01}


def load() -> Data:
    """2048 / 256 / 768 sequences of 64 times, from the 17th on with targets."""
    inputs, targets = lorenz.sequences()
    targets, at = targets[:, MODEL.warm_up :], (NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION)
    train, validation, test = zip(np.split(inputs, at), np.split(targets, at), strict=True)
    return Data(Batch(*train), Batch(*validation), Batch(*test))


def make_problem() -> Problem:
    """Prediction as a `Problem`; errors in units of the coordinates' variance, a mean over them."""
    return Problem(
        settings={"experiment": "lorenz", "data": lorenz.DEFAULTS._asdict(), "model": repr(MODEL)},
        epochs=lambda batch_size: EPOCHS,
        load=load,
        network=partial(network, MODEL),
        metric="MSE",
        start=starts(START_RATES),
    )
