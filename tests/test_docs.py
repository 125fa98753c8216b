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
