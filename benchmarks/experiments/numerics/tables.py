"""Tables of the errors, and what they have in common with the claims."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.experiments.numerics.measure import SINGULAR, SOLVERS, Solved
from benchmarks.experiments.numerics.problems import SPECTRUM, STRUCTURES, Settings, cases
from benchmarks.reporting.summary import Table, tabulate


def shown(error: float) -> str:
    """An error with one digit."""
    return f"{error:.0e}" if np.isfinite(error) else "NaN"


def worst(solved: Iterable[Solved]) -> tuple[float, float]:
    """The largest errors of head and predictions; zero of none."""
    listed = list(solved)
    return (
        max((one.head for one in listed), default=0.0),
        max((one.predictions for one in listed), default=0.0),
    )


def _cell(solved: Sequence[Solved]) -> str:
    """Both errors, with a star where the diagnostics warn of every one of the problems."""
    if not solved:
        return ""
    head, predictions = worst(solved)
    if not np.isfinite(head):
        return "NaN"
    return f"{shown(head)} / {shown(predictions)}" + "*" * all(one.warned for one in solved)


def _routes(solved: Iterable[Solved]) -> str:
    return ", ".join(dict.fromkeys(one.route for one in solved if one.solver == "auto"))


def _row(solved: Sequence[Solved]) -> tuple[str, ...]:
    """A cell per solver, and where auto went."""
    cells = [_cell([one for one in solved if one.solver == solver]) for solver in SOLVERS]
    return (*cells, _routes(solved))


_LEGEND = (
    "Relative errors of head / predictions, largest of {seeds} problems per cell; *: `rcond` calls "
    "the system singular ({limit:.1g} and below), so a caller is warned; NaN: no answer, which is "
    "seen as well."
)


def spectrum_table(settings: Settings, dtype: str, solved: Sequence[Solved]) -> Table:
    """Errors by penalty and condition number of the features."""
    names = {size: name for name, size in settings.sizes if size.bias}
    rows = []
    for case in cases(settings):
        here = [one for one in solved if one.case == case]
        if (case.dtype, case.kind) == (dtype, SPECTRUM) and case.size in names and here:
            rows.append(
                (f"{names[case.size]}, {case.penalty:g}", f"{case.condition:.0e}", *_row(here))
            )
    return Table(
        caption=f"{dtype}, prescribed singular values, with bias. "
        + _LEGEND.format(seeds=settings.num_seeds, limit=SINGULAR * np.finfo(dtype).eps)
        + " Penalties as shares of the largest eigenvalue of the Gram matrix.",
        headings=("shape, penalty", "condition of the features", *SOLVERS, "auto took"),
        rows=tuple(rows),
    )


def structure_table(settings: Settings, solved: Sequence[Solved]) -> Table:
    """Errors on features as networks have them, the worst over the paper's penalties."""
    rows = []
    for dtype in settings.dtypes:
        for kind in STRUCTURES:
            for name, size in settings.sizes:
                here = [one for one in solved if one.case[:3] == (dtype, kind, size)]
                if here:
                    rows.append((f"{dtype}, {kind}, {name}", *_row(here)))
    penalties = ", ".join(f"{penalty:g}" for penalty in settings.paper_penalties)
    return Table(
        caption=f"ReLU features, one-hot targets, lam = {penalties}. "
        + "Half of the features are dead, repeated or combinations of others, or all are scaled by "
        "1e-6 to 1e6. Relative errors of head / predictions, the largest over penalties and seeds; "
        "*: `rcond` warns of all.",
        headings=("features", *SOLVERS, "auto took"),
        rows=tuple(rows),
    )


def trust_table(settings: Settings, solved: Sequence[Solved]) -> Table:
    """What a caller who looks at `rcond` still has to reckon with."""
    groups = {
        f"{dtype}, {solver}": [s for s in solved if (s.case.dtype, s.solver) == (dtype, solver)]
        for dtype, solver in itertools.product(settings.dtypes, SOLVERS)
    }
    answered = {name: [s for s in some if np.isfinite(s.head)] for name, some in groups.items()}
    silent = {name: worst(s for s in some if not s.warned) for name, some in answered.items()}
    return tabulate(
        "All problems of this section. The last two columns: the largest relative errors "
        "of which neither `rcond` nor a NaN warns.",
        groups if solved else (),
        {
            "solver": str,
            "problems": lambda name: str(len(groups[name])),
            "NaN": lambda name: str(len(groups[name]) - len(answered[name])),
            "warned": lambda name: str(sum(s.warned for s in answered[name])),
            "head": lambda name: shown(silent[name][0]),
            "predictions": lambda name: shown(silent[name][1]),
        },
    )
