"""The Lorenz system, of which one coordinate is seen: predict all three.

    x' = 10 (y - x),   y' = x (28 - z) - y,   z' = x y - 8/3 z

Units: all dimensionless; coordinates have mean zero and variance one.
"""

from typing import NamedTuple

import numpy as np


class LorenzSettings(NamedTuple):
    """Everything that determines the data."""

    num_sequences: int = 3072  # independent trajectories
    seed: int = 0  # of their first states
    num_steps: int = 64  # length of a sequence
    dt: float = 0.05  # time between two observations
    horizon: int = 4  # how many observations ahead the target is
    substeps: int = 5  # steps of Runge and Kutta's fourth order between two observations


DEFAULTS = LorenzSettings()


def velocity(state: np.ndarray) -> np.ndarray:
    """The right-hand side, (3, n)."""
    x, y, z = state
    return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def runge_kutta(state: np.ndarray, dt: float) -> np.ndarray:
    """A step of the fourth order."""
    k1 = velocity(state)
    k2 = velocity(state + dt / 2 * k1)
    k3 = velocity(state + dt / 2 * k2)
    return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(state + dt * k3))


def sequences(settings: LorenzSettings = DEFAULTS) -> tuple[np.ndarray, np.ndarray]:
    """The present x, (sequences, steps, 1), and x, y, z at the horizon, (sequences, steps, 3)."""
    rng = np.random.default_rng(settings.seed)
    state = rng.standard_normal((3, settings.num_sequences)) + np.array([[0.0], [0.0], [25.0]])
    to_the_attractor, states = 200, []
    for step in range(to_the_attractor + settings.num_steps + settings.horizon):
        for _ in range(settings.substeps):
            state = runge_kutta(state, settings.dt / settings.substeps)
        if step >= to_the_attractor:
            states.append(state.T)
    path = np.stack(states, axis=1)
    path = (path - path.mean(axis=(0, 1))) / path.std(axis=(0, 1))
    inputs, targets = path[:, : settings.num_steps, :1], path[:, settings.horizon :]
    return inputs.astype(np.float32), targets.astype(np.float32)
