"""speed: kernels against a floor and against peers, training steps against SGD, and how both grow.

All comparisons are ratios within one run: the candidates take turns, in rounds, and a round gives
one ratio; what is reported is the median over the rounds, and the middle half of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.core.records import Record, Records
from benchmarks.core.runner import running
from benchmarks.experiments import Experiment
from benchmarks.experiments.speed import growth, kernels, steps
from benchmarks.experiments.speed.ratios import BETA, ROUNDS
from benchmarks.reporting.summary import Summary, show


def cases() -> Iterator[tuple[Record, Callable[[], Record]]]:
    """Keys and what to run for them."""
    for shape in kernels.SHAPES:
        yield {"part": "kernel", "shape": list(shape)}, partial(kernels.kernel_case, shape)
    for name, step in steps.STEP_CASES.items():
        yield {"part": "step", "name": name}, partial(steps.step_case, step)
    for shape in dict.fromkeys(shape for shapes in growth.AXES.values() for shape in shapes):
        yield {"part": "growth", "shape": list(shape)}, partial(growth.growth_case, shape)
    for name in growth.SPARINGLY:
        yield {"part": "sparingly", "name": name}, partial(growth.sparing_case, name)


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Tables, figures and claims from finished cases."""
    found = [(key, record) for key, _ in cases() if (record := records.get(key)) is not None]
    kernel, step, grown, sparing = (
        [(key, record) for key, record in found if key["part"] == part]
        for part in ("kernel", "step", "growth", "sparingly")
    )
    tables, claims = [], []
    if kernel:
        tables.append(kernels.kernel_table(kernel))
        claims += kernels.kernel_claims(kernel)
    if step:
        tables += [steps.step_table(step), steps.cost_table(step)]
        claims += steps.step_claims(step)
    if grown:
        tables.append(growth.growth_table(grown))
    if sparing:
        tables.append(growth.sparing_table(sparing))
    return Summary(
        title="Speed: kernels, training steps, growth",
        command="python -m benchmarks speed",
        setup=f"Ratios of times measured in turns, median of {ROUNDS} rounds (middle half of "
        "them). *Floor*: the same products and one Cholesky factorization and solve by BLAS and "
        "LAPACK from SciPy, on one thread (as all LAPACK here, XLA's included: OpenBLAS's threads "
        "spin while they wait, and take the cores from XLA; XLA's own products use all cores). "
        f"Features after a ReLU, beta = lam = {BETA:g}, intercepts "
        "everywhere, float32. Ours is called as it comes, outside of jit. A ratio to the floor at "
        "a shape of microseconds is mostly the time of calling a compiled function from Python, "
        "whose own time is in the last column.",
        tables=tables,
        claims=claims,
        figures=growth.growth_figure(grown, figures / "speed_growth.png"),
    )


def speed(out: Path = Path("benchmarks/out/speed")) -> None:
    """Kernels against a floor, training steps against SGD, growth. Leave the machine alone.

    Args:
      out: folder of finished measurements and figures.
    """
    with running(out, "speed", len(list(cases()))) as runner:
        for key, measure in cases():
            runner.run(key, measure, " ".join(str(value) for value in key.values()))
    show(summarize(Records(out / "speed.jsonl"), out, "cpu"))


EXPERIMENTS = (Experiment(speed, summarize, place=80),)
