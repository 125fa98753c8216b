"""landscape: the loss of a network with two parameters (Figure 1), and two ways down.

    f(x) = W ReLU(theta x),   L(W, theta) = sum_i (y_i - f(x_i))^2 + beta W^2,   three samples

Gradient descent walks on the surface; with the head in closed form it walks on the curve W*(theta).

Everything is dimensionless.
"""

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import cfll
from benchmarks.core.records import Record, Records
from benchmarks.core.runner import running
from benchmarks.experiments import Experiment
from benchmarks.reporting import plots
from benchmarks.reporting.summary import Claim, Summary, Table, show

Preset = Literal["cpu", "paper"]


class Settings(NamedTuple):
    """Everything that determines the numbers; it is the key of the record."""

    seed: int = 10  # of the samples, x and y standard normal
    num_samples: int = 3  # as in the paper
    beta: float = 0.05  # the ridge penalty
    start: tuple[float, float] = (0.3, 2.0)  # (theta, W), the same for both
    rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # learning rates tried for both
    drawn_rate: float = 0.04  # of these, the one of the figure
    num_steps: int = 1000  # gradient steps of every run
    # "reached" means a loss within this share of the start's distance to the infimum of the surface
    # on the side of the start.
    gap: float = 0.05
    # Further problems, with samples and start drawn at random, that only count.
    num_draws: int = 500


# The same for both: the experiment takes seconds.
PRESETS: dict[str, Settings] = {"cpu": Settings(), "paper": Settings()}

JOINT, CLOSED_FORM = "gradient head", "closed form"


class Samples(NamedTuple):
    """The training data."""

    x: jax.Array  # inputs, shape (n,)
    y: jax.Array  # targets, shape (n,)


class Path2d(NamedTuple):
    """A run of gradient descent."""

    theta: jax.Array  # the backbone's parameter before every step and after the last, (steps + 1,)
    head: jax.Array  # W, likewise
    loss: jax.Array  # L(W, theta), likewise


def features(theta: jax.Array, samples: Samples) -> jax.Array:
    """ReLU(theta x), shape (n, 1): d = 1."""
    return jax.nn.relu(theta * samples.x)[:, None]


def loss(theta: jax.Array, head: jax.Array, samples: Samples, beta: float) -> jax.Array:
    """Eq. (1), a sum over samples."""
    residual = samples.y - head * features(theta, samples)[:, 0]
    return jnp.sum(jnp.square(residual)) + beta * jnp.square(head)


def best_head(theta: jax.Array, samples: Samples, beta: float) -> jax.Array:
    """W*(theta), Eq. (2), a scalar."""
    phi = features(theta, samples)
    head = cfll.ridge_solve(phi, samples.y[:, None], beta, use_bias=False, solver="primal")
    return head.kernel[0, 0]


def loss_on_curve(theta: jax.Array, samples: Samples, beta: float) -> tuple[jax.Array, jax.Array]:
    """L*(theta), Eq. (5), as a sum over samples, and W*(theta)."""
    phi = features(theta, samples)
    value, head = cfll.ridge_loss(phi, samples.y[:, None], beta, use_bias=False, solver="primal")
    return len(samples.y) * value, head.kernel[0, 0]


def descend_jointly(
    rate: jax.Array, start: jax.Array, samples: Samples, beta: float, num_steps: int
) -> Path2d:
    """Gradient descent on both parameters, Eq. (4) with one rate, from (theta, W)."""

    def step(at, _):
        value, slope = jax.value_and_grad(lambda at: loss(at[0], at[1], samples, beta))(at)
        return at - rate * slope, Path2d(at[0], at[1], value)

    return jax.lax.scan(step, start, length=num_steps + 1)[1]


def descend_on_curve(
    rate: jax.Array, start: jax.Array, samples: Samples, beta: float, num_steps: int
) -> Path2d:
    """Gradient descent on theta with W = W*(theta), Eq. (9); ignores the W of the start."""

    def step(theta, _):
        (value, head), slope = jax.value_and_grad(loss_on_curve, has_aux=True)(theta, samples, beta)
        return theta - rate * slope, Path2d(theta, head, value)

    return jax.lax.scan(step, start[0], length=num_steps + 1)[1]


DESCENTS = {JOINT: descend_jointly, CLOSED_FORM: descend_on_curve}


def infimum(samples: Samples, side: jax.Array) -> jax.Array:
    """What the loss tends to on one side as |theta| grows and the penalty of W vanishes."""
    phi = features(jnp.sign(side), samples)[:, 0]
    power = jnp.sum(jnp.square(phi))
    fitted = jnp.square(phi @ samples.y) / jnp.where(power > 0, power, 1)
    return jnp.sum(jnp.square(samples.y)) - fitted


def first_below(losses: jax.Array, level: jax.Array) -> jax.Array:
    """Steps until the loss is at or below the level; the number of entries if it never is."""
    below = losses <= level
    return jnp.where(jnp.any(below), jnp.argmax(below), len(losses))


class Descents(NamedTuple):
    """Both descents from one start, at every rate."""

    start_loss: jax.Array  # at (theta, W)
    infimum: jax.Array  # of the surface on this side of theta = 0
    level: jax.Array  # the loss that counts as reached
    # Method -> gradient steps to the level, one per rate; above `num_steps`: not reached.
    steps: dict[str, jax.Array]
    paths: dict[str, Path2d]  # method -> what happened, one per rate


@partial(jax.jit, static_argnames="settings")
def descend(start: jax.Array, samples: Samples, settings: Settings) -> Descents:
    """Run both at every rate."""
    top = loss(start[0], start[1], samples, settings.beta)
    bottom = infimum(samples, start[0])
    level = bottom + settings.gap * (top - bottom)
    rates = jnp.asarray(settings.rates)
    arguments = start, samples, settings.beta, settings.num_steps
    paths = {
        name: jax.vmap(lambda rate, method=method: method(rate, *arguments))(rates)
        for name, method in DESCENTS.items()
    }
    first = jax.vmap(first_below, (0, None))
    steps = {name: first(path.loss, level) for name, path in paths.items()}
    return Descents(top, bottom, level, steps, paths)


def random_problem(key: jax.Array, settings: Settings) -> tuple[jax.Array, Samples]:
    """A start and samples, all standard normal."""
    key_start, key_samples = jax.random.split(key)
    samples = Samples(*jax.random.normal(key_samples, (2, settings.num_samples)))
    return jax.random.normal(key_start, (2,)), samples


def run(settings: Settings) -> Record:
    """The drawn problem at every rate and the random ones, as plain numbers, in float64.

    Per method and rate the steps to the level that counts as reached, `None` if not; for the random
    problems, per rate and at the best rate of each, how often which of the two was first.
    """
    with jax.enable_x64(True):
        key = jax.random.key(settings.seed)
        samples = Samples(*jax.random.normal(key, (2, settings.num_samples)))
        one = descend(jnp.asarray(settings.start), samples, settings)
        keys = jax.random.split(key, settings.num_draws)
        starts, problems = jax.vmap(partial(random_problem, settings=settings))(keys)
        many = jax.vmap(lambda start, s: descend(start, s, settings).steps)(starts, problems)
    # NumPy from here: outside of the context above JAX would make float32 of it.
    one, many = jax.tree.map(np.asarray, (one, many))
    drawn = settings.rates.index(settings.drawn_rate)
    steps = {
        name: [int(n) if n <= settings.num_steps else None for n in counts]
        for name, counts in one.steps.items()
    }
    # Steps of the best rate per problem are the last column.
    joint, closed = (
        np.concatenate([many[name], many[name].min(axis=1, keepdims=True)], axis=1)
        for name in (JOINT, CLOSED_FORM)
    )
    neither = np.minimum(joint, closed) > settings.num_steps
    return {
        "x": samples.x.tolist(),
        "y": samples.y.tolist(),
        "start_loss": float(one.start_loss),
        "infimum": float(one.infimum),
        "level": float(one.level),
        "steps": steps,
        "paths": {
            name: {field: np.asarray(row[drawn]).tolist() for field, row in path._asdict().items()}
            for name, path in one.paths.items()
        },
        "random": {
            "closed form first": (closed < joint).sum(axis=0).tolist(),
            "gradient head first": (joint < closed).sum(axis=0).tolist(),
            "neither arrives": neither.sum(axis=0).tolist(),
        },
    }


def draw(settings: Settings, result: Record, path: Path) -> None:
    """The surface with the curve and both paths, and the losses against steps."""
    samples = Samples(jnp.asarray(result["x"]), jnp.asarray(result["y"]))
    theta, head = np.linspace(-2.5, 2.5, 301), np.linspace(-2.0, 2.5, 301)
    over_theta = jax.vmap(lambda t, w: loss(t, w, samples, settings.beta), (0, None))
    surface = jax.vmap(over_theta, (None, 0))(jnp.asarray(theta), jnp.asarray(head))
    curve = jax.vmap(lambda t: best_head(t, samples, settings.beta))(jnp.asarray(theta))
    drawn = settings.rates.index(settings.drawn_rate)
    shown_steps = [result["steps"][name][drawn] for name in DESCENTS]
    styles = {
        JOINT: {"color": "#D55E00", "linestyle": "--", "marker": "o", "markersize": 4},
        CLOSED_FORM: {"color": "black", "linestyle": "-", "marker": "s", "markersize": 4},
    }
    with plots.subplots(path, 1, 2, figsize=(10.5, 4.2), width_ratios=(3, 2)) as (left, right):
        levels = np.geomspace(float(surface.min()), 40, 16)
        filled = left.contourf(theta, head, surface, levels, cmap="Greys", extend="max", alpha=0.75)
        filled.set_norm(mpl.colors.LogNorm(levels[0], levels[-1] * 4))
        bar = left.figure.colorbar(filled, ax=left, label="loss L(W, θ), sum over samples")
        bar.set_ticks([1, 2, 5, 10, 20, 40], labels=["1", "2", "5", "10", "20", "40"])
        bar.minorticks_off()
        left.plot(theta, curve, color="#56B4E9", linewidth=6, alpha=0.9, label="W*(θ)")
        for name, style in styles.items():
            line = result["paths"][name]
            thetas, heads = [*line["theta"]], [*line["head"]]
            if name == CLOSED_FORM:  # the first solve is part of its way
                thetas, heads = [settings.start[0], *thetas], [settings.start[1], *heads]
            left.plot(thetas, heads, label=name, markevery=25, **style)
            steps = slice(0, 1 + 2 * (max(filter(None, shown_steps), default=100)))
            excess = np.asarray(line["loss"][steps]) - result["infimum"]
            right.plot(excess, label=name, **style | {"marker": ""})
        left.plot(*settings.start, "*", color="black", markersize=13, label="start")
        left.set(xlabel="backbone parameter θ", ylabel="head W", title="f(x) = W ReLU(θ x)")
        left.set(xlim=(theta[0], theta[-1]), ylim=(head[0], head[-1]))
        left.grid(False)
        left.legend(loc="lower left", frameon=True)
        right.axhline(result["level"] - result["infimum"], color="0.5", lw=0.8, label="reached")
        right.set(xlabel="gradient steps", ylabel="loss above its infimum", yscale="log")
        right.set_title(f"rate {settings.drawn_rate:g} for both")
        right.legend()


def key_of(preset: str) -> Record:
    """What the record is filed under."""
    return {"experiment": "landscape", "settings": PRESETS[preset]._asdict()}


def summarize(records: Records, figures: Path, preset: str) -> Summary:
    """Draw the figure and say what the numbers say."""
    settings, result = PRESETS[preset], records.get(key_of(preset))
    paths = []
    if result is not None:
        paths = [figures / "landscape.png"]
        draw(settings, result, paths[0])
    return Summary(
        title="The loss of a two-parameter network (Fig. 1)",
        command=f"python -m benchmarks landscape --preset {preset}",
        setup=(
            f"f(x) = W ReLU(θ x), {settings.num_samples} samples with x and y from N(0, 1) (seed "
            f"{settings.seed}), β = {settings.beta:g}, loss as in Eq. (1). Both descents start at "
            f"θ = {settings.start[0]:g}; the gradient head at W = {settings.start[1]:g}. Light is "
            "low. The paper gives no numbers; samples, β and start are ours, picked from some "
            "twenty for a legible picture (in a few the gradient head was ahead). The random "
            f"problems were not picked: {settings.num_draws}, samples and start from N(0, 1)."
        ),
        tables=[] if result is None else [table_of(settings, result)],
        claims=claims_of(settings, result),
        figures=paths,
    )


def table_of(settings: Settings, result: Record) -> Table:
    """Steps at every rate."""

    def cell(steps: int | None) -> str:
        return "not reached" if steps is None else str(steps)

    steps = result["steps"]
    rows = zip(settings.rates, steps[JOINT], steps[CLOSED_FORM], strict=True)
    return Table(
        caption=f"Gradient steps until the loss is at most {result['level']:.3f} (start "
        f"{result['start_loss']:.3f}, infimum {result['infimum']:.3f}; {settings.gap:.0%} of "
        f"the way left), of {settings.num_steps}.",
        headings=("learning rate", JOINT, CLOSED_FORM),
        rows=tuple((f"{rate:g}", cell(joint), cell(closed)) for rate, joint, closed in rows),
    )


def claims_of(settings: Settings, result: Record | None) -> list[Claim]:
    """What Figure 1 suggests: the walk along the curve is the shorter one."""
    sentences = (
        "Along the curve W*(θ) descent takes fewer steps than in two dimensions, from the start of "
        "the figure, each at its best rate (Fig. 1).",
        "From random starts on random samples it is ahead more often than behind, at every rate "
        "and each at its best rate.",
    )
    if result is None:
        return [Claim(sentence, None, "not run") for sentence in sentences]

    def best(name: str) -> float:
        return min((n for n in result["steps"][name] if n is not None), default=np.inf)

    first, second = result["random"]["closed form first"], result["random"]["gradient head first"]
    shares = ", ".join(
        f"{a} : {b} at {rate:g}"
        for rate, a, b in zip(settings.rates, first[:-1], second[:-1], strict=True)
    )
    return [
        Claim(
            sentences[0],
            best(CLOSED_FORM) < best(JOINT),
            f"{best(JOINT):g} steps ({JOINT}) and {best(CLOSED_FORM):g} steps ({CLOSED_FORM})",
        ),
        Claim(
            sentences[1],
            all(a > b for a, b in zip(first, second, strict=True)),
            f"of {settings.num_draws} problems, ahead : behind, {shares}; {first[-1]} : "
            f"{second[-1]} at the best rate of each (the rest: equal, or neither arrives in "
            f"{settings.num_steps} steps)",
        ),
    ]


def landscape(preset: Preset = "cpu", out: Path = Path("benchmarks/out/landscape")) -> None:
    """Draw the loss of a two-parameter network, and descend it with and without closed form.

    Seconds on a CPU.

    Args:
      preset: both are the same here.
      out: folder of the numbers and the figure.
    """
    with running(out, "landscape", 1) as runner:
        runner.run(key_of(preset), partial(run, PRESETS[preset]), "both descents")
    show(summarize(Records(out / "landscape.jsonl"), out, preset))


EXPERIMENTS = (Experiment(landscape, summarize, place=10),)
