"""What the last call with a preset found, as far as its runs are finished."""

import json
from pathlib import Path

import numpy as np

from benchmarks.core.records import Record, Records
from benchmarks.experiments.imagenet.recipe import (
    CROSS_ENTROPY,
    METHODS,
    PRESETS,
    PROXIMAL,
    RATES,
    REFERENCE_BATCH,
    RIDGE,
    SQUARED,
    Config,
    Plan,
)
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Claim, Summary, Table, tabulate


def announce(records: Records, plan: Plan, configs: list[Config]) -> None:
    """Note which runs belong to the preset's last call: `summarize` has no data to tell by."""
    key, runs = _announcement(plan.name), [plan.key(config) for config in configs]
    if records.get(key) != {"runs": json.loads(json.dumps(runs))}:
        records.add(key, {"runs": runs})


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """What the last call with a preset found, as far as its runs are finished."""
    keys = (records.get(_announcement(preset)) or {"runs": []})["runs"]
    runs = [(key, record) for key in keys if (record := records.get(key)) is not None]
    best = {
        method: max(
            (run for run in runs if run[0]["method"] == method), key=lambda run: _last(run[1])
        )
        for method in dict.fromkeys(key["method"] for key, _ in runs)
    }
    drawn = []
    curves = {method: record for method, (_, record) in best.items() if record["top1"]}
    if curves:
        drawn.append(draw(curves, figures / f"imagenet_{preset}.png"))
    return Summary(
        title="Figure 8: ImageNet, NFNet-F0",
        command=f"python -m benchmarks imagenet --preset {preset} --data FOLDER",
        setup=_setup(runs[0][0] if runs else None, preset),
        tables=[_table(best)] if best else [],
        claims=_claims(runs, best),
        figures=drawn,
    )


def draw(curves: dict[str, Record], path: Path) -> Path:
    """Accuracy against steps, one panel for the parameters and one for their average."""
    panels = {"top1": "parameters", "ema_top1": "moving average of the parameters"}
    # One style per method, whichever of them are there.
    styles = dict(zip((CROSS_ENTROPY, PROXIMAL, SQUARED, RIDGE), plots.LINES, strict=False))
    with plots.subplots(path, 1, len(panels), figsize=(10.5, 3.8), sharey=True) as grid:
        for axes, (field, title) in zip(grid, panels.items(), strict=True):
            for method, record in curves.items():
                marker = "o" if len(record["steps"]) < 3 else None  # a point is no line
                percent = 100 * np.array(record[field])
                axes.plot(record["steps"], percent, label=method, marker=marker, **styles[method])
            axes.set(title=title, xlabel="training steps")
            axes.set_xlim(left=0)
        grid[0].set_ylabel("top-1 accuracy on val (%)")
        grid[0].figure.legend(
            *grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4
        )
    return path


def _announcement(preset: str) -> Record:
    return {"what": "imagenet, last call", "preset": preset}


def _last(record: Record) -> float:
    """Final accuracy; a run that diverged is worse than any other."""
    return -1.0 if record["diverged"] or not record["top1"] else record["top1"][-1]


def percent(accuracy: list[float]) -> str:
    """The last accuracy of a curve."""
    return f"{100 * accuracy[-1]:.2f} %" if accuracy else "none"


def _shown(record: Record, field: str) -> str:
    return "diverged" if record["diverged"] else percent(record[field])


def _is_figure_8(key: Record) -> bool:
    """Whether a run is large enough to decide a sentence about ImageNet; the batch may differ."""
    paper = PRESETS["paper"]
    return (
        key["data"]["classes"] == paper.model.num_outputs
        and key["model"] == repr(paper.model)
        and (key["train_size"], key["eval_size"]) == (paper.train_size, paper.eval_size)
        and key["epochs"] == paper.epochs
    )


def _table(best: dict[str, tuple[Record, Record]]) -> Table:
    def seconds(run: tuple[Record, Record]) -> str:
        return f"{run[1]['seconds_per_step']:.3g}" if run[1]["seconds_per_step"] else "none"

    return tabulate(
        "Top-1 accuracy on val at the end, of the parameters and of their moving average "
        "(EMA); median seconds per step, reading not included; the best peak rate of those tried, "
        f"for a batch of {REFERENCE_BATCH}.",
        [best[method] for method in METHODS if method in best],
        {
            "method": lambda run: run[0]["method"],
            "top-1": lambda run: _shown(run[1], "top1"),
            "EMA top-1": lambda run: _shown(run[1], "ema_top1"),
            "s/step": seconds,
            "rate": lambda run: f"{run[0]['rate']:.4g}",
        },
    )


def _claims(
    runs: list[tuple[Record, Record]], best: dict[str, tuple[Record, Record]]
) -> list[Claim]:
    large = all(_is_figure_8(key) for key, _ in runs)

    def claim(sentence: str, holds: bool, evidence: str) -> Claim:
        if large:
            return Claim(sentence, holds, evidence)
        return Claim(sentence, None, f"runs far smaller than the paper's do not decide; {evidence}")

    def compare(sentence: str, other: str, better: bool) -> Claim:
        if PROXIMAL not in best or other not in best:
            return Claim(sentence, None, f"needs runs of {PROXIMAL} and {other}")
        (_, ours), (_, theirs) = best[PROXIMAL], best[other]
        higher, lower = (ours, theirs) if better else (theirs, ours)
        return claim(
            sentence,
            _last(higher) > _last(lower),
            f"top-1 {_shown(ours, 'top1')} ({PROXIMAL}) and {_shown(theirs, 'top1')} ({other}); "
            f"EMA {_shown(ours, 'ema_top1')} and {_shown(theirs, 'ema_top1')}",
        )

    tried = {
        method: {key["rate"]: _last(record) for key, record in runs if key["method"] == method}
        for method in METHODS
    }
    sentence = (
        'Appendix E: "all the methods performed the best with alpha = 1.6 except for l2 loss which '
        'performed the best with alpha = 1"'
    )
    if all({1.0, 1.6} <= set(rates) for rates in tried.values()):
        winners = {method: max(rates, key=lambda r: rates[r]) for method, rates in tried.items()}
        evidence = "; ".join(
            f"{method}: {winners[method]:.4g} of {', '.join(f'{r:.4g}' for r in sorted(rates))}"
            for method, rates in tried.items()
        )
        best_rate = claim(sentence, winners == RATES, f"best rates: {evidence}")
    else:
        best_rate = Claim(sentence, None, "needs all methods at --rates 0.1 1 1.6 2 5")
    return [
        compare('Section 6: "our method achieves better performance than l2 loss"', SQUARED, True),
        compare('Section 6: "but under-performs Cross Entropy"', CROSS_ENTROPY, False),
        best_rate,
    ]


def _setup(key: Record | None, preset: str) -> str:
    common = (
        "SGD with Nesterov's momentum 0.9, weight decay 2e-5 on kernels, adaptive clipping 0.01, "
        "warm-up and cosine decay to zero; label smoothing 0.1, mixup 0.2 and cutmix on half a "
        "batch each, RandAugment 4 x 5; bfloat16 backbone, float32 head. Closed-form heads: "
        "Algorithm 1, from zero, neither decayed nor clipped; lam = 1e4 at a batch of 4096 and in "
        "proportion to it, beta = 0.01, unless set otherwise. One seed. As in the paper, the rate "
        "is chosen on `val`, which is also what is reported."
    )
    small = (
        " The network, the images and the number of epochs are far below the paper's: this preset "
        "shows that the code runs with a solve of the true size, not which method is better."
    )
    if key is None:
        return "No runs yet. " + common
    data = key["data"]
    sizes = (
        f"Data: {data['train']} training and {data['val']} validation images of {data['classes']} "
        f"classes, {key['train_size']} and {key['eval_size']} pixels. {key['epochs']} epochs, "
        f"{key['warmup_epochs']} of warm-up, at a batch of {key['batch_size']}. "
    )
    return sizes + common + (small if preset == "cpu" else "")
