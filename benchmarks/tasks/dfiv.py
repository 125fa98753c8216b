"""Deep-feature instrumental variables on dSprites and on the demand design: data and networks."""

import dataclasses
import functools
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import cfll.flax
from benchmarks.data import demand, dsprites
from benchmarks.models import dfiv as models
from cfll import iv

Preset = Literal["cpu", "paper"]
Design = Literal["dsprites", "demand"]


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset means."""

    num_train: int  # observations; both stages draw their batches from all of them
    rounds: int  # of 20 stage-1 updates and one stage-2 update
    batch_sizes: tuple[int, ...]  # of both stages
    seeds: tuple[int, ...]  # of data, initialization and batches; the search runs on the first
    width_factor: float  # scales the hidden widths of the published networks


SIZES: dict[tuple[str, str], Size] = {
    ("dsprites", "cpu"): Size(5000, 300, (64, 256, 1024), (0, 1, 2), 0.25),
    ("dsprites", "paper"): Size(10_000, 10_000, (64, 256, 1024, 5000), (0, 1, 2), 1.0),
    ("demand", "cpu"): Size(5000, 300, (64, 256, 1024), (0, 1, 2, 3, 4), 1.0),
    ("demand", "paper"): Size(5000, 10_000, (64, 256, 1024, 5000), (0, 1, 2), 1.0),
}


class Task(NamedTuple):
    """Observations, and the points where the truth is known."""

    train: iv.IVBatch
    validation: Any
    test: Any


@functools.lru_cache(maxsize=1)
def load(design: Design, num_train: int, seed: int, file: Path | None) -> Task:
    """The data of one seed."""
    if design == "demand":
        drawn: Any = demand.make_demand(num_train, seed)
    else:
        hearts = dsprites.read_hearts(file) if file else dsprites.render_hearts()
        drawn = dsprites.make_iv(num_train, seed, hearts)
    train_set = iv.IVBatch(**drawn.train._asdict())
    return Task(train_set, drawn.validation, drawn.test)


@partial(jax.jit, static_argnums=0)
def initialized(module: Any, key: jax.Array, inputs: jax.Array) -> Any:
    """Variables of a module, compiled once for all seeds."""
    return module.init(key, inputs, train=False)


def make_networks(design: Design, width_factor: float, seed: int, batch: iv.IVBatch) -> iv.Networks:
    """Published networks, initialized."""
    names = ("treatment", "instrument") + (("covariate",) if design == "demand" else ())
    keys = jax.random.split(jax.random.key(seed), len(names))

    def backbone(name: str, key: jax.Array) -> iv.Backbone:
        module = getattr(models, f"{design}_{name}")(width_factor)
        variables = initialized(module, key, getattr(batch, name)[:2])
        return cfll.flax.backbone(module, variables)

    return iv.Networks(*map(backbone, names, keys))


def with_running_statistics(networks: iv.Networks) -> iv.Networks:
    """Networks of stage 2 whose batch norms train, too, with running statistics: as evaluated."""

    def wrap(backbone: iv.Backbone) -> iv.Backbone:
        def apply(params: Any, stats: Any, inputs: Any, *, train: bool) -> tuple[jax.Array, Any]:
            features, _ = backbone.apply(params, stats, inputs, train=False)
            moved = backbone.apply(params, stats, inputs, train=True)[1] if train else stats
            return features, jax.lax.stop_gradient(moved)

        return backbone._replace(apply=apply)

    treatment, instrument, covariate = networks
    return iv.Networks(wrap(treatment), instrument, covariate and wrap(covariate))


def batches(data: iv.IVBatch, batch_size: int, rounds: int, seed: int) -> Any:
    """Two batches per round, drawn without replacement from all observations."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        chosen = rng.permutation(len(data.outcome))
        size = min(batch_size, len(chosen) // 2)
        yield tuple(
            jax.tree.map(lambda a, rows=rows: a[rows], data)
            for rows in (chosen[:size], chosen[size : 2 * size])
        )
