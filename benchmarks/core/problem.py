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
    """Arrays: inputs (n, ...) and targets (n, ..., o).

    Attributes:
      train: to learn from.
      validation: to choose hyperparameters by.
      test: for the curves; `None`: there are none.
      final: for the reported number; `None`: it is the last one of the test curve.
      scale: multiplies mean squared errors into their unit.
    """

    train: Batch
    validation: Batch
    test: Batch | None = None
    final: Batch | None = None
    scale: float = 1.0


class Problem(NamedTuple):
    """What is learned.

    Attributes:
      settings: all that determines a result besides method, hyperparameters, batch size and seed;
        part of the key of every run.
      epochs: batch size -> passes over the training data.
      load: makes or reads the data; called only if something is to be trained.
      network: (seed, first inputs) -> the network, head included; its parameters as a `Backbone`.
      metric: "MSE" or "accuracy": what the curves show, and by its sign what is better.
      start: method -> first rate and strength to try.
      augment: (batch, generator) -> batch, or None.
      num_measurements: points of a curve.
    """

    settings: Mapping[str, Any]
    epochs: Callable[[int], int]
    load: Callable[[], Data]
    network: Callable[[int, Any], Backbone]
    metric: str
    start: Callable[[Method], tuple[float, float | None]]
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None
    num_measurements: int = 20

    @property
    def sign(self) -> int:
        """What to multiply the metric by so that less is better."""
        return 1 if self.metric == "MSE" else -1

    @property
    def worst(self) -> float:
        """The metric of a run that diverged."""
        return math.inf if self.metric == "MSE" else 0.0


def network(model: Any, seed: int, inputs: Any) -> Backbone:
    """A linen module with a head as a backbone that keeps the head's parameters.

    Args:
      model: has a method `features` and a dense layer `head`.
      seed: of its initialization.
      inputs: sets the shapes.
    """
    variables = model.init(jax.random.key(seed), np.asarray(inputs, np.float32))
    return cfll.flax.backbone(model, variables, method="features")
