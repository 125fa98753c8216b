"""quickstart: what does a closed-form head add to the optimizer you already use?

A Fourier neural operator learns Burgers' equation with SGD, Adam and Muon, each with a head trained
by gradients like any other layer, and with a head in closed form. The three functions `*_step` are
the whole difference, and an example of how to use the library: read them first.

Top of the benchmarks: one experiment, one command, everything below is shared.
"""

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import cfll
from benchmarks.core.optimizers import OPTIMIZERS, cosine_decay
from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Records
from benchmarks.core.sweep import Outcome, Plan, Row, Task, outcomes_of
from benchmarks.core.training import evaluator
from benchmarks.data import burgers
from benchmarks.models.fno import FNO1d
from benchmarks.reporting import plots, report

MODEL = FNO1d()

# Training steps -----------------------------------------------------------------------------------
#
# state = (params, opt_state); inputs (batch, points, 2); targets (batch, points, 1). Every grid
# point is a sample to the head. `tx` is the optimizer, for a closed-form head
# `cfll.closed_form(optimizer, rule, head="head")`, with the same rule as in the loss.

State = tuple[Any, Any]


def predict(params: Any, inputs: jax.Array) -> jax.Array:
    """What the network says, (batch, points, 1)."""
    outputs: Any = MODEL.apply({"params": params}, inputs)
    return outputs


def features_of(params: Any, inputs: jax.Array) -> jax.Array:
    """What the head sees, (batch, points, d)."""
    features: Any = MODEL.apply({"params": params}, inputs, method="features")
    return features


def squared_loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over samples, sum over outputs."""
    return jnp.mean(jnp.sum(jnp.square(predict(params, inputs) - targets), axis=-1))


def gradient_step(
    tx: optax.GradientTransformation, state: State, inputs: jax.Array, targets: jax.Array
) -> tuple[State, jax.Array]:
    """The baseline: the optimizer trains all layers."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(squared_loss)(params, inputs, targets)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def closed_form_step(
    rule: cfll.Rule,
    tx: optax.GradientTransformationExtraArgs,
    state: State,
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[State, jax.Array]:
    """Eq. (17), with ridge Eq. (9): solve the head in the forward pass, then move the backbone."""
    params, opt_state = state

    def loss_and_solution(params: Any) -> tuple[jax.Array, cfll.Solution]:
        return rule.loss(features_of(params, inputs), targets, cfll.get_state(opt_state))

    (loss, solution), grads = jax.value_and_grad(loss_and_solution, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
    return (optax.apply_updates(params, updates), opt_state), loss


def algorithm_1_step(
    tx: optax.GradientTransformationExtraArgs,
    state: State,
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[State, jax.Array]:
    """Algorithm 1: move the backbone with the old head, then solve on its new features."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(squared_loss)(params, inputs, targets)
    updates, opt_state = tx.update(
        grads, opt_state, params, targets=targets, feature_fn=lambda p: features_of(p, inputs)
    )
    return (optax.apply_updates(params, updates), opt_state), loss


# The experiment -----------------------------------------------------------------------------------

GRADIENT, PROXIMAL = "gradient", "proximal"
ALGORITHM_1, RIDGE = "proximal, Alg. 1", "ridge"

ROWS = (
    *(Row(optimizer, head) for optimizer in OPTIMIZERS for head in (GRADIENT, PROXIMAL)),
    Row("Adam", ALGORITHM_1),
    Row("Adam", RIDGE),
)

# Where the search for a row's best rate starts, for all heads alike.
RATES = {"SGD": (0.07, 0.14), "Adam": (0.0025, 0.005), "Muon": (0.01, 0.02)}

BETA = 1.0  # of ridge, not tuned


class Scaling(NamedTuple):
    """Mean and standard deviation of the training data, in units of u."""

    mean: float
    std: float


def scaling_of(values: np.ndarray) -> Scaling:
    """The scaling that standardizes these values."""
    return Scaling(float(values.mean()), float(values.std()))


def standardize(
    fields: burgers.Fields, initial: Scaling, final: Scaling
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs u(x, 0) and x, (samples, points, 2); targets u(x, 1), (samples, points, 1)."""
    state = (fields.initial - initial.mean) / initial.std
    x = (burgers.grid(state.shape[1]) - np.pi) / (np.pi / math.sqrt(3))  # uniform: variance 1
    inputs = np.stack([state, np.broadcast_to(x, state.shape)], axis=-1)
    targets = (fields.final - final.mean) / final.std
    return inputs.astype(np.float32), targets[..., None].astype(np.float32)


def transformation(
    row: Row, rate: jax.typing.ArrayLike, num_steps: jax.typing.ArrayLike, lam: float
) -> Any:
    """The optimizer of a row: on its own, or with a rule for the head."""
    optimizer = OPTIMIZERS[row.optimizer](cosine_decay(rate, num_steps))
    if row.head == GRADIENT:
        return optimizer
    return cfll.closed_form(optimizer, rule_of(row, lam), head="head")


def rule_of(row: Row, lam: float) -> cfll.Rule:
    """How a row finds its closed-form head."""
    return cfll.ridge(BETA) if row.head == RIDGE else cfll.prox(lam)


def jitted_step(row: Row, lam: float) -> Any:
    """(rate, num_steps, state, inputs, targets) -> (state, loss), compiled once for all runs."""
    closed_form = partial(closed_form_step, rule_of(row, lam))
    steps: Mapping[str, Any] = {
        GRADIENT: gradient_step,
        PROXIMAL: closed_form,
        ALGORITHM_1: algorithm_1_step,
        RIDGE: closed_form,
    }

    @partial(jax.jit, donate_argnames="state")
    def step(rate, num_steps, state, inputs, targets):
        # Optax transformations are pairs of pure functions: made here, they may use a traced rate.
        tx = transformation(row, rate, num_steps, lam)
        return steps[row.head](tx, state, inputs, targets)

    return step


def make_task(splits: burgers.Splits, lam: float) -> Task:
    """What the rows learn. Errors are in units of u squared; see `Task` for the rest."""
    scalings = scaling_of(splits.train.initial), scaling_of(splits.train.final)
    variance = scalings[1].std ** 2
    standardized_error = evaluator(predict)
    first_inputs = jnp.zeros((1, burgers.COARSE_POINTS, 2))
    return Task(
        train=standardize(splits.train, *scalings),
        validation=standardize(splits.validation, *scalings),
        test=standardize(splits.test, *scalings),
        init=lambda seed: MODEL.init(jax.random.key(seed), first_inputs)["params"],
        transformation=partial(transformation, lam=lam),
        step=partial(jitted_step, lam=lam),
        error=lambda params, *batch: variance * standardized_error(params, *batch),
        rates=RATES,
        settings={
            "lam": lam,
            "beta": BETA,
            "data": burgers.DEFAULTS._asdict(),
            "model": repr(MODEL),
            "cfll": cfll.__version__,
            "jax": jax.__version__,
        },
    )


def draw(plan: Plan, splits: burgers.Splits, outcomes: list[Outcome]) -> None:
    """Both figures."""
    panels: dict[str, dict[str, tuple[list[int], np.ndarray]]] = {name: {} for name in OPTIMIZERS}
    for outcome in outcomes:
        curves = panels[outcome.row.optimizer]
        curves[outcome.row.head] = (outcome.runs.steps, outcome.runs.errors)
        if outcome.row.head == PROXIMAL and outcome.half:
            curves[f"{PROXIMAL}, half the steps"] = (outcome.half.steps, outcome.half.errors)
    plots.learning_curves(panels, path=plan.out / "curves.png", baseline=GRADIENT)

    # An ordinary sample: that of median steepness, chosen by the data and not by a model's error.
    steepness = np.abs(np.diff(splits.test.final, axis=1)).max(axis=1)
    sample = int(np.argsort(steepness)[len(steepness) // 2])
    inputs = jnp.asarray(plan.task.test[0][[sample]])
    final, optimizer = scaling_of(splits.train.final), list(OPTIMIZERS)[-1]

    def prediction(outcome: Outcome) -> np.ndarray:
        params = plan.params(outcome.row, outcome.rate, plan.seeds[0])
        return final.mean + final.std * np.asarray(predict(params, inputs))[0, :, 0]

    plots.prediction(
        burgers.grid(burgers.FINE_POINTS),
        initial=splits.test.initial[sample],
        truth=splits.test.final[sample],
        predictions={
            f"{optimizer}, {outcome.row.head} head": prediction(outcome)
            for outcome in outcomes
            if outcome.row in (Row(optimizer, GRADIENT), Row(optimizer, PROXIMAL))
        },
        path=plan.out / "prediction.png",
        title="Burgers' equation on 8192 points: the test sample of median steepness",
    )


def quickstart(
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    repeats: int = 1,
    lam: float = 10.0,
    out: Path = Path("benchmarks/out/quickstart"),
) -> None:
    """Train an operator network with SGD, Adam and Muon, with and without a closed-form head.

    Generates Burgers data, finds the best learning rate of every row on validation data and prints
    a table: test error, steps to the gradient head's error, time per step. Under five minutes on
    two CPU cores. Stop it when you like; the same command goes on where it stopped.

    Args:
      epochs: passes over the 1448 training samples, the same for every row.
      batch_size: samples per step; the head is solved on batch size x 256 grid points.
      seed: of initialization and shuffling.
      repeats: number of seeds, counted from the first; results are means over them.
      lam: the proximal coefficient of the closed-form heads, the same for all and not tuned.
      out: folder of results, figures, finished runs and generated data.
    """
    if min(epochs, repeats) < 1 or not 1 <= batch_size <= 1448 or lam <= 0:
        raise SystemExit("Needed: --epochs and --repeats from 1, --batch-size 1 to 1448, --lam > 0")
    start = time.perf_counter()
    console = Console()
    splits = burgers.load_burgers(out)
    seeds = tuple(range(seed, seed + repeats))
    records = Records(out / "runs.jsonl")
    plan = Plan(make_task(splits, lam), epochs, batch_size, seeds, out, records)
    with SweepProgress(console, num_runs=3 * len(ROWS) * repeats) as progress:
        outcomes = outcomes_of(plan, ROWS, baseline=GRADIENT, progress=progress)
    # Rows of one optimizer next to each other, in the order of OPTIMIZERS.
    outcomes.sort(key=lambda outcome: list(OPTIMIZERS).index(outcome.row.optimizer))

    caption = (
        f"Burgers' equation, {epochs} epochs, batch {batch_size}, lam {lam:g}, beta {BETA:g}, "
        f"{'mean of seeds' if repeats > 1 else 'seed'} {', '.join(map(str, seeds))}. All heads but "
        "'gradient' are in closed form. Test MSE on 400 samples and 8192 points, in units of u^2 "
        f"(variance {splits.train.final.var():.2f})."
    )
    rows = report.summarize(outcomes, baseline=GRADIENT)
    report.write(out, rows, caption, {**plan.task.settings, "epochs": epochs, "seeds": seeds})
    draw(plan, splits, outcomes)
    report.show(console, rows, caption)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s. This table, its numbers and two figures are in {out}.")
