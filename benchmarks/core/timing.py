"""Seconds of a training step, of several methods in turn, so that what else runs slows all alike.

Between `comparison.py` and the experiments.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.core import methods, training
from benchmarks.core.comparison import Config, Problem
from benchmarks.core.methods import Batch, Hyper


def interleaved_seconds(
    problem: Problem, configs: Sequence[Config], num_rounds: int = 30
) -> list[float]:
    """Median seconds per step of each configuration, compilation excluded.

    Args:
      problem: what is learned.
      configs: of one batch size.
      num_rounds: steps of each.
    """
    data = problem.load()
    batch_size = configs[0].batch_size
    runs: list[tuple[Callable[..., Any], methods.State]] = []
    for config in configs:
        network = problem.network(config.seed, data.train.inputs[:1])
        strength = np.float32(1.0 if config.strength is None else config.strength)
        hyper = Hyper(np.float32(config.rate), strength, np.int32(1000))
        state = methods.init(config.method, hyper, network.params, network.stats, config.seed)
        step = jax.jit(partial(methods.step, config.method, network.apply), donate_argnames="state")
        runs.append((partial(step, hyper), state))
    stream = training.batches(*data.train, batch_size=batch_size, epochs=num_rounds + 2, seed=0)
    seconds = []
    # Two rounds more: the first step compiles, the second may once more.
    for arrays in itertools.islice(stream, num_rounds + 2):
        taken, batch = [], Batch(*arrays)
        for index, (take_step, state) in enumerate(runs):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(take_step(state, batch, batch))
            taken.append(time.perf_counter() - start)
            runs[index] = take_step, state
        seconds.append(taken)
    return [float(value) for value in np.median(seconds[2:], axis=0)]
