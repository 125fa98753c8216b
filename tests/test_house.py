"""What keeps the benchmarks a house: an experiment is one file, no file is long."""

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import __main__, experiments
from benchmarks.core.records import Records
from benchmarks.report import results
from benchmarks.reporting import intervals

HOME = Path(__file__).parents[1] / "benchmarks"
TOY = Path(__file__).parent / "toy_experiment.py"
# From bottom to top; experiments know all of them, and `report.py` goes over experiments.
LAYERS = ("core", "reporting", "data", "models", "tasks", "experiments")
MAY_KNOW = {
    "core": {"core"},
    "reporting": {"core", "reporting"},
    "data": {"data"},
    "models": {"models"},
    "tasks": {"core", "data", "models", "tasks"},
    "experiments": set(LAYERS),
}


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in HOME.rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > 350}


@pytest.mark.parametrize("folder", LAYERS)
def test_layers_point_down(folder):
    for path in (HOME / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("benchmarks."):
                assert node.module.split(".")[1] in MAY_KNOW[folder], f"{path}: {node.module}"


@pytest.fixture
def with_toy(tmp_path, monkeypatch):
    """The toy's file beside those of the experiments: one file, and no other edit."""
    folder = tmp_path / "more"
    folder.mkdir()
    shutil.copy(TOY, folder / "toy.py")
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    return tmp_path


@pytest.mark.usefixtures("standard_promotion", "quick_compilation")
def test_an_experiment_is_one_file(with_toy, capsys):
    assert len(TOY.read_text().splitlines()) <= 80
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    assert "toy" in capsys.readouterr().out

    __main__.main(["toy", "--out", str(with_toy)])
    assert "A closed-form head fits a sine better" in " ".join(capsys.readouterr().out.split())
    lines = (with_toy / "toy.jsonl").read_text().splitlines()

    results(runs=with_toy, out=with_toy)
    text = (with_toy / "RESULTS.md").read_text()
    assert "## A toy" in text
    assert "python -m benchmarks toy --preset cpu" in text
    assert (with_toy / "toy.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("one", experiments.discover(), ids=lambda one: f"{one.name} {one.place}")
def test_nothing_is_decided_without_runs(one, tmp_path):
    """Every experiment can be summarized before anything was run."""
    for preset in one.presets if one.summarize else ():
        found = one.summarize(Records(tmp_path / "none.jsonl"), tmp_path, preset)
        assert found.title
        assert f"python -m benchmarks {one.name}" in found.command
        assert {claim.holds for claim in found.claims} <= {None}
        assert not any(table.rows for table in found.tables)
        assert not found.figures


@pytest.mark.parametrize("name", dict.fromkeys(one.name for one in experiments.discover()))
def test_every_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit):
        __main__.main([name, "--help"])
    shown = capsys.readouterr().out
    assert "--out" in shown
    assert "folder of" in " ".join(shown.split())


def test_sections_have_places_of_their_own():
    found = experiments.discover()
    assert len({one.place for one in found}) == len(found)


def test_level_is_what_the_interval_of_the_difference_says():
    rng = np.random.default_rng(0)
    verdicts = set()
    for apart in np.linspace(-3, 3, 25):
        left, right = rng.normal(size=5), apart + rng.normal(scale=2, size=4)
        # Welch's interval of the difference, by its formulas.
        parts = [np.var(values, ddof=1) / len(values) for values in (left, right)]
        degrees = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 3)
        reach = stats.t.ppf(0.975, degrees) * np.sqrt(sum(parts))
        difference = left.mean() - right.mean()
        expected = None if abs(difference) <= reach else bool(difference < 0)
        assert intervals.is_below(left, right) is expected
        verdicts.add(expected)
    assert verdicts == {None, True, False}
    assert intervals.is_below(np.ones(3), np.ones(3)) is False
    assert intervals.is_below(np.ones(3), np.full(3, np.inf)) is True
    assert [intervals.all_of(v) for v in ([True, None], [None, False], [True], [])] == [
        None,
        False,
        True,
        None,
    ]
