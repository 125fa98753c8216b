"""The design as checks: no module imports from a layer above it, no file is too long to read."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cfll"
# Bottom to top, as in cfll/__init__.py; beside the last, two-stage heads and Flax.
LAYERS = ["heads", "samples", "solve", "moments", "stats", "posterior", "losses", "rules"]
LAYERS += ["keywords", "transform", "networks", "iv", "flax"]
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> int | None:
    """The place of ``cfll.rules.prox`` in LAYERS, None for the package itself."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def imported_by(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "cfll":
            modules += [f"cfll.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return [module for module in modules if module.startswith("cfll.")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_upward(path):
    module = ".".join(["cfll", *path.relative_to(PACKAGE).with_suffix("").parts])
    own = layer_of(module)
    for other in imported_by(path):
        layer = layer_of(other)
        assert own is None or layer is None or layer <= own, f"{module} imports {other}"


def test_every_module_has_a_layer():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == {
        *LAYERS,
        "__init__",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_above_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350
