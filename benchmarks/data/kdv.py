"""The Korteweg-de Vries equation, which makes solitons: initial state -> state at time one.

    u_t - 6 u u_x + u_xxx = -0.01 u_xxxx,   x in [0, 32) periodic,   t from 0 to 1

The small fourth-order term, exponax's default, keeps the sharpest waves on the grid. Generated in
seconds, so nothing is cached.

Units: all dimensionless.
"""

from typing import NamedTuple

import exponax
import jax
import jax.numpy as jnp
import numpy as np

DOMAIN = 32.0


class KdVSettings(NamedTuple):
    """Everything that determines the data."""

    num_samples: int = 1624  # number of initial states
    seed: int = 0  # of the initial states
    num_modes: int = 8  # waves in an initial state, with amplitudes that fall like exp(-(k / 4)^2)
    num_points: int = 256  # points of the solver's grid; every second one is kept
    dt: float = 0.005  # time step


DEFAULTS = KdVSettings()


def initial_states(settings: KdVSettings) -> np.ndarray:
    """Gaussian random waves of variance one without a mean, (samples, points)."""
    wave = np.arange(1, settings.num_modes + 1)
    scale = np.exp(-((wave / 4) ** 2))
    scale /= np.linalg.norm(scale)
    rng = np.random.default_rng(settings.seed)
    cosines, sines = rng.standard_normal((2, settings.num_samples, len(wave))) * scale
    coefficients = np.zeros((settings.num_samples, settings.num_points // 2 + 1), complex)
    coefficients[:, wave] = (cosines - 1j * sines) * settings.num_points / 2
    return np.fft.irfft(coefficients, settings.num_points)


def solve_kdv(settings: KdVSettings = DEFAULTS) -> tuple[np.ndarray, np.ndarray]:
    """States at t = 0 and t = 1, each (samples, points / 2), float32."""
    stepper = exponax.stepper.KortewegDeVries(1, DOMAIN, settings.num_points, settings.dt)
    step = jax.jit(jax.vmap(stepper.step_fourier))
    initial = initial_states(settings).astype(np.float32)
    state = jnp.fft.rfft(initial, axis=1)[:, None, :]
    for _ in range(round(1 / settings.dt)):
        state = jax.block_until_ready(step(state))
    final = np.asarray(jnp.fft.irfft(state[:, 0, :], settings.num_points, axis=1), np.float32)
    return initial[:, ::2], final[:, ::2]
