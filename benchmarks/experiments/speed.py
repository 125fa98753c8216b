"""speed: kernels against a floor and against peers, training steps against SGD, and how both grow.

Top of the benchmarks: one experiment, one command. All comparisons are ratios within one run: the
candidates take turns, in rounds, and a round gives one ratio; what is reported is the median over
the rounds, and the middle half of them.

The *floor* is what nobody who forms the normal equations can avoid: the same products by BLAS and
one `potrf` and `potrs` by LAPACK, called from SciPy, without checks, guard or refinement.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from rich.console import Console
from threadpoolctl import threadpool_limits

import cfll
from benchmarks.core import methods
from benchmarks.core.comparison import network
from benchmarks.core.methods import (
    ALGORITHM_1,
    EQUATION_17,
    GRADIENT,
    PROXIMAL,
    Batch,
    Hyper,
    Method,
)
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Record, Records
from benchmarks.models.fno import FNO1d
from benchmarks.models.mlp import MLP
from benchmarks.models.resnet import ResNet18
from benchmarks.reporting import plots, summary

ROUNDS = 9
BETA = 10.0

Candidates = Mapping[str, Callable[[], Any]]

# The candidates of the first table.
FLOOR, OURS, DISPATCH = "floor", "cfll", "an empty jitted call"
PEERS = ("scikit-learn", "lineax", "PyTorch")

SHAPES = (
    (32, 512, 10),
    (128, 512, 100),
    (1024, 512, 100),
    (4096, 512, 100),
    (4096, 3072, 1000),
    (128, 3072, 1000),
    (8192, 129, 1),
    (65536, 64, 1),
)


# Measuring ----------------------------------------------------------------------------------------


def interleaved(candidates: Candidates, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each candidate, one number per round.

    Args:
      candidates: name -> what to time; its arrays are waited for.
      rounds: after two that warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for count in range(rounds + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if count >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Ratio(NamedTuple):
    """Quotients of two candidates over the rounds: median, quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(record: Record, one: str, other: str) -> Ratio | None:
    """How many times as long as the other the one takes; None if either was not there."""
    seconds = record["seconds"]
    if one not in seconds or other not in seconds:
        return None
    quotients = np.array(seconds[one]) / np.array(seconds[other])
    return Ratio(*(float(np.quantile(quotients, q)) for q in (0.5, 0.25, 0.75)))


# Kernels ------------------------------------------------------------------------------------------


def make_batch(n: int, d: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    """Features after a ReLU, which have a mean as features have, and targets; float32."""
    rng = np.random.default_rng([n, d, o])
    features = np.maximum(rng.standard_normal((n, d), np.float32), 0)
    return features, rng.standard_normal((n, o), np.float32)


def floor(features: np.ndarray, targets: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The ridge head by BLAS and LAPACK alone: primal or dual by shape, bias by bordering."""
    n, d = features.shape
    potrf, potrs = scipy.linalg.get_lapack_funcs(("potrf", "potrs"), (features,))
    if n < d:
        matrix = features @ features.T
        matrix[np.diag_indices(n)] += beta
        matrix += 1.0  # the bias's column
        factor, _ = potrf(matrix, lower=1, overwrite_a=1)
        alpha, _ = potrs(factor, targets, lower=1)
        return features.T @ alpha, alpha.sum(axis=0)
    matrix = np.empty((d + 1, d + 1), np.float32)
    matrix[:d, :d] = features.T @ features
    matrix[d, :d] = features.sum(axis=0)
    matrix[d, d] = n
    matrix[np.diag_indices(d + 1)] += beta
    rhs = np.concatenate([features.T @ targets, targets.sum(axis=0)[None]])
    factor, _ = potrf(matrix, lower=1, overwrite_a=1)
    solution, _ = potrs(factor, rhs, lower=1)
    return solution[:d], solution[d]


def kernels(features: np.ndarray, targets: np.ndarray) -> dict[str, Callable[[], Any]]:
    """All that solve the same ridge problem, intercept included."""
    import lineax
    from sklearn.linear_model import Ridge

    on_device = jnp.asarray(features), jnp.asarray(targets)
    # As ours: GPUs multiply float32 in TF32 by default.
    dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    @jax.jit
    def by_lineax(features, targets):
        ones = jnp.ones((len(features), 1), features.dtype)
        features = jnp.concatenate([features, ones], axis=1)
        gram = dot(features.T, features) + BETA * jnp.eye(features.shape[1])
        tag = lineax.positive_semidefinite_tag
        operator = lineax.MatrixLinearOperator(gram, tag)
        return jax.vmap(
            lambda rhs: lineax.linear_solve(operator, rhs, lineax.Cholesky()).value,
            in_axes=1,
            out_axes=1,
        )(dot(features.T, targets))

    ours = partial(cfll.ridge_solve, beta=BETA)  # as users call it: outside of jit
    empty = jax.jit(lambda features, targets: cfll.LinearHead(targets[:1], targets[0]))
    found: dict[str, Callable[[], Any]] = {
        FLOOR: lambda: floor(features, targets, BETA),
        OURS: lambda: ours(*on_device),
        DISPATCH: lambda: empty(*on_device),
        "scikit-learn": lambda: Ridge(alpha=BETA).fit(features, targets).coef_,
        "lineax": lambda: by_lineax(*on_device),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        rows, answers = torch.from_numpy(features), torch.from_numpy(targets)

        def by_torch() -> Any:
            padded = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
            gram = padded.T @ padded + BETA * torch.eye(padded.shape[1])
            return torch.cholesky_solve(padded.T @ answers, torch.linalg.cholesky(gram))

        found["PyTorch"] = by_torch
    return found


def kernel_case(shape: tuple[int, int, int]) -> Record:
    """One row of the kernels' table."""
    features, targets = make_batch(*shape)
    with threadpool_limits(limits=1):
        return {"seconds": interleaved(kernels(features, targets))}


# Training steps -----------------------------------------------------------------------------------

SGD = Method("SGD", GRADIENT)
STEPS = (SGD, Method("SGD", PROXIMAL, EQUATION_17), Method("SGD", PROXIMAL, ALGORITHM_1))


class Step(NamedTuple):
    """A network and its batch."""

    model: Any
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def mlp_step(d: int, o: int, batch: int) -> Step:
    """3072-1024-1024-d with o outputs."""
    return Step(MLP(widths=(1024, 1024, d), num_outputs=o), (batch, 3072), (batch, o))


STEP_CASES = {
    "FNO, width 32, B 32": Step(FNO1d(), (32, 256, 1), (32, 256, 1)),
    "FNO, width 64, B 128": Step(FNO1d(width=64), (128, 256, 1), (128, 256, 1)),
    **{
        f"MLP, d {d}, o {o}, B {batch}": mlp_step(d, o, batch)
        for d, o, batch in (
            (512, 10, 32),
            (512, 10, 128),
            (512, 100, 1024),
            (512, 100, 4096),
            (1024, 1000, 1024),
        )
    },
    "ResNet-18, width 16, B 128": Step(ResNet18(width=16), (128, 32, 32, 3), (128, 10)),
}


class Compiled(NamedTuple):
    """A training step, ready to run.

    Attributes:
      run: () -> loss; keeps its own state.
      temp_bytes: XLA's own count of what the step needs besides its arguments and results.
      trace_seconds: to trace and lower, without compilation.
      compile_seconds: XLA's part.
    """

    run: Callable[[], Any]
    temp_bytes: int
    trace_seconds: float
    compile_seconds: float


def compiled(step: Step, method: Method) -> Compiled:
    """Compile a method's step on random data."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal(step.inputs, np.float32))
    batch = Batch(inputs, jnp.asarray(rng.standard_normal(step.targets, np.float32)))
    backbone = network(step.model, 0, inputs[:1])
    hyper = Hyper(np.float32(1e-4), np.float32(BETA), np.int32(10**6))
    state = methods.init(method, hyper, backbone.params, backbone.stats, 0)
    jitted = jax.jit(partial(methods.step, method, backbone.apply), donate_argnums=1)

    start = time.perf_counter()
    lowered = jitted.lower(hyper, state, batch, batch)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()

    def run() -> Any:
        nonlocal state
        state, loss = program(hyper, state, batch, batch)
        return loss

    memory = program.memory_analysis()
    assert memory is not None  # some platforms do not count
    return Compiled(run, memory.temp_size_in_bytes, traced - start, done - traced)


def step_case(step: Step) -> Record:
    """One row of the steps' table."""
    programs = {method.name: compiled(step, method) for method in STEPS}
    return {
        "seconds": interleaved({name: program.run for name, program in programs.items()}),
        "temp_bytes": {name: program.temp_bytes for name, program in programs.items()},
        "trace_seconds": {name: program.trace_seconds for name, program in programs.items()},
        "compile_seconds": {name: program.compile_seconds for name, program in programs.items()},
    }


def head_sizes(step: Step) -> tuple[int, int, int]:
    """n, d, o of a step's solve."""
    backbone = network(step.model, 0, np.zeros((1, *step.inputs[1:]), np.float32))
    d, o = backbone.params[methods.HEAD]["kernel"].shape
    return int(np.prod(step.targets[:-1])), d, o


# Growth -------------------------------------------------------------------------------------------

AXES: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "d": tuple((4096, d, 10) for d in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    "n": tuple((n, 512, 10) for n in (16, 64, 256, 1024, 4096, 16384, 65536)),
    "o": tuple((2048, 512, o) for o in (1, 10, 100, 1000)),
}
CG_TOLERANCES = (1e-2, 1e-4)
CHOLESKY = "Cholesky"


def growth_case(shape: tuple[int, int, int], rounds: int = ROUNDS) -> Record:
    """Direct and iterative solves of one shape, and how far apart their predictions are."""
    features, targets = map(jnp.asarray, make_batch(*shape))
    solvers: dict[str, Any] = {CHOLESKY: "auto"}
    solvers |= {f"cg, {tol:g}": cfll.CG(tolerance=tol) for tol in CG_TOLERANCES}
    anchor = cfll.LinearHead.zeros(shape[1], shape[2])
    solves = {
        name: jax.jit(partial(cfll.penalized_solve, penalty=BETA, solver=solver))
        for name, solver in solvers.items()
    }
    found = {name: run(features, targets, anchor) for name, run in solves.items()}
    exact = found[CHOLESKY][0](features)
    return {
        "seconds": interleaved(
            {name: partial(run, features, targets, anchor) for name, run in solves.items()}, rounds
        ),
        "iterations": {name: int(info.iterations) for name, (_, info) in found.items()},
        "difference": {
            name: float(jnp.linalg.norm(head(features) - exact) / jnp.linalg.norm(exact))
            for name, (head, _) in found.items()
        },
    }


# What fewer and rougher solves cost ---------------------------------------------------------------

SPARINGLY: Mapping[str, cfll.Rule] = {
    "every step": cfll.prox(BETA),
    "every 2nd": cfll.every(2, cfll.prox(BETA)),
    "every 4th": cfll.every(4, cfll.prox(BETA)),
    "every 8th": cfll.every(8, cfll.prox(BETA)),
    "cg, 0.1": cfll.prox(BETA, solver=cfll.CG(tolerance=0.1)),
    "cg, 0.001": cfll.prox(BETA, solver=cfll.CG(tolerance=1e-3)),
}


def sparing_case(name: str, num_steps: int = 600, width: int = 512, batch: int = 256) -> Record:
    """Train a network on a teacher's outputs; its test error at the end."""
    import optax

    rng = np.random.default_rng(0)
    teacher = [
        rng.standard_normal(s, np.float32) / np.sqrt(s[0]) for s in ((8, 64), (64, 64), (64, 4))
    ]

    def draw(count: int) -> Batch:
        x = rng.standard_normal((count, 8), np.float32)
        hidden = np.tanh(2 * np.tanh(2 * x @ teacher[0]) @ teacher[1])
        return Batch(x, (hidden @ teacher[2]).astype(np.float32))

    train, test = draw(num_steps // 4 * batch), draw(4096)
    model = MLP(widths=(width, width), num_outputs=4)
    backbone = network(model, 0, train.inputs[:1])
    rate = optax.cosine_decay_schedule(1e-3, num_steps)
    tx = cfll.closed_form(optax.adam(rate), SPARINGLY[name], methods.HEAD)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        def loss_fn(params):
            features, _ = backbone.apply(params, {}, batch.inputs, train=True)
            return methods.l2_loss(cfll.get_head(params, methods.HEAD)(features), batch.targets)

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            targets=batch.targets,
            feature_fn=lambda p: backbone.apply(p, {}, batch.inputs, train=True)[0],
        )
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.asarray, backbone.params)
    params = cfll.set_head(params, methods.HEAD, cfll.LinearHead.zeros(width, 4))
    opt_state = tx.init(params)
    seconds = []
    for count in range(num_steps):
        chosen = rng.integers(0, len(train.inputs), batch)
        start = time.perf_counter()
        params, opt_state = step(params, opt_state, Batch(*(part[chosen] for part in train)))
        jax.block_until_ready(params)
        if count >= 2:
            seconds.append(time.perf_counter() - start)
    features, _ = backbone.apply(params, {}, test.inputs, train=False)
    outputs = cfll.get_head(params, methods.HEAD)(features)
    error = float(jnp.mean(jnp.square(outputs - test.targets)) / np.var(test.targets))
    return {"seconds": {name: seconds}, "error": error}


# The experiment -----------------------------------------------------------------------------------


def cases() -> Iterator[tuple[Record, Callable[[], Record]]]:
    """Keys and what to run for them."""
    for shape in SHAPES:
        yield {"part": "kernel", "shape": list(shape)}, partial(kernel_case, shape)
    for name, step in STEP_CASES.items():
        yield {"part": "step", "name": name}, partial(step_case, step)
    for shape in dict.fromkeys(shape for shapes in AXES.values() for shape in shapes):
        yield {"part": "growth", "shape": list(shape)}, partial(growth_case, shape)
    for name in SPARINGLY:
        yield {"part": "sparingly", "name": name}, partial(sparing_case, name)


def summarize(records: Records, figures: Path, preset: str = "cpu") -> summary.Summary:
    """Tables, figures and claims from finished cases.

    Args:
      records: finished cases.
      figures: folder for the figures.
      preset: there is one only.
    """
    del preset
    found = [(key, record) for key, _ in cases() if (record := records.get(key)) is not None]
    parts = {
        part: [(key, record) for key, record in found if key["part"] == part]
        for part in ("kernel", "step", "growth", "sparingly")
    }
    tables, claims = [], []
    if parts["kernel"]:
        tables.append(kernel_table(parts["kernel"]))
        claims += kernel_claims(parts["kernel"])
    if parts["step"]:
        tables += [step_table(parts["step"]), cost_table(parts["step"])]
        claims += step_claims(parts["step"])
    drawn = []
    if parts["growth"]:
        drawn = [growth_figure(parts["growth"], figures / "speed_growth.png")]
        tables.append(growth_table(parts["growth"]))
    if parts["sparingly"]:
        tables.append(sparing_table(parts["sparingly"]))
    return summary.Summary(
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
        figures=drawn,
    )


Rows = list[tuple[Record, Record]]


def kernel_table(rows: Rows) -> summary.Table:
    """Shapes against floor and peers."""
    others = [p for p in PEERS if any(p in record["seconds"] for _, record in rows)]

    def cells(key: Record, record: Record) -> tuple[str, ...]:
        seconds = record["seconds"]
        quotients = [ratio(record, OURS, other) for other in (FLOOR, *others)]
        return (
            str(tuple(key["shape"])),
            f"{1e3 * np.median(seconds[FLOOR]):.2f}",
            *(str(q) if q else "" for q in quotients),
            f"{1e3 * np.median(seconds[DISPATCH]):.2f}",
        )

    return summary.Table(
        "Time of `ridge_solve` divided by that of each of the others (below one: ours is faster).",
        (
            "(n, d, o)",
            "floor, ms",
            *(f"to {other}" for other in (FLOOR, *others)),
            "empty call, ms",
        ),
        tuple(cells(*row) for row in rows),
    )


def kernel_claims(rows: Rows) -> list[summary.Claim]:
    """At most 1.3 times the floor, no slower than a peer."""

    def slow(other: str, limit: float) -> tuple[bool, str]:
        over = []
        for key, record in rows:
            quotient = ratio(record, OURS, other)
            if quotient is not None and quotient.median > limit:
                over.append(f"{tuple(key['shape'])}: {quotient}")
        return not over, "; ".join(over) or "at every shape"

    claims = []
    for other, limit in ((FLOOR, 1.3), *((peer, 1.0) for peer in PEERS)):
        if any(other in record["seconds"] for _, record in rows):
            sentence = (
                f"A solve takes at most {limit} times the {other}."
                if other == FLOOR
                else f"A solve is no slower than {other}."
            )
            claims.append(summary.Claim(sentence, *slow(other, limit)))
    return claims


def step_table(rows: Rows) -> summary.Table:
    """Closed-form steps against SGD on all parameters."""
    return summary.Table(
        "Time of a training step divided by that of SGD on all parameters of the same network.",
        ("", "SGD, ms", *(method.name for method in STEPS[1:])),
        tuple(
            (
                key["name"],
                f"{1e3 * np.median(record['seconds'][SGD.name]):.1f}",
                *(str(ratio(record, method.name, SGD.name)) for method in STEPS[1:]),
            )
            for key, record in rows
        ),
    )


def cost_table(rows: Rows) -> summary.Table:
    """Memory and compilation."""
    return summary.Table(
        "What a compiled step needs besides arguments and results (XLA's own count), and the "
        "seconds to trace and to compile it: SGD, then Eq. (17), then Algorithm 1. Budget: SGD "
        "plus 3 (d² + d o) floats plus one copy of the features.",
        ("", "MB", "budget, MB", "tracing, s", "compiling, s"),
        tuple(
            (
                key["name"],
                " / ".join(f"{record['temp_bytes'][m.name] / 1e6:.1f}" for m in STEPS),
                f"{memory_budget(key['name'], record) / 1e6:.1f}",
                " / ".join(f"{record['trace_seconds'][m.name]:.2f}" for m in STEPS),
                " / ".join(f"{record['compile_seconds'][m.name]:.1f}" for m in STEPS),
            )
            for key, record in rows
        ),
    )


def memory_budget(name: str, record: Record) -> float:
    """Bytes: the SGD step's, 3 (d^2 + d o) floats and one copy of the features."""
    n, d, o = head_sizes(STEP_CASES[name])
    return record["temp_bytes"][SGD.name] + 4 * (3 * (d * d + d * o) + n * d)


def step_claims(rows: Rows) -> list[summary.Claim]:
    """Limits for time, memory and tracing."""

    def claim(
        sentence: str, value_of: Callable[[Record, Record], float], limit: float
    ) -> summary.Claim:
        values = [(key["name"], value_of(key, record)) for key, record in rows]
        over = [f"{name}: {value:.2f}" for name, value in values if value > limit]
        return summary.Claim(sentence, not over, "; ".join(over) or "everywhere")

    def quotient(method: Method) -> Callable[[Record, Record], float]:
        def value(key: Record, record: Record) -> float:
            found = ratio(record, method.name, SGD.name)
            assert found is not None
            return found.median

        return value

    return [
        claim("A step in Eq. (17) order takes at most 1.15 SGD steps.", quotient(STEPS[1]), 1.15),
        claim("A step of Algorithm 1 takes at most 1.4 SGD steps.", quotient(STEPS[2]), 1.4),
        claim(
            "A closed-form step stays within its memory budget (value: share of it).",
            lambda key, record: (
                max(record["temp_bytes"][m.name] for m in STEPS[1:])
                / memory_budget(key["name"], record)
            ),
            1.0,
        ),
        claim(
            "Tracing takes at most one second longer than SGD's.",
            lambda key, record: (
                max(record["trace_seconds"][m.name] for m in STEPS[1:])
                - record["trace_seconds"][SGD.name]
            ),
            1.0,
        ),
    ]


def growth_table(rows: Rows) -> summary.Table:
    """Where conjugate gradients overtake Cholesky."""
    names = [f"cg, {tol:g}" for tol in CG_TOLERANCES]
    return summary.Table(
        "Conjugate gradients (with their tolerance) from an anchor of zeros: time divided by that "
        "of the direct solve, iterations, relative difference of the predictions on the batch.",
        ("(n, d, o)", "direct, ms", *names),
        tuple(
            (
                str(tuple(key["shape"])),
                f"{1e3 * np.median(record['seconds'][CHOLESKY]):.2f}",
                *(
                    f"{ratio(record, name, CHOLESKY)}, {record['iterations'][name]}, "
                    f"{record['difference'][name]:.0e}"
                    for name in names
                ),
            )
            for key, record in rows
        ),
    )


def growth_figure(rows: Rows, path: Path) -> Path:
    """Milliseconds along d, n and o."""
    by_shape = {tuple(key["shape"]): record for key, record in rows}
    panels: dict[str, dict[str, plots.Line]] = {}
    for axis, shapes in AXES.items():
        present = [shape for shape in shapes if shape in by_shape]
        if not present:
            continue
        position = {"n": 0, "d": 1, "o": 2}[axis]
        fixed = ", ".join(
            f"{name} = {present[0][i]}" for i, name in enumerate("ndo") if i != position
        )
        panels[f"{axis} grows, {fixed}"] = {
            name: plots.Line(
                [shape[position] for shape in present],
                np.array([[1e3 * np.median(by_shape[s]["seconds"][name]) for s in present]]),
            )
            for name in by_shape[present[0]]["seconds"]
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.panels_by_batch_size(
        panels,
        path=path,
        ylabel="time of a solve (ms)",
        xlabel="size",
        xscale="log",
        yscale="log",
        window=1,
    )
    return path


def sparing_table(rows: Rows) -> summary.Table:
    """What fewer and rougher solves cost and save."""
    return summary.Table(
        "Training with fewer or rougher solves: 600 steps of Adam with Algorithm 1, 512 features, "
        "batch 256, on a teacher network's outputs; one seed. Test error as a share of the "
        "targets' variance.",
        ("head solved", "ms per step", "test error"),
        tuple(
            (
                key["name"],
                f"{1e3 * np.median(record['seconds'][key['name']]):.1f}",
                f"{record['error']:.2e}",
            )
            for key, record in rows
        ),
    )


def speed(out: Path = Path("benchmarks/out/speed")) -> None:
    """Kernels against a floor, training steps against SGD, growth. Leave the machine alone.

    Args:
      out: folder of finished measurements and figures.
    """
    console = Console()
    records = Records(out / "speed.jsonl")
    wanted = list(cases())
    with SweepProgress(console, len(wanted)) as progress:
        for key, measure in wanted:
            label = " ".join(str(value) for value in key.values())
            note = "from disk"
            if records.get(key) is None:
                start = time.perf_counter()
                progress.start(label, 1)
                records.add(key, measure())
                note = f"{time.perf_counter() - start:.0f} s"
            progress.finish(f"{label:<36} {note}")
    summary.show(console, summarize(records, out))
    console.print(f"Measurements and figures are in {out}.")
