"""Strict promotion for the whole suite: a silent cast or broadcast in cfll is an error here."""

import os
from pathlib import Path

import jax
import pytest

from tests import compiled

# Nine tenths of the time is compilation. What is compiled is kept for the other workers, for
# processes that tests start, and for the next run; `python -m pytest --cache-clear` forgets it.
# Without XLA's optimization it takes a quarter less; the gate sets XLA_FLAGS and has it.
DEFAULTS = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
os.environ.update({**DEFAULTS, **os.environ})
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def standard_promotion():
    """JAX's default promotion, for tests of libraries that rely on it (optax.adam, schedules)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Run a test with 64-bit types, as a user who sets jax_enable_x64."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def quick_compilation():
    """Compile without optimizing, in a third less time: for runs of the benchmarks."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _forget_compilations():
    yield
    compiled.forget_in_time()
