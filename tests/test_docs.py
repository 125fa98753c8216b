"""The README's code runs, its train steps are short, and each notebook is its paired script."""

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_readme_code_runs(standard_promotion):
    namespace: dict = {}
    for block in BLOCKS:  # in order, as a reader would paste them
        exec(compile(block, "README.md", "exec"), namespace)


def test_train_steps_have_at_most_20_lines():
    steps = [block for block in BLOCKS if "def train_step" in block]
    assert len(steps) >= 2  # linen and NNX
    for block in steps:
        body = block[re.search(r"^@.*jit\ndef train_step", block, flags=re.M).start() :]
        assert len(body.split("\n\n")[0].splitlines()) <= 20


def test_readme_has_the_two_commands():
    assert 'python -m pip install -e ".[benchmarks]" && python -m benchmarks quickstart' in README
    assert 'python -m pip install -e ".[test]" && python -m pytest' in README


def not_in_results(readme):
    """Rows of tables in the README's section of figures, and numbers of its text, of no record."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    section = readme.split("## What it gives")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    text = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    numbers = re.findall(r"(?<![\w.])\d*\.\d+", text)
    known = set(re.findall(r"(?<![\w.])\d*\.\d+", results))
    return [row for row in rows if row not in results] + [n for n in numbers if n not in known]


def test_numbers_of_the_readme_are_those_of_the_results():
    assert not_in_results(README) == []
    section = README.index("## What it gives")
    numbers = list(re.finditer(r"\d\.\d+", README[section : README.index("## Reference")]))
    assert numbers
    for number in numbers:  # each of them, edited, would be found
        last = section + number.end() - 1
        edited = README[:last] + str((int(README[last]) + 5) % 10) + README[last + 1 :]
        assert not_in_results(edited)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb")))
def test_notebooks_are_paired(name):
    script = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.ipynb")
    assert [c.source for c in script.cells] == [c.source for c in notebook.cells]


def test_without_flax_all_but_cfll_flax_works_and_that_says_what_to_install():
    program = """
import sys
sys.modules["flax"] = None
import cfll, jax.numpy as jnp
head = cfll.ridge_solve(jnp.eye(2), jnp.ones((2, 1)), beta=1.0)
print(head.kernel.shape, cfll.iv.proximal.__name__)
try:
    cfll.flax.TrainState
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == [
        "(2, 1) proximal",
        'cfll.flax needs Flax: python -m pip install "cfll[flax]"',
    ]
