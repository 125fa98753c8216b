"""Neural operators that map a field to the field one unit of time later."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from benchmarks.core.methods import Batch
from benchmarks.core.problem import Data, Problem, network, starts
from benchmarks.data import burgers, kdv, navier_stokes
from benchmarks.models.deeponet import DeepONet
from benchmarks.models.fno import FNO1d, FNO2d

EPOCHS, NUM_TRAIN, NUM_VALIDATION = 10, 1024, 200
START_RATES = {"SGD": 0.1, "Adam": 0.003, "Muon": 0.01}

# Coarser than for the neural operator: a DeepONet keeps to one grid.
BURGERS = burgers.BurgersSettings(num_samples=1624, num_points=128, dt=0.02)

OperatorName = Literal["kdv", "deeponet", "navier_stokes"]


class Operator(NamedTuple):
    """An equation and a network."""

    equation: str
    data: Any  # the settings of its data
    solve: Callable[[], tuple[np.ndarray, np.ndarray]]  # -> fields at t = 0 and 1, (n, *grid)
    model: nn.Module


OPERATORS: dict[str, Operator] = {
    "kdv": Operator("kdv", kdv.DEFAULTS, kdv.solve_kdv, FNO1d(num_features=64)),
    "deeponet": Operator("burgers", BURGERS, partial(burgers.solve_burgers, BURGERS), DeepONet()),
    "navier_stokes": Operator(
        "navier_stokes",
        navier_stokes.DEFAULTS,
        navier_stokes.solve_navier_stokes,
        FNO2d(width=16, modes=5, depth=3, num_features=64),
    ),
}


def load(solve: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Data:
    """1024 / 200 / 400 fields; the inputs are the field and the coordinates, from -1 to 1."""
    initial, final = solve()
    axes = (np.linspace(-1, 1, size, dtype=np.float32) for size in initial.shape[1:])
    grid = [np.broadcast_to(axis, initial.shape) for axis in np.meshgrid(*axes, indexing="ij")]
    inputs, targets = np.stack([initial, *grid], axis=-1), final[..., None]
    at = NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION
    train, validation, test = zip(np.split(inputs, at), np.split(targets, at), strict=True)
    return Data(Batch(*train), Batch(*validation), Batch(*test))


def make_problem(name: OperatorName) -> Problem:
    """An operator as a `Problem`; errors in units of the field squared."""
    operator = OPERATORS[name]
    data, model = operator.data._asdict(), repr(operator.model)
    return Problem(
        settings={"experiment": operator.equation, "data": data, "model": model},
        epochs=lambda batch_size: EPOCHS,
        load=partial(load, operator.solve),
        network=partial(network, operator.model),
        metric="MSE",
        start=starts(START_RATES),
    )
