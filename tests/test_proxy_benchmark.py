"""The designs of proxy variables against their formulas, and the command on a tiny size."""

from functools import partial

import jax
import numpy as np
import pytest

from benchmarks.core.records import Records
from benchmarks.data import dsprites
from benchmarks.data import proxy as data
from benchmarks.experiments import proxy
from benchmarks.report import results
from tests.interrupted import stop_and_resume


def test_the_truth_of_demand_is_its_integral():
    d = (np.arange(4000) + 0.5) / 400  # uniform on [0, 10]
    psi = 2 * ((d - 5) ** 4 / 600 + np.exp(-4 * (d - 5) ** 2) + d / 10 - 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    views = 7 * psi[:, None] + 45 + nodes
    for price, mean_sales in zip(*data.make_demand(2, 0).test, strict=True):
        ratio = np.minimum(np.exp((views - price) / 10), 5)
        exact = (price * (ratio @ weights) / weights.sum() - 5 * psi).mean()
        assert abs(mean_sales[0] - exact) < 1.5  # 10,000 draws, of standard deviation 30 to 40


def test_demand_is_drawn_by_its_formulas():
    a, z, w, y = (np.asarray(x, float) for x in data.make_demand(40_000, 3).train)
    # Given the costs, demand is near one value where both are: what is left of w and a is noise.
    assert abs(np.hypot(*z.T).mean() - 2.2727) < 0.02  # of a Rice variable, 2 and 1
    noise = y - a * np.minimum(np.exp((w - a) / 10), 5)  # -5 psi(d) + xi, psi as seen in w
    residual = noise + 5 * (w - 45) / 7
    assert abs(residual.std() - np.hypot(1, 5 / 7)) < 0.02


def test_a_heart_at_the_same_height_is_the_outcome_proxy_of_dsprites():
    drawn = data.make_dsprites(64, 0, dsprites.render_hearts())
    treatment, z, w, y = drawn.train
    rows = np.repeat(np.arange(64), 64)

    def height(images):
        weights = np.maximum(images - 0.5, 0)  # of pixel noise nothing is left
        return weights @ rows / weights.sum(1)

    assert np.corrcoef(height(treatment), height(w))[0, 1] > 0.98
    np.testing.assert_allclose(z[:, 0] * 10, np.round(z[:, 0] * 10), atol=1e-5)  # scales .5 to 1
    factor = (np.arange(32) - 15.5) ** 2 / 85.25
    assert factor.mean() == 1  # so f is the mean of the bridge
    ratio = y / dsprites.structural(treatment)
    assert (ratio[np.abs(dsprites.structural(treatment)) > 5] > -0.5).all()


def test_standardized_data_come_back():
    drawn = data.make_demand(200, 1)
    scaled, scale = data.standardize(drawn)
    for array in scaled.train:
        np.testing.assert_allclose(
            [array.mean(0), array.std(0)], [[0] * array.shape[1], [1] * array.shape[1]], atol=1e-5
        )
    back = scaled.test.structural * scale + drawn.train.outcome.mean()
    np.testing.assert_allclose(back, drawn.test.structural, rtol=1e-4)


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {
        "RATES": (1e-3,),
        "LAMS": (100.0, 1000.0),
        "BATCH_SIZES": (16,),
        "METHODS": (proxy.PROXIMAL, proxy.AS_PUBLISHED),
        "STARTS": dict.fromkeys(proxy.STARTS, ((0, 0, 0, 0),)),
        "AT_MOST": 2,
        "FINALISTS": 1,
    }.items():
        monkeypatch.setattr(proxy, name, value)
    size = proxy.Size((1000,), 2, (100, 101), (0, 1))
    monkeypatch.setitem(proxy.SIZES, ("demand", "cpu"), size)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion", "quick_compilation", "tiny")
class TestCommand:
    def test_demand_runs_stops_and_resumes(self, tmp_path, monkeypatch, capsys):
        path = tmp_path / "proxy.jsonl"
        lines = stop_and_resume(lambda: proxy.proxy(preset="cpu", out=tmp_path), path, monkeypatch)
        said = " ".join(capsys.readouterr().out.split())
        assert "The median error of DFPV proximal is at or below that of KPV as published" in said
        found = proxy.summarize(Records(path), tmp_path, preset="cpu")
        assert [len(table.rows) for table in found.tables] == [8, 4]
        assert len(found.claims) == 8
        assert path.read_text().splitlines() == lines
        results(runs=tmp_path, out=tmp_path)
        assert "proxy --design demand --preset cpu" in (tmp_path / "RESULTS.md").read_text()

    def test_networks_of_dsprites_fit_their_data(self):
        task = proxy.load("dsprites", 12, 0, False)
        networks = proxy.make_networks("dsprites", 0.02, 0, task.halves[0])
        method = proxy.make_method(networks, proxy.ORIGINAL, (1e-3, 1.0, 1.0, 0.0))
        state = method.init(task.halves[0])
        assert state.stage1.anchor.kernel.shape == (33 * 33 - 1, 32)
        assert state.stage2.anchor.kernel.shape == (33 * 33 - 1, 1)
        jax.eval_shape(method.round, state, *task.halves)
        assert jax.eval_shape(partial(proxy.evaluate, networks), state, task).shape == (6,)
