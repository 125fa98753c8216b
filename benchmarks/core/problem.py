"""What is learned: arrays, a network, the length of a run. `benchmarks/tasks/` makes them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import cfll.flax
from benchmarks.core.methods import Batch, Method
from cfll.networks import Backbone


class Data(NamedTuple):
    """Arrays: inputs (n, ...) and targets (n, ..., o)."""

    train: Batch  # to learn from
    validation: Batch  # to choose hyperparameters by
    test: Batch | None = None  # for the curves; `None`: there are none
    # For the reported number; `None`: it is the last one of the test curve.
    final: Batch | None = None
    scale: float = 1.0  # multiplies mean squared errors into their unit


class Problem(NamedTuple):
    """What is learned."""

    # All that determines a result besides method, hyperparameters, batch size and seed; part of the
    # key of every run.
    settings: Mapping[str, Any]
    epochs: Callable[[int], int]  # batch size -> passes over the training data
    load: Callable[[], Data]  # makes or reads the data; called only if something is to be trained
    # (seed, first inputs) -> the network, head included; its parameters as a `Backbone`
    network: Callable[[int, Any], Backbone]
    metric: str  # "MSE" or "accuracy": what the curves show, and by its sign what is better
    # Method -> first rate and strength to try; a strength is ignored where a method has none.
    start: Callable[[Method], tuple[float, ...]]
    # (batch, generator) -> batch, or None.
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None
    num_measurements: int = 20  # points of a curve

    @property
    def sign(self) -> int:
        """What to multiply the metric by so that less is better."""
        return 1 if self.metric == "MSE" else -1

    @property
    def worst(self) -> float:
        """The metric of a run that diverged."""
        return math.inf if self.metric == "MSE" else 0.0


def starts(rates: Mapping[str, float], **strengths: float) -> Callable[[Method], tuple[float, ...]]:
    """A `Problem.start`: rates by optimizer; lam, beta and ratio by name, 1 if not given."""
    return lambda method: (rates[method.optimizer], strengths.get(method.strength or "", 1.0))


def network(model: Any, seed: int, inputs: Any) -> Backbone:
    """A linen module (method `features`, dense layer `head`) as a backbone that keeps its head."""
    variables = model.init(jax.random.key(seed), np.asarray(inputs, np.float32))
    return cfll.flax.backbone(model, variables, method="features")
