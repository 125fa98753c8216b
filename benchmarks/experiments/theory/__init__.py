r"""theory: the paper's theorems as numbers (Sections 3 to 5, Appendices A and C), in float64.

Every check is a pure function that returns a NamedTuple. Below, samples come first as everywhere
here: features Phi are (n, d), targets Y are (n, o), the head's kernel W is (d, o). These are the
transposes of the paper's matrices. With the ridge hat matrix H, of eigenvalues s^2 / (s^2 + beta),

    H = Phi (Phi^T Phi + beta I)^{-1} Phi^T                                                 (29)
    Y_star = H Y = Phi W_star,   Y_perp = (I - H) Y                                         (29)
    L_star(Phi) = tr(Y^T Y_perp),   grad L_star(Phi) = -2 Y_perp W_star^T                   (28)

Kernel gradient flow moves features by the tangent kernel *between samples*. Vectorized, it is an
(n d) x (n d) matrix; in the infinite-width limit it is K x I, with K of shape (n, n), so

    dPhi/dt = -K grad L_star(Phi) = 2 K Y_perp W_star^T                                 (36, 37)
    d(Y^T Y_star)/dt = 2 (A B + B A),  A = Y_perp^T K Y_perp,  B = W_star^T W_star     (like 40)
    d(Phi^T K^{-1} Phi)/dt = 4 beta W_star W_star^T

for every beta >= 0. (Derivation: dH = (I - H) dPhi M Phi^T + its transpose, with M = (Phi^T Phi +
beta I)^{-1} and Phi^T (I - H) = beta M Phi^T.) Where the paper has something else, a check measures
the difference: it multiplies by a d x d matrix on the features' side in (37), has Y_star for Y in
(33) and in the left side of (40), and infers from A >= 0, B > 0 that A B + B A >= 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.core.records import Record, Records
from benchmarks.core.runner import running
from benchmarks.experiments import Experiment
from benchmarks.experiments.theory.claims import Runs, claims_of, identities_table
from benchmarks.experiments.theory.figures import (
    DRAWINGS,
    draw_convexity,
    draw_eigenvalues,
    draw_flow,
    draw_width,
)
from benchmarks.experiments.theory.gradients import check_envelope
from benchmarks.experiments.theory.kalman import check_kalman
from benchmarks.experiments.theory.kernel_regime import (
    check_eigenvalues,
    check_flow,
    check_identities,
)
from benchmarks.experiments.theory.landscape import check_convexity, check_critical
from benchmarks.experiments.theory.settings import (
    NUM_FEATURES,
    NUM_OUTPUTS,
    NUM_SAMPLES,
    PRESETS,
    Preset,
    Settings,
)
from benchmarks.experiments.theory.width import check_width
from benchmarks.reporting.summary import Summary, show

# What notebooks/theory.py takes from here.
__all__ = [
    "check_convexity",
    "check_critical",
    "check_eigenvalues",
    "check_envelope",
    "check_flow",
    "check_identities",
    "check_kalman",
    "check_width",
    "draw_convexity",
    "draw_eigenvalues",
    "draw_flow",
    "draw_width",
]


def checks(settings: Settings) -> dict[str, Callable[[], list[Any]]]:
    """Name -> what to run. A check may be several runs."""
    seed, betas = settings.seed, settings.betas
    return {
        "envelope": lambda: [check_envelope(seed + i) for i in range(settings.num_networks)],
        "convexity": lambda: [check_convexity(seed, betas)],
        "critical": lambda: [check_critical(seed, betas)],
        "identities": lambda: [check_identities(seed, betas, settings.num_draws)],
        "flow": lambda: [
            check_flow(seed, beta, settings.horizon if beta > 0 else settings.horizon_zero)
            for beta in betas
        ],
        "eigenvalues": lambda: [
            check_eigenvalues(seed, settings.num_starts, settings.horizon_zero)
        ],
        "width": lambda: [
            check_width(seed, width, settings.num_nets, settings.num_steps, settings.step_size)
            for width in settings.widths
        ],
        "kalman": lambda: [check_kalman(seed, 10)],
    }


def key_of(preset: str, check: str) -> Record:
    """What the record of a check is filed under."""
    return {"experiment": "theory", "check": check, "settings": PRESETS[preset]._asdict()}


def to_record(result: Any) -> Record:
    """A NamedTuple of arrays as lists and numbers."""
    return {name: np.asarray(value).tolist() for name, value in result._asdict().items()}


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Draw the figures and say which sentences of the paper hold."""
    settings = PRESETS[preset]
    results: dict[str, Runs] = {}
    for name in checks(settings):
        record = records.get(key_of(preset, name))
        if record is not None:
            results[name] = [
                {field: np.asarray(value) for field, value in run.items()} for run in record["runs"]
            ]
    paths = []
    for needed, drawing in DRAWINGS.items():
        if all(name in results for name in needed):
            path = figures / f"theory_{needed[0]}.png"
            drawing(*(results[name] for name in needed), path)
            paths.append(path)
    return Summary(
        title="The theorems as numbers (Sections 3 to 5, Appendices A and C)",
        command=f"python -m benchmarks theory --preset {preset}",
        setup=setup_of(settings),
        tables=[] if "identities" not in results else [identities_table(results["identities"][0])],
        claims=claims_of(results),
        figures=paths,
    )


def setup_of(settings: Settings) -> str:
    """Sizes, and what is ours."""
    return (
        f"float64, every number from formulas and seeds. Flows: n = {NUM_SAMPLES} samples, d = "
        f"{NUM_FEATURES} features, o = {NUM_OUTPUTS} outputs, the closed-form kernels of one "
        "hidden layer of erf units, features of the network at initialization. Features are the "
        "pre-activations of the last layer: behind a nonlinearity, as in Eq. (34), their tangent "
        "kernel is not constant. β = 0 is the limit of the proofs' projections; the paper has β > "
        "0. Formulas as in the paper, W is o x d, Φ is d x n; K is the n x n tangent kernel "
        "between samples. Finite networks: one hidden layer, full-batch gradient "
        f"descent, {settings.num_steps} steps of {settings.step_size:g}, β = 0.1, "
        f"{settings.num_nets} networks per width."
    )


def theory(preset: Preset = "cpu", out: Path = Path("benchmarks/out/theory")) -> None:
    """Check the paper's theorems and proofs numerically, in float64.

    About two minutes on two CPU cores.

    Args:
      preset: "paper" draws more often and trains wider networks.
      out: folder of the numbers and the figures.
    """
    found = checks(PRESETS[preset])
    with running(out, "theory", len(found)) as runner:
        for name, check in found.items():

            def make(check: Callable[[], list[Any]] = check) -> Record:
                return {"runs": [to_record(result) for result in check()]}

            runner.run(key_of(preset, name), make, f"check of {name}")
    show(summarize(Records(out / "theory.jsonl"), out, preset))


EXPERIMENTS = (Experiment(theory, summarize, place=70, presets=get_args(Preset)),)
