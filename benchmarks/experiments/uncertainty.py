"""uncertainty: do 90 % intervals hold 90 % of the targets, and what do they cost?

A small network with `cfll.prox`, then its last layer again from one pass over the training rows:
`bayesian_ridge` of sums of residuals, and `kalman` on the frozen backbone. Against them the
network's own head and an ensemble of five, both with the noise variance of their training
residuals, the ensemble with the variance between its members, too. Each as it is, and with its
variances times one factor per output that rows held out ask for. Nothing is tuned.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cfll
from benchmarks.core.comparison import Comparison, Config
from benchmarks.core.methods import EQUATION_17, PROXIMAL, Batch, Method
from benchmarks.core.problem import Data, Problem, network
from benchmarks.core.records import Record, Records
from benchmarks.core.runner import Runner, running
from benchmarks.core.timing import interleaved
from benchmarks.data.tables import Rows, TableName, load_table
from benchmarks.experiments import Experiment
from benchmarks.models.mlp import MLP
from benchmarks.reporting.comparisons import mean_and_interval
from benchmarks.reporting.intervals import is_below
from benchmarks.reporting.summary import Claim, Summary, Table, show

HEAD, POSTERIOR, KALMAN, ENSEMBLE = "head", "bayesian_ridge", "kalman", "ensemble"
RESCALED = ", rescaled"
WITHIN = 1.6448536  # standard deviations of a normal that hold 90 %


class Settings(NamedTuple):
    """What is trained and timed."""

    # Table -> passes over the training rows, about 5000 steps.
    epochs: tuple[tuple[TableName, int], ...] = (("california", 20), ("rf1", 60))
    batch_size: int = 256  # from here to `hidden`: of the network; Adam, cosine decay
    rate: float = 1e-3
    lam: float = 10.0
    hidden: int = 256
    num_features: int = 512  # d
    num_members: int = 5  # of the ensemble
    num_seeds: int = 3  # of split, initialization and shuffling
    timed: tuple[int, ...] = (512, 2048)  # numbers of features


SETTINGS = Settings()
Prediction = tuple[Any, Any]  # mean and variance, (n, o)


class Trained(NamedTuple):
    """A network after training."""

    features_of: Callable[[Any], jax.Array]  # inputs (n, columns) -> features (n, d)
    head: cfll.LinearHead  # of its last step
    noise: np.ndarray  # variance of its training residuals, (o,)


def train(settings: Settings, rows: Rows, epochs: int, seeds: Iterable[int]) -> list[Trained]:
    """Networks of these seeds, one after the other."""
    model = MLP((settings.hidden, settings.num_features), rows.targets.shape[1])
    data = Data(Batch(*rows), Batch(*rows))
    problem = Problem(
        settings={},
        epochs=lambda batch_size: epochs,
        load=lambda: data,
        network=partial(network, model),
        metric="MSE",
        start=lambda method: (settings.rate, settings.lam),
    )
    comparison = Comparison(problem, Runner(Records(Path("none/runs.jsonl"))))
    apply = problem.network(0, rows.inputs[:1]).apply  # seeds differ in their parameters only

    @jax.jit
    def features_of(params: Any, inputs: Any) -> jax.Array:
        return apply(params, {}, inputs, train=False)[0]

    found = []
    for seed in seeds:
        method = Method("Adam", PROXIMAL, EQUATION_17)
        config = Config(method, settings.batch_size, settings.rate, settings.lam, seed)
        state, *_ = comparison.train(config)
        head = cfll.get_state(state.opt_state).anchor
        noise = np.var(rows.targets - head(features_of(state.params, rows.inputs)), axis=0)
        found.append(Trained(partial(features_of, state.params), head, noise))
    return found


def predictors(settings: Settings, table: TableName, rows: Rows, seed: int) -> Any:
    """Every method as a function of inputs, (n, columns), to mean and variance, (n, o)."""
    seeds = range(100 * seed, 100 * seed + settings.num_members)
    members = train(settings, rows, dict(settings.epochs)[table], seeds)
    features_of, head, noise = members[0]

    def of_head(inputs: np.ndarray) -> Prediction:
        mean = np.asarray(head(features_of(inputs)))
        return mean, np.broadcast_to(noise, mean.shape)

    def of_ensemble(inputs: np.ndarray) -> Prediction:
        means = np.stack([member.head(member.features_of(inputs)) for member in members])
        noise = np.mean([member.noise for member in members], axis=0)
        return means.mean(axis=0), noise + means.var(axis=0)

    # The filter starts at the head of training: it is the mean of its prior.
    rule = cfll.kalman(beta=1.0)
    state = cfll.get_state(cfll.closed_form_head(rule).init({"head": head._asdict()}))
    sums = cfll.GramStats.zeros(settings.num_features, rows.targets.shape[1])
    solve = jax.jit(rule.solve)
    for start in range(0, len(rows.targets), settings.batch_size):
        inputs, targets = (part[start : start + settings.batch_size] for part in rows)
        features = features_of(inputs)
        sums = sums.add(features, jnp.asarray(targets) - head(features))
        solution = solve(features, targets, state)
        state = state._replace(anchor=solution.head, rule_state=solution.rule_state)
    posterior, _ = cfll.bayesian_ridge(sums, anchor=head)
    belief = state.rule_state.posterior(state.anchor)
    return {
        HEAD: of_head,
        POSTERIOR: lambda inputs: posterior.predict(features_of(inputs)),
        KALMAN: lambda inputs: belief.predict(features_of(inputs)),
        ENSEMBLE: of_ensemble,
    }


def scores_of(settings: Settings, table: TableName, data: Path, seed: int) -> Record:
    """The scores of every method on the test rows of one split, as it is and rescaled."""
    rows, test = load_table(data, table, seed)
    ninth = len(rows.targets) // 10
    held_out, rows = Rows(*(x[:ninth] for x in rows)), Rows(*(x[ninth:] for x in rows))
    found = {}
    for name, predict in predictors(settings, table, rows, seed).items():
        (mean, variance), (held_mean, held_variance) = map(predict, (test.inputs, held_out.inputs))
        factor = np.mean((held_out.targets - held_mean) ** 2 / held_variance, axis=0)
        found[name] = scores((mean, variance), test.targets)
        found[name + RESCALED] = scores((mean, variance * factor), test.targets)
    return found


def scores(prediction: Prediction, targets: np.ndarray) -> Record:
    """Squared error, coverage, also of the worst output, negative log likelihood; means."""
    mean, variance = (np.asarray(part, float) for part in prediction)
    squares = (targets - mean) ** 2
    covered = np.mean(squares < WITHIN**2 * variance, axis=0)
    likelihood = (np.log(2 * np.pi * variance) + squares / variance) / 2
    return {
        "mse": float(squares.mean()),
        "coverage": float(covered.mean()),
        "worst coverage": float(covered[np.argmax(np.abs(covered - 0.9))]),
        "nll": float(likelihood.mean()),
    }


def key_of(settings: Settings, table: TableName, seed: int) -> Record:
    """All that decides the scores of one split."""
    decides = settings._asdict() | {"epochs": dict(settings.epochs)[table], "table": table}
    return decides | {"seed": seed, "num_seeds": 0, "timed": ()}


def costs(d: int, samples: int = 128, outputs: int = 8) -> Record:
    """Milliseconds, and megabytes that XLA asks for beside arguments."""
    rng, rows = np.random.default_rng(0), max(4 * d, 8 * samples)
    features = jnp.asarray(np.maximum(rng.normal(size=(rows, d)), 0), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(rows, outputs)), jnp.float32)
    sums = cfll.GramStats.zeros(d, outputs).add(features, targets)

    def compiled(function: Callable, *arguments: Any) -> Any:
        return jax.jit(function).lower(*arguments).compile()

    def measured(program: Any, *arguments: Any) -> list[float]:
        memory = program.memory_analysis()
        size = memory.temp_size_in_bytes + memory.output_size_in_bytes
        seconds = interleaved({"": lambda: program(*arguments)}, rounds=5)[""]
        return [1e3 * min(seconds), size / 1e6]

    found = {
        "ridge": measured(compiled(lambda sums: sums.ridge(1.0), sums), sums),
        "bayesian_ridge": measured(compiled(cfll.bayesian_ridge, sums), sums),
    }
    starts = range(0, 8 * samples, samples)
    batches = [(features[k : k + samples], targets[k : k + samples]) for k in starts]
    for name, rule in (
        ("prox", cfll.prox(1.0)),
        ("kalman", cfll.kalman(1.0)),
        ("kalman, forgetting", cfll.kalman(1.0, forgetting=0.99)),
        ("kalman, process noise", cfll.kalman(1.0, process_noise=1e-4)),
    ):
        params = {"head": cfll.LinearHead.zeros(d, outputs)._asdict()}
        state = cfll.get_state(cfll.closed_form_head(rule).init(params))
        solve = compiled(rule.solve, *batches[0], state)
        for batch in batches:  # the first of them may need a QR
            solution = solve(*batch, state)
            state = state._replace(anchor=solution.head, rule_state=solution.rule_state)
        found[name] = measured(solve, *batches[0], state)
    return found


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Replay the experiment on its records; there are no figures and one preset only."""
    settings, rows, claims = SETTINGS, [], []
    for table, _ in settings.epochs:
        seeds = range(settings.num_seeds)
        runs = [run for seed in seeds if (run := records.get(key_of(settings, table, seed)))]
        if len(runs) < settings.num_seeds:
            continue
        names = tuple(runs[0])
        found = {
            (name, score): np.array([run[name][score] for run in runs])
            for name in names
            for score in runs[0][name]
        }
        digits = {"mse": ".4f", "coverage": ".3f", "worst coverage": ".3f", "nll": ".3f"}
        rows += [
            (table, name, *(mean_and_interval(found[name, s], form) for s, form in digits.items()))
            for name in names
        ]
        for end in ("", RESCALED):
            coverage, ours, theirs = (
                found[name + end, score]
                for name, score in ((POSTERIOR, "coverage"), (POSTERIOR, "nll"), (ENSEMBLE, "nll"))
            )
            claims += [
                Claim(
                    f"{table}: 90 % intervals of {POSTERIOR}{end} hold 88 to 92 % of test targets.",
                    bool(abs(coverage.mean() - 0.9) <= 0.02),
                    f"{coverage.mean():.3f}",
                ),
                Claim(
                    f"{table}: the negative log likelihood of {POSTERIOR}{end} is below that of an "
                    f"ensemble of {settings.num_members}{end}.",
                    is_below(ours, theirs),
                    f"{ours.mean():.3f} against {theirs.mean():.3f}",
                ),
            ]
    times = [(d, run) for d in settings.timed if (run := records.get({"timed": d}))]
    timed = tuple(
        (name, *(f"{number:.3g}" for _, run in times for number in run[name]))
        for name in (times[0][1] if times else ())
    )
    headings = tuple(text for d, _ in times for text in (f"d = {d}: ms", "MB"))
    return Summary(
        title="Predictions that know their error",
        command="python -m benchmarks uncertainty --data FOLDER",
        setup=(
            f"An MLP of {settings.hidden} and {settings.num_features} features, Adam with cosine "
            f"decay from {settings.rate:g}, batch {settings.batch_size}, `prox` with lam "
            f"{settings.lam:g}; rows are drawn at random, 72 % train, 8 % are held out, 20 % test. "
            "Nothing is tuned. california: one target; rf1: eight. Then the backbone is frozen, "
            "and the last layer made from one more pass over the training rows. Rescaled: by one "
            "factor per output, from the rows held out."
        ),
        tables=(
            Table(
                "On the test rows, targets of variance one, mean of "
                f"{settings.num_seeds} splits ± half the 95 % interval. Coverage: share of the "
                "targets within their 90 % interval, of all outputs and of the worst.",
                ("table", "method", "MSE", "coverage", "worst output", "NLL"),
                tuple(rows),
            ),
            Table(
                "Milliseconds of one call, 8 outputs (rules: of an update by 128 samples after the "
                "first few), and megabytes of its results and temporary arrays.",
                ("", *headings),
                timed,
            ),
        ),
        claims=claims,
        figures=(),
        reasons=REASONS if any(claim.holds is False for claim in claims) else "",
    )


REASONS = (
    "*Why rf1 is outside.* The network fits noise, so that the variance of its training residuals "
    "is too small. Rows held out set the variance right; that intervals then hold more than 90 % "
    "shows tails heavier than a normal's. *Why the ensemble is ahead in likelihood.* On rf1 its "
    "mean may be better, too; on california only its variance is, which follows the inputs "
    "further than that of a last layer with one noise variance. It trains five networks instead "
    "of one."
)


def uncertainty(data: Path | None = None, out: Path = Path("benchmarks/out/uncertainty")) -> None:
    """Coverage of 90 % intervals on california and rf1, and what they cost.

    About five minutes on two CPU cores. Without data, costs only.

    Args:
      data: folder of california.csv and rf1.csv.
      out: folder of finished runs.
    """
    settings, tables = SETTINGS, (SETTINGS.epochs if data is not None else ())
    num_runs = len(settings.timed) + len(tables) * settings.num_seeds
    with running(out, "uncertainty", num_runs) as runner:
        for d in settings.timed:
            runner.run({"timed": d}, partial(costs, d), f"timed at d = {d}")
        for table, _ in tables:
            assert data is not None
            for seed in range(settings.num_seeds):
                runner.run(
                    key_of(settings, table, seed),
                    partial(scores_of, settings, table, data, seed),
                    f"{table} split {seed}",
                    lambda record: f"coverage {record[POSTERIOR]['coverage']:.3f}",
                )
    show(summarize(Records(out / "uncertainty.jsonl"), out, "cpu"))


EXPERIMENTS = (Experiment(uncertainty, summarize, place=110),)
