"""limits: what a solve asks of the memory and of the compiler, and the digits float32 leaves of it.

Memory and compilations are XLA's own counts, the same on every machine of one kind; errors are
against float64. Only the seconds to compile are of the machine.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

import cfll
from benchmarks.core.records import Record, Records
from benchmarks.core.runner import running
from benchmarks.experiments import Experiment
from benchmarks.reporting.summary import Claim, Summary, Table, show, tabulate

WIDE = tuple((16, d) for d in (512, 2048, 8192, 20_000, 100_000))
TALL = tuple((n, 8) for n in (1024, 2**16, 2**20, 4_000_000))
SOLVERS = {True: ("auto", "dual"), False: ("auto", "primal")}  # by whether n < d
OUTPUTS = 3
TARGET_MEANS, FEATURE_MEANS = (1.0, 1e2, 1e4, 1e6), (1.0, 1e2, 1e4)  # in standard deviations
ROWS_OF_CHUNK, CHUNKS = 64, (5_000, 400_000)
BETA = 1e-3
COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX reports


def footprint(shape: tuple[int, int]) -> Record:
    """Bytes besides arguments and results of a compiled `ridge_solve`, and seconds to compile."""
    n, d = shape
    rows = [jax.ShapeDtypeStruct((n, columns), jnp.float32) for columns in (d, OUTPUTS)]
    record = {}
    for solver in SOLVERS[n < d]:
        lowered = jax.jit(partial(cfll.ridge_solve, beta=1.0, solver=solver)).lower(*rows)
        start = time.perf_counter()
        memory: Any = lowered.compile().memory_analysis()
        record[solver] = {
            "bytes": memory.temp_size_in_bytes,
            "seconds": time.perf_counter() - start,
        }
    return record


def eager() -> Record:
    """How many programs the second to the sixteenth call compile, outside of jit."""
    features, targets = jnp.eye(8), jnp.ones((8, 1))
    anchor, stats = cfll.LinearHead.zeros(8, 1), cfll.GramStats.zeros(8, 1)
    calls: dict[str, Callable[[], Any]] = {
        "ridge_solve": lambda: cfll.ridge_solve(features, targets, 1.0),
        "prox_solve": lambda: cfll.prox_solve(features, targets, anchor, 1.0),
        "GramStats.add, ridge": lambda: stats.add(features, targets).ridge(1.0),
    }
    programs: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: programs.append(event) if event == COMPILED else None
    )
    compiled = {}
    for name, call in calls.items():
        call()
        programs.clear()
        for _ in range(15):
            call()
        compiled[name] = len(programs)
    return compiled


def with_means(feature_mean: float, target_mean: float) -> Record:
    """Relative errors of kernels with a free bias, from the rows and from sums of chunks."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(4096, 16)) + feature_mean).astype(np.float32)
    kernel = rng.normal(size=(16, 1))
    signal = (features - feature_mean) @ kernel + 0.1 * rng.normal(size=(4096, 1))
    targets = (signal + target_mean).astype(np.float32)
    rows = features.astype(float) - features.mean(axis=0, dtype=float)
    exact = np.linalg.solve(
        rows.T @ rows + BETA * np.eye(16), rows.T @ (targets - targets.mean(dtype=float))
    )
    batch, stats = (jnp.asarray(features), jnp.asarray(targets)), cfll.GramStats.zeros(16, 1)
    for chunk in zip(*(jnp.split(part, 8) for part in batch), strict=True):
        stats = stats.add(*chunk)
    heads = {
        "ridge_solve": cfll.ridge_solve(*batch, BETA, penalize_bias=False),
        "GramStats": stats.ridge(BETA, penalize_bias=False),
    }
    size = np.linalg.norm(exact)
    return {name: float(np.linalg.norm(h.kernel - exact) / size) for name, h in heads.items()}


def long_stream(chunks: int) -> Record:
    """Relative error of the head from sums of so many chunks, whose targets are exactly linear."""
    kernel = jnp.array([[3.0], [1.0], [-5.0], [2.0]])

    @jax.jit
    def head_of(keys: jax.Array) -> cfll.LinearHead:
        def body(stats: cfll.GramStats, key: jax.Array) -> tuple[cfll.GramStats, None]:
            features = jax.random.normal(key, (ROWS_OF_CHUNK, 4)) + 3
            return stats.add(features, features @ kernel + 2), None

        return jax.lax.scan(body, cfll.GramStats.zeros(4, 1), keys)[0].ridge(BETA)

    head = head_of(jax.random.split(jax.random.key(0), chunks))
    got, exact = np.vstack([head.kernel, head.bias]), np.vstack([kernel, [[2.0]]])
    return {"GramStats": float(np.linalg.norm(got - exact) / np.linalg.norm(exact))}


def cases() -> Iterator[tuple[Record, Callable[[], Record]]]:
    """Keys and what to run for them."""
    for shape in WIDE + TALL:
        yield {"part": "footprint", "shape": list(shape)}, partial(footprint, shape)
    yield {"part": "eager", "calls": 15}, eager
    for mean in TARGET_MEANS:
        yield {"part": "means", "features": 0.0, "targets": mean}, partial(with_means, 0.0, mean)
    for mean in FEATURE_MEANS:
        yield {"part": "means", "features": mean, "targets": 0.0}, partial(with_means, mean, 0.0)
    for chunks in CHUNKS:
        key = {"part": "stream", "rows": chunks * ROWS_OF_CHUNK}
        yield key, partial(long_stream, chunks)


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Tables and claims from finished cases."""
    found = [(key, record) for key, _ in cases() if (record := records.get(key)) is not None]
    shapes, eagerly, means, streams = (
        [(key, record) for key, record in found if key["part"] == part]
        for part in ("footprint", "eager", "means", "stream")
    )
    return Summary(
        title="Limits: memory, compilation and the digits of float32",
        command="python -m benchmarks limits",
        setup=f"`cfll.ridge_solve` with {OUTPUTS} outputs and an intercept, float32, as XLA "
        f"compiles it for a CPU; errors of kernels (beta = {BETA:g}) against float64.",
        tables=[
            footprint_table(shapes),
            tabulate(
                "Relative error of the kernel; means in standard deviations. GramStats: in 8 "
                "chunks.",
                means,
                {
                    "mean of features": lambda item: f"{item[0]['features']:g}",
                    "of targets": lambda item: f"{item[0]['targets']:g}",
                    "ridge_solve": lambda item: f"{item[1]['ridge_solve']:.0e}",
                    "GramStats": lambda item: f"{item[1]['GramStats']:.0e}",
                },
            ),
        ],
        claims=claims_of(shapes, eagerly, streams),
        figures=[],
    )


Found = list[tuple[Record, Record]]


def footprint_table(found: Found) -> Table:
    """Memory and compile time, by shape."""

    def cell(name: str, record: Record) -> str:
        part = record.get(name)
        return "" if part is None else f"{part['bytes'] / 1e6:.3g} MB, {part['seconds']:.1f} s"

    names = ("auto", "dual", "primal")
    return Table(
        "Temporary memory of a compiled solve, and seconds to compile it.",
        ("n", "d", *names),
        tuple(
            (*(f"{size:,}" for size in key["shape"]), *(cell(name, record) for name in names))
            for key, record in found
        ),
    )


def claims_of(shapes: Found, eagerly: Found, streams: Found) -> list[Claim]:
    """Sentences of the guide on diagnostics."""
    claims = []
    for wide, other in ((True, "dual"), (False, "primal")):
        ratios = {
            " x ".join(f"{size:,}" for size in key["shape"]): record["auto"]["bytes"]
            / record[other]["bytes"]
            for key, record in shapes
            if (key["shape"][0] < key["shape"][1]) == wide
        }
        claims.append(
            Claim(
                f"'auto' takes at most 3 times the memory of '{other}' (ours).",
                all(ratio <= 3 for ratio in ratios.values()) if ratios else None,
                "; ".join(f"{shape}: {ratio:.2f}" for shape, ratio in ratios.items()),
            )
        )
    for _, record in eagerly:
        claims.append(
            Claim(
                "Outside of jit, calls after the first compile nothing (ours).",
                not any(record.values()),
                "; ".join(f"{name}: {count} of 15 calls" for name, count in record.items()),
            )
        )
    if streams:
        errors = {f"{key['rows']:.1e} rows": record["GramStats"] for key, record in streams}
        claims.append(
            Claim(
                "Sums in float32 over a long stream err by less than 1e-5 (ours).",
                all(error < 1e-5 for error in errors.values()),
                "; ".join(f"{rows}: {error:.0e}" for rows, error in errors.items()),
            )
        )
    return claims


def limits(out: Path = Path("benchmarks/out/limits")) -> None:
    """Memory and compile time of a solve, and the digits that means and long streams leave.

    Args:
      out: folder of finished measurements.
    """
    todo = list(cases())
    with running(out, "limits", len(todo)) as runner:
        for key, run in todo:
            runner.run(key, run, " ".join(str(value) for value in key.values()))
        found = summarize(runner.records, out, "cpu")
    show(found)


EXPERIMENTS = (Experiment(limits, summarize, place=91),)
