"""imagenet: NFNet-F0 on ImageNet, Figure 8 of the paper, a thousand classes as one-hot targets."""

import os
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.core.runner import running
from benchmarks.data import image_folder
from benchmarks.experiments import Experiment
from benchmarks.experiments.imagenet.findings import announce, percent, summarize
from benchmarks.experiments.imagenet.recipe import (
    METHODS,
    PRESETS,
    RATES,
    Config,
    Method,
    Plan,
    PresetName,
)
from benchmarks.experiments.imagenet.train import Trainer, label_of
from benchmarks.reporting.summary import show


def imagenet(
    preset: PresetName = "cpu",
    data: Path | None = None,
    out: Path = Path("benchmarks/out/imagenet"),
    methods: tuple[Method, ...] = METHODS,
    rates: tuple[float, ...] = (),
    lam: float = 1e4,
    beta: float = 0.01,
    batch_size: int | None = None,
    epochs: int | None = None,
    warmup_epochs: int | None = None,
    seed: int = 0,
    workers: int = 2 * (os.cpu_count() or 1),
) -> None:
    """Train NFNet-F0 on ImageNet with cross entropy, a squared loss and closed-form heads (Fig. 8).

    Reads images from folders by class; goes on from the last epoch.

    Args:
      preset: "paper" for the sizes of the paper, "cpu" for a small network on small images.
      data: folder with train/<class>/*.JPEG and val/<class>/*.JPEG, the layout of ImageNet; sets of
        fewer classes in the same layout do as well.
      out: folder of results, checkpoints and figures.
      methods: rows of the table.
      rates: peak learning rates to try with every method, for a batch of 4096 images, e.g. the
        paper's 0.1 1 1.6 2 5; if none, the paper's best of each method.
      lam: proximal coefficient, for a batch of 4096 images.
      beta: penalty of ridge.
      batch_size: images per step; rates and lam are scaled with it.
      epochs: passes over the training images.
      warmup_epochs: of them with a growing rate.
      seed: of initialization, order and augmentation.
      workers: threads that read images.
    """
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "epochs": epochs,
        "warmup_epochs": warmup_epochs,
    }
    sizes = PRESETS[preset]._replace(**{k: v for k, v in given.items() if v is not None})
    try:
        splits = image_folder.open_image_folder(data)
        plan = Plan(preset, sizes, lam, beta, seed, image_folder.fingerprint(splits))
        trainer = Trainer(plan, splits, out, workers)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error

    configs = [Config(method, r) for method in methods for r in rates or (RATES[method],)]
    with running(out, "imagenet", len(configs)) as runner:
        announce(runner.records, plan, configs)
        for config in configs:
            runner.run(
                plan.key(config),
                partial(trainer.record, config, runner.progress),
                label_of(config, plan),
                lambda r: "diverged" if r["diverged"] else f"top-1 {percent(r['top1'])}",
            )
        found = summarize(runner.records, out, preset)
    show(found)


EXPERIMENTS = (Experiment(imagenet, summarize, place=60, presets=get_args(PresetName)),)
