"""ablations: Figures F.1 to F.7, bias, initialization and Adam, for Algorithms 1 and 2."""

from pathlib import Path

from benchmarks.core.comparison import Comparison, compare
from benchmarks.core.methods import ALGORITHM_1, ALGORITHM_2, PROXIMAL, Method
from benchmarks.experiments.images import CAPTION, accuracy_curves, image_experiment
from benchmarks.reporting.comparisons import Pair, decide, higher, level, number_table
from benchmarks.reporting.summary import Summary
from benchmarks.tasks.images import DataSet, Size, setup_of

# Topic -> what differs from zeros, a bias and SGD.
TOPICS: dict[str, tuple[dict, ...]] = {
    "bias": ({"use_bias": False},),
    "initialization": tuple({"init": name} for name in ("lecun", "xavier", "he")),
    "optimizer": ({"optimizer": "Adam"},),
}
REASONS = (
    "Reasons, as far as found: at B = 1024 a run has 40 steps and Algorithm 2 takes lam = 0.001, "
    "so that the first solve forgets where the head started. Why Adam is better: not found."
)


def variants(order: str, topic: str) -> list[Method]:
    """The methods of a figure, the usual one first."""
    base = Method("SGD", PROXIMAL, order)
    return [base, *(base._replace(**changes) for changes in TOPICS[topic])]


def all_variants() -> list[Method]:
    """Every variant once."""
    orders = (ALGORITHM_1, ALGORITHM_2)
    return list(dict.fromkeys(m for o in orders for topic in TOPICS for m in variants(o, topic)))


def pairs_of(order: str) -> list[Pair]:
    """What is claimed of two methods."""
    base = Method("SGD", PROXIMAL, order)
    bias = f"A bias makes no difference, {order}: the two are level (F.1)."
    adam = f"Adam is worse than SGD, {order} (F.3)."
    return [
        Pair(bias, base, base._replace(use_bias=False), level),
        *(
            Pair(
                f"Initialization by zeros is better than {init}, {order} (F.2).",
                base,
                base._replace(init=init),
                higher,
            )
            for init in ("lecun", "xavier", "he")
        ),
        Pair(adam, base, base._replace(optimizer="Adam"), higher),
    ]


def answer(comparison: Comparison, name: DataSet, size: Size, figures: Path) -> Summary:
    """Train what is missing and summarize."""
    outcomes = compare(comparison, all_variants(), size.batch_sizes, size.seeds)
    drawn, claims = [], []
    for order in (ALGORITHM_1, ALGORITHM_2):
        for topic in TOPICS:
            shown = [o for o in outcomes if o.method in variants(order, topic)]
            if len({outcome.method for outcome in shown}) > 1:
                path = figures / f"ablation_{name}_{topic}_{order[-1]}.png"
                drawn += accuracy_curves(shown, size.batch_sizes, path)
        claims += [decide(pair, outcomes, size.batch_sizes, ".3f") for pair in pairs_of(order)]
    return Summary(
        title="Figures F.1 to F.7: ablations",
        reasons=REASONS if name == "omniglot" else "",
        command="",
        setup=setup_of(name, size),
        tables=(number_table(outcomes, size.batch_sizes, CAPTION, ".3f"),),
        claims=claims,
        figures=drawn,
    )


EXPERIMENTS = (
    image_experiment(
        "ablations",
        "Figures F.1 to F.7: bias, initialization and Adam, for Algorithms 1 and 2.",
        answer,
        num_rows=12,
        place=53,
    ),
)
