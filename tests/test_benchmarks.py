"""The quickstart end to end on a tiny size, its data against Cole and Hopf, its resumption."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.core.records import Records
from benchmarks.data import burgers
from benchmarks.experiments import quickstart
from benchmarks.models.fno import FNO1d

TINY = burgers.BurgersSettings(num_samples=64, num_points=128, dt=0.02)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("standard_promotion", "quick_compilation"),
]


def cole_hopf(initial, viscosity, fine=2048):
    """The exact solution at t = 1: u = -2 nu (log phi)_x, phi_t = nu phi_xx, in float64."""
    n = initial.shape[1]
    coefficients = np.fft.rfft(initial.astype(float), axis=1)
    u = np.fft.irfft(coefficients, fine, axis=1) * (fine / n)
    k = np.fft.rfftfreq(fine, 1 / fine)
    with np.errstate(divide="ignore", invalid="ignore"):
        integral = np.fft.irfft(np.where(k > 0, np.fft.rfft(u, axis=1) / (1j * k), 0), fine)
    phi = np.fft.rfft(np.exp(-integral / (2 * viscosity)), axis=1) * np.exp(-viscosity * k**2)
    slope = np.fft.irfft(1j * k * phi, fine, axis=1)
    return (-2 * viscosity * slope / np.fft.irfft(phi, fine, axis=1))[:, :: fine // n]


def test_burgers_is_the_exact_solution():
    settings = burgers.BurgersSettings(num_samples=16)
    fields = burgers.solve_burgers(settings)
    expected = cole_hopf(fields.initial, settings.viscosity)
    np.testing.assert_allclose(fields.final, expected, atol=2e-5)  # float32 over 100 steps


def test_burgers_has_the_spectrum_of_the_papers_data():
    initial = burgers.initial_states(burgers.BurgersSettings(num_samples=2000, num_points=64))
    assert abs(initial.var() - 0.35) < 0.02


def test_the_fine_grid_contains_the_coarse_one():
    splits = burgers.split(burgers.solve_burgers(TINY))
    assert [len(part.initial) for part in splits] == [45, 6, 13]
    assert splits.test.final.shape[1] == burgers.FINE_POINTS
    coarse = burgers.resample(splits.test, burgers.COARSE_POINTS)
    fine = burgers.resample(coarse, burgers.FINE_POINTS)
    np.testing.assert_allclose(fine.final, splits.test.final, atol=1e-5)


def test_the_network_does_not_depend_on_the_resolution():
    model = FNO1d(width=8, modes=4, depth=2, num_features=16)
    x = burgers.grid(256)
    inputs = jnp.stack([jnp.sin(x), jnp.cos(2 * x)], axis=-1)[None]
    fine = burgers.grid(1024)
    fine_inputs = jnp.stack([jnp.sin(fine), jnp.cos(2 * fine)], axis=-1)[None]

    @jax.jit
    def outputs(*grids):
        params = model.init(jax.random.key(0), grids[0])
        return [model.apply(params, grid) for grid in grids]

    coarse_outputs, fine_outputs = outputs(inputs, fine_inputs)
    # Nonlinearities alias beyond the modes kept; what is left is small.
    np.testing.assert_allclose(fine_outputs[:, ::4], coarse_outputs, atol=1e-4)


def test_quickstart_runs_and_resumes(tmp_path, monkeypatch):
    rows = (
        ("Adam", quickstart.GRADIENT),
        ("Adam", "proximal, Alg. 1"),
        ("Adam", "ridge"),
        ("Muon", quickstart.GRADIENT),
        ("Muon", quickstart.PROXIMAL),
    )
    monkeypatch.setattr(quickstart, "ROWS", rows)
    monkeypatch.setattr(quickstart, "MODEL", FNO1d(width=4, modes=4, depth=1, num_features=8))
    monkeypatch.setattr(burgers, "load_burgers", partial(burgers.load_burgers, settings=TINY))
    quickstart.quickstart(epochs=2, batch_size=15, out=tmp_path)

    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == len(rows)
    assert all(np.isfinite(row["test_mse"]) for row in results["rows"])
    assert "Muon" in (tmp_path / "results.md").read_text()
    for name in ("curves.png", "prediction.png"):
        assert (tmp_path / name).stat().st_size > 10_000

    # Killed while the last line was written, and started again: only that run is repeated.
    log = tmp_path / "runs.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    quickstart.quickstart(epochs=2, batch_size=15, out=tmp_path)
    again = json.loads((tmp_path / "results.json").read_text())
    for before, after in zip(results["rows"], again["rows"], strict=True):
        np.testing.assert_allclose(after["test_mse"], before["test_mse"], rtol=1e-4)
    assert len(log.read_text().splitlines()) == len(lines) + 1


def test_records_ignore_a_torn_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    Records(path).add({"rate": 0.1}, {"error": 1.0})
    with path.open("a") as file:
        file.write('{"key": {"rate": 0.2}, "res')
    records = Records(path)
    assert records.get({"rate": 0.1}) == {"error": 1.0}
    assert records.get({"rate": 0.2}) is None
    records.add({"rate": 0.2}, {"error": 2.0})
    assert Records(path).get({"rate": 0.2}) == {"error": 2.0}


def test_records_share_a_folder(tmp_path):
    Records(tmp_path / "one.jsonl").add({"rate": 0.1}, {"error": 1.0})
    other = Records(tmp_path / "other.jsonl")
    assert not other.made
    assert other.get({"rate": 0.1}) == {"error": 1.0}
    assert len(other.made) == 1  # of what was asked for
    other.add({"rate": 0.2}, {"error": 2.0})
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", [[], ["quickstart"]])
def test_help_reads_well(command):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "quickstart" in run.stdout
    if command:
        for flag in ("--epochs", "--batch-size", "--seed", "--out"):
            assert flag in run.stdout
