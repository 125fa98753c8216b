"""Two-dimensional Navier-Stokes in vorticity: initial vorticity -> vorticity at time one.

    w_t + v . grad w = 0.001 laplace w,   curl v = w,   on the unit square, periodic, without force

Generated in a minute, so nothing is cached.

Units: all dimensionless.
"""

from typing import NamedTuple

import exponax
import jax
import jax.numpy as jnp
import numpy as np

VISCOSITY = 1e-3


class NavierStokesSettings(NamedTuple):
    """Everything that determines the data."""

    num_samples: int = 1624  # number of initial vorticities
    seed: int = 0  # of the initial vorticities
    num_modes: int = 4  # largest wave number along either axis of an initial vorticity
    scale: float = 2.0  # its standard deviation
    num_points: int = 64  # points of the solver's grid along an axis; every second one is kept
    dt: float = 0.01  # time step, of the fourth order; with the second order it is too long


DEFAULTS = NavierStokesSettings()


def initial_states(settings: NavierStokesSettings) -> np.ndarray:
    """Gaussian random fields without a mean, (samples, points, points), float32."""
    n, modes = settings.num_points, settings.num_modes
    wave = np.fft.fftfreq(n, 1 / n)
    square = wave[:, None] ** 2 + wave**2
    inside = (np.abs(wave[:, None]) <= modes) & (np.abs(wave) <= modes) & (square > 0)
    amplitude = np.where(inside, np.exp(-square / 8), 0)
    amplitude *= settings.scale * n / np.linalg.norm(amplitude)
    rng = np.random.default_rng(settings.seed)
    noise = rng.standard_normal((settings.num_samples, n, n))
    return np.fft.ifft2(np.fft.fft2(noise) * amplitude).real.astype(np.float32)


def solve_navier_stokes(
    settings: NavierStokesSettings = DEFAULTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Vorticities at t = 0 and 1 in units of `scale`, each (samples, points / 2, points / 2)."""
    stepper = exponax.stepper.NavierStokesVorticity(
        2, 1.0, settings.num_points, settings.dt, diffusivity=VISCOSITY, order=4
    )
    initial = initial_states(settings)

    @jax.jit
    def solve(states: jax.Array) -> jax.Array:
        return jax.vmap(exponax.repeat(stepper, round(1 / settings.dt)))(states[:, None])[:, 0]

    pieces = np.split(initial, range(64, len(initial), 64))  # a few at a time, for the memory
    final = np.concatenate([np.asarray(solve(jnp.asarray(piece))) for piece in pieces])
    return initial[:, ::2, ::2] / settings.scale, final[:, ::2, ::2] / settings.scale
