"""The training loop and the evaluation that all experiments share.

Knows arrays and step functions, neither models nor cfll. The loop is a Python loop around a jitted
step on purpose: on CPU, XLA runs several kinds of layers much slower inside `lax.scan`.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

Batch = tuple[np.ndarray, np.ndarray]


class Curve(NamedTuple):
    """What a run leaves behind besides its state."""

    steps: list[int]  # after how many steps the error was measured
    errors: list[Any]  # what was measured; `math.inf` from divergence on
    seconds_per_step: float  # median over the run, compilation excluded


def batches(
    inputs: np.ndarray, targets: np.ndarray, *, batch_size: int, epochs: int, seed: int
) -> Iterator[Batch]:
    """Shuffled batches of equal size; the remainder of an epoch is left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(inputs))
        for start in range(0, len(inputs) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield inputs[chosen], targets[chosen]


def train(
    step: Callable[..., tuple[Any, jax.Array]],
    state: Any,
    data: Iterator[tuple[Any, Any]],
    *,
    error: Callable[[Any], Any] = lambda state: 0.0,
    measure_at: Collection[int] = (),
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[Any, Curve]:
    """Train until the data end or the loss is not finite: the last state and the curve.

    step: (state, *item) -> (state, loss), jitted; data yields the items. `error` measures a state
    after the steps in `measure_at`, a number or several; infinite from divergence on. Only these
    two look inside the state.
    """
    errors: dict[int, Any] = dict.fromkeys(sorted(measure_at), math.inf)
    seconds = []
    for count, item in enumerate(data, start=1):
        start = time.perf_counter()
        state, device_loss = step(state, *item)
        loss = float(device_loss)  # waits for the step: dispatch is asynchronous
        seconds.append(time.perf_counter() - start)
        on_step(loss)
        if not math.isfinite(loss):
            break
        if count in measure_at:
            measured = error(state)
            errors[count] = measured if np.all(np.isfinite(measured)) else math.inf
    # The first step compiles; the second may once more, for arrays that are now on the device.
    return state, Curve(
        list(errors), list(errors.values()), float(np.median(seconds[2:] or seconds))
    )


def measurement(
    metric: str, outputs: Callable[[Any, Any], jax.Array]
) -> Callable[[Any, tuple[Any, Any]], float]:
    """The evaluator, (state, (inputs, targets)) -> mean squared error or accuracy, in chunks.

    The mean is over samples and outputs; outputs: (state, inputs) -> predictions.
    """

    @jax.jit
    def total(state: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        predicted = outputs(state, inputs)
        if metric == "MSE":
            return ((predicted - targets) ** 2).sum()
        return (predicted.argmax(axis=-1) == targets.argmax(axis=-1)).sum()

    def measure(state: Any, batch: tuple[Any, Any]) -> float:
        inputs, targets = batch
        size = chunk_size(targets)
        starts = range(0, len(inputs), size)
        sums = [float(total(state, inputs[i : i + size], targets[i : i + size])) for i in starts]
        return sum(sums) / (targets.size if metric == "MSE" else len(targets))

    return measure


def marks(num_steps: int, at_most: int) -> set[int]:
    """Numbers of steps to measure at: evenly spaced, the last step among them, zero not."""
    return {int(step) for step in np.linspace(0, num_steps, at_most + 1, dtype=int)} - {0}


def chunk_size(targets: np.ndarray, rows_at_once: int = 2**14, at_most: int = 512) -> int:
    """How many samples to evaluate at once: all positions of a sample count as rows."""
    return max(1, min(at_most, rows_at_once // math.prod(targets.shape[1:-1])))


def first_at_or_below(steps: Iterable[int], errors: Iterable[float], level: float) -> int | None:
    """After how many steps a curve is first at or below a level; None if never."""
    return next((s for s, e in zip(steps, errors, strict=True) if e <= level), None)
