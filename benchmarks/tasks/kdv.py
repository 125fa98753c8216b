"""A Fourier neural operator on the Korteweg-de Vries equation."""

from functools import partial

import numpy as np

from benchmarks.core.methods import Batch, Method
from benchmarks.core.problem import Data, Problem, network
from benchmarks.data import kdv
from benchmarks.models.fno import FNO1d

MODEL, EPOCHS = FNO1d(num_features=64), 10
NUM_TRAIN, NUM_VALIDATION = 1024, 200
START_RATES = {"SGD": 0.1, "Adam": 0.003, "Muon": 0.01}


def load() -> Data:
    """1024 / 200 / 400 functions on 128 points, of variance one to begin with."""
    initial, final = kdv.solve_kdv()
    points = np.broadcast_to(np.linspace(-1, 1, initial.shape[1], dtype=np.float32), initial.shape)
    inputs, targets = np.stack([initial, points], axis=-1), final[..., None]
    at = NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION
    train, validation, test = zip(np.split(inputs, at), np.split(targets, at), strict=True)
    return Data(Batch(*train), Batch(*validation), Batch(*test))


def make_problem() -> Problem:
    """The equation as a `Problem`; errors in units of u squared."""
    return Problem(
        settings={"experiment": "kdv", "data": kdv.DEFAULTS._asdict(), "model": repr(MODEL)},
        epochs=lambda batch_size: EPOCHS,
        load=load,
        network=partial(network, MODEL),
        metric="MSE",
        start=start_of,
    )


def start_of(method: Method) -> tuple[float, float | None]:
    """Where searches begin."""
    return START_RATES[method.optimizer], 1.0
