r"""numerics: how exact are the heads, for condition numbers from 1 to 1e12?

Features with prescribed singular values, and features as networks have them (dead, repeated,
collinear, badly scaled), are solved by every solver in float32 and float64. The references are
exact: floats are rational numbers, and the normal equations are solved in integers. So the errors
in the tables are those of the solvers alone, also where float64 itself has no digits left.

Two errors, both relative and in the Frobenius norm: of the head (kernel over bias), and of its
predictions on the features that it was solved on. The second is what a training step sees; the
first also counts directions in which the features hardly vary.

Everything is dimensionless.
"""

from pathlib import Path

from benchmarks.core.records import Records
from benchmarks.core.runner import running
from benchmarks.experiments import Experiment
from benchmarks.experiments.numerics.claims import claims_of
from benchmarks.experiments.numerics.figure import draw
from benchmarks.experiments.numerics.measure import SOLVERS, read, run
from benchmarks.experiments.numerics.problems import Settings, cases
from benchmarks.experiments.numerics.tables import spectrum_table, structure_table, trust_table
from benchmarks.reporting.summary import Summary, show

# Seconds to minutes, so that there is one size only.
SETTINGS = Settings()


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Draw the figure and say what the numbers say; there is one size only."""
    settings = SETTINGS
    solved = read(records, settings)
    tables = [
        *(spectrum_table(settings, dtype, solved) for dtype in settings.dtypes),
        structure_table(settings, solved),
        trust_table(settings, solved),
    ]
    return Summary(
        title="Accuracy of the solvers",
        command="python -m benchmarks numerics",
        setup=(
            "Proximal heads of features with log-spaced singular values from 1 to 1 / condition "
            "number (with the ones column of the bias; up to a factor), targets and anchor from "
            f"N(0, 1), {settings.num_outputs} outputs, {settings.num_seeds} seeds; and of features "
            "as networks have them, anchor at zero. Data are rounded to the dtype, so that in "
            "float32 condition numbers above 1e8 end there. References are exact: the normal "
            "equations in integers. The condition number of the penalized system, of which the "
            "guide speaks, is the square of that of the features where there is no penalty, and "
            "at most one over the relative penalty where there is one. The problems without bias "
            "are in the claims only."
        ),
        tables=tables if solved else [],
        claims=claims_of(solved),
        figures=draw(settings, solved, figures / "numerics.png"),
    )


def numerics(out: Path = Path("benchmarks/out/numerics")) -> None:
    """Measure the errors of all solvers for condition numbers from 1 to 1e12.

    Some minutes on one core; on whatever device JAX has, which the records name. To compare
    devices, take a folder for each: a folder that has the numbers is not computed again.

    Args:
      out: folder of the numbers and the figure.
    """
    all_cases = cases(SETTINGS)
    with running(out, "numerics", len(all_cases) * len(SOLVERS)) as runner:
        for case in all_cases:
            run(SETTINGS, case, runner)
    show(summarize(Records(out / "numerics.jsonl"), out, "cpu"))


EXPERIMENTS = (Experiment(numerics, summarize, place=90),)
