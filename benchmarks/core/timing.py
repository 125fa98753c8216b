"""Seconds of several candidates in turn, so that what else runs slows all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.core.comparison import Comparison, Config


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate per round, after two that compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for count in range(rounds + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if count >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_step(comparison: Comparison, config: Config, num_steps: int) -> Callable[[], Any]:
    """A step of a run on one batch, to be timed; it keeps its own state."""
    step, state, _ = comparison.prepare(config, num_steps)
    train = comparison.data().train
    batch = type(train)(*(part[: config.batch_size] for part in train))

    def run() -> Any:
        nonlocal state
        state, loss = step(state, batch, batch)
        return state, loss

    return run
