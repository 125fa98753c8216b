"""The theorems on small sizes, and the two commands that draw them end to end."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.core.records import Records
from benchmarks.experiments import landscape, theory
from benchmarks.experiments.theory import flow, width
from benchmarks.experiments.theory import settings as theory_settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

BETAS = (0.0, 0.1)
SMALL = {
    theory: theory_settings.Settings(
        num_networks=1,
        num_draws=50,
        num_starts=6,
        betas=BETAS,
        horizon=1e4,
        horizon_zero=10.0,
        widths=(32, 2048),
        num_nets=2,
        num_steps=80,
        step_size=6e-3,
    ),
    landscape: landscape.Settings(num_steps=400, num_draws=20),
}
FIGURES = {
    theory: ["theory_convexity", "theory_flow", "theory_eigenvalues", "theory_width"],
    landscape: ["landscape"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both commands on small sizes, once for all tests."""
    folder = tmp_path_factory.mktemp("theory")
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for module, settings in SMALL.items():
            patch.setitem(module.PRESETS, "cpu", settings)
        theory.theory("cpu", folder)
        landscape.landscape("cpu", folder)
        yield folder


@pytest.fixture
def runs(folder):
    """Name of a check -> its runs, as written."""
    records = Records(folder / "theory.jsonl")

    def read(name):
        record = records.get(theory.key_of("cpu", name))
        return [
            SimpleNamespace(**{k: np.array(v) for k, v in run.items()}) for run in record["runs"]
        ]

    return read


@pytest.mark.parametrize("module", [theory, landscape])
def test_commands_end_to_end(module, folder, monkeypatch):
    (log,) = folder.glob(f"{module.__name__.split('.')[-1]}.jsonl")
    lines = log.read_text().splitlines()
    assert "NaN" not in log.read_text()
    shown = []
    monkeypatch.setattr(module, "show", lambda summary: shown.append(summary))
    getattr(module, log.stem)("cpu", folder)  # again: everything is there
    assert log.read_text().splitlines() == lines
    (summary,) = shown
    assert all(claim.holds is not None for claim in summary.claims)
    assert [path.stem for path in summary.figures] == FIGURES[module]
    for path in summary.figures:
        assert path.stat().st_size > 10_000


def test_theorems_1_and_2(runs):
    for found in runs("envelope"):
        for differences in (found.ridge, found.prox, found.fixed):
            assert differences[found.penalties >= 1].max() < 1e-10
            assert differences.max() < 1e-6  # ill-conditioned: rounding of the head


def test_theorem_3_not_convex_and_no_minimizer(runs):
    (found,) = runs("convexity")
    assert (found.excess > 0.1).all()
    np.testing.assert_allclose(found.segment[:, 0], found.segment[:, -1])  # phi and -phi
    assert (np.diff(found.scaled, axis=1) < 0).all()


def test_theorem_3_critical_points(runs):
    (found,) = runs("critical")
    assert (found.zero == 0).all()
    assert found.orthogonal.max() < 1e-10
    np.testing.assert_allclose(found.orthogonal_loss, 1, rtol=1e-10)  # the largest value
    assert (found.decrease > 0).all()
    np.testing.assert_allclose(found.slope, 2, atol=0.05)
    # Attaining one of two outputs is critical for beta = 0 alone, and the flow leaves it.
    assert found.partial[0] < 1e-10
    assert found.partial[1] > 0.1
    assert 0.1 < found.partial_loss[0] < 1
    assert found.reached < 1e-3


def test_the_equations_of_appendix_c(runs):
    (found,) = runs("identities")
    assert found.gradient.max() < 1e-10
    assert found.forty.max() < 1e-10
    assert found.conserved.max() < 1e-8
    # As printed they hold for beta = 0 only.
    for as_printed in (found.gradient_star, found.forty_star, found.orthogonality):
        assert as_printed[0] < 1e-10
        assert as_printed[1] > 1e-3
    # Two outputs: A B + B A can be indefinite, and an eigenvalue fall. One output: never.
    assert found.indefinite[0] > 0.1
    assert found.falling[0] > 0
    assert (found.falling_single == 0).all()


def test_theorem_4(runs):
    for found in runs("flow"):
        assert (np.diff(found.loss) < 1e-8).all()
        assert found.perp[-1] < 0.01 * found.perp[0]
        assert found.forty < 1e-8
        if found.beta > 0:
            np.testing.assert_allclose(found.slope, -0.5, atol=0.03)
            assert found.size[-1] > 1.5
            assert found.forty_star > 0.1
        else:
            np.testing.assert_allclose(found.size[-1], 1, atol=0.2)
            assert found.forty_star < 1e-8


def test_eigenvalues_fall_and_the_flow_arrives_anyway(runs):
    (found,) = runs("eigenvalues")
    assert found.falls.max() > 0.01
    assert found.perp.max() < 0.01


def test_wide_networks_follow_the_flow(runs):
    narrow, wide = runs("width")
    assert wide.deviation.mean() < 0.5 * narrow.deviation.mean()
    assert wide.deviation.mean() < 0.05
    # The kernel acts between samples: no matrix on the side of the features comes as close.
    assert wide.velocity.mean() < 0.2 < wide.left.mean()


def test_the_proximal_step_is_a_collapsed_kalman_update(runs):
    (found,) = runs("kalman")
    assert found.difference.max() < 1e-9
    assert np.median(found.filtered) > 1e-3  # what the collapse drops is not nothing


def test_the_kernels_are_those_of_a_wide_network(x64):
    x = flow.random_inputs(0)
    exact = flow.wide_kernels(x)
    params = width.init_wide(jax.random.key(1), 20_000)
    jacobian = jax.jacobian(lambda p: width.wide_features(p, x)[:, 0])(params)
    rows = np.concatenate([np.reshape(leaf, (len(x), -1)) for leaf in jacobian.values()], 1)
    np.testing.assert_allclose(rows @ rows.T, exact.ntk, rtol=0.1, atol=0.1)
    for kernel in exact:
        assert np.linalg.eigvalsh(kernel)[0] > 1e-4  # positive definite, as the theorem asks


def test_descent_along_the_curve_stays_on_it(folder, x64):
    result = Records(folder / "landscape.jsonl").get(landscape.key_of("cpu"))
    path, beta = result["paths"][landscape.CLOSED_FORM], SMALL[landscape].beta
    assert (np.diff(path["loss"]) <= 1e-12).all()
    samples = landscape.Samples(*(jnp.asarray(result[name]) for name in "xy"))
    for at in (0, 100, 400):
        best = landscape.best_head(jnp.asarray(path["theta"][at]), samples, beta)
        np.testing.assert_allclose(path["head"][at], best, rtol=1e-10)
