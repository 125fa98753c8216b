r"""Offline policy evaluation by instrumental variables and by fitted Q evaluation: one run of each.

The value of a pair of state and action under a fixed policy solves :math:`E[r + \gamma Q(s', a') -
Q(s, a) \mid s, a] = 0` (Chen et al., JMLR 23:302): r is the outcome, (s, a) the instrument, (s, a,
s', a') the treatment, with features :math:`\psi(s, a) - \gamma \psi(s', a')` of one backbone. The
head has no intercept, :math:`\psi` a constant feature. Regression without the instrument would be
biased: next state and residual share their noise. `cfll.iv` does it as it is, by a backbone whose
`apply` makes the difference; where the episode has ended, the difference is :math:`\psi(s, a)`, so
`iv.predict` at pairs that end gives Q.

Between the data and `experiments/ope.py`, which tunes and reports.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.core.optimizers import cosine_decay
from benchmarks.core.problem import network
from benchmarks.data.ope import (
    Starts,
    Transitions,
    continuations,
    make_starts,
    make_transitions,
)
from benchmarks.models.mlp import MLP
from cfll import LinearHead, iv, ridge_solve

PROXIMAL, ORIGINAL, FQE = "DFIV proximal, Eq. (17)", "DFIV", "fitted Q evaluation"
REFITTED, CURRENT = "refitted", "current"  # heads; those of FQE are current
KNOWN = "stage 1 known"  # heads that no experimenter has; see `known_head`
WIDTH = 2.0  # of the kernel: about the median distance of two pairs, which are scaled


class Size(NamedTuple):
    """What all runs have in common.

    Attributes:
      num_train: transitions; both stages draw their batches from all of them.
      num_held_out: transitions of other episodes, to select by.
      num_starts: first states that the value is averaged over.
      num_known: of the training transitions, those of which all continuations are told.
      rounds, stage1_steps, batch_size: of DFIV; FQE takes twice as many updates as both stages.
      widths: of both networks.
      lam12: of stage 2.
      refit_beta: per transition, on all of them.
    """

    num_train: int = 100_000
    num_held_out: int = 10_000
    num_starts: int = 1000
    num_known: int = 10_000
    rounds: int = 300
    stage1_steps: int = 10
    batch_size: int = 256
    widths: tuple[int, ...] = (64, 64)
    lam12: float = 1.0
    refit_beta: float = 0.01


class Change(NamedTuple):
    """The treatment: pairs (s, a) and (s', a'), and whether the episode goes on, (n, 1)."""

    now: Any
    later: Any
    continues: Any


Outcome = dict[str, Any]


class Problem(NamedTuple):
    """What differs between seeds: data, and the initial parameters of psi and of phi."""

    continuations: tuple[Any, Any]  # of the first training transitions; see `data/ope.py`
    train: Transitions
    held_out: Transitions
    starts: Starts
    psi: Any
    phi: Any


def make_problem(size: Size, environment: str, seed: int) -> Problem:
    """Data and initial parameters of one seed."""
    train = make_transitions(environment, size.num_train, 2 * seed)
    held_out = make_transitions(environment, size.num_held_out, 2 * seed + 1)
    starts = make_starts(environment, size.num_starts, 0)
    psi, phi = (network(MLP(size.widths), 2 * seed + k, train.now[:1]).params for k in (0, 1))
    told = continuations(environment, train.now[: size.num_known])
    return jax.tree.map(jnp.asarray, Problem(told, train, held_out, starts, psi, phi))


def run_of(method: str) -> Callable[..., Outcome]:
    """The run of a method: (size, discount, rate, second, problem, key) -> outcome.

    `second` is lam1 = lam2, beta1 = beta2, or the period of the target network's copies. An outcome
    has, for each kind of heads, the policy's value and the kernel loss.
    """
    return run_fqe if method == FQE else partial(run_dfiv, method)


def networks_of(size: Size, discount: float, problem: Problem) -> iv.Networks:
    """Psi with its difference, and phi, both with a constant feature; psi is in units of Q."""
    apply = network(MLP(size.widths), 0, np.zeros((1, problem.train.now.shape[1]))).apply

    def features(params: Any, pairs: Any) -> jax.Array:
        found, _ = apply(params, {}, pairs, train=True)
        return jnp.concatenate([found, jnp.ones((len(found), 1))], axis=1)

    def difference(params: Any, stats: Any, inputs: Change, *, train: bool) -> Any:
        now, later = (features(params, pairs) for pairs in inputs[:2])
        return (now - discount * inputs.continues * later) / (1 - discount), stats

    def instrument(params: Any, stats: Any, inputs: Any, *, train: bool) -> Any:
        return features(params, inputs), stats

    return iv.Networks(iv.Backbone(difference, problem.psi), iv.Backbone(instrument, problem.phi))


def ended(pairs: jax.Array) -> Change:
    """Pairs after which nothing comes: their difference is psi itself."""
    return Change(pairs, pairs, jnp.zeros((len(pairs), 1)))


def run_dfiv(
    name: str, size: Size, discount: float, rate: Any, second: Any, problem: Problem, key: Any
) -> Outcome:
    """Train both stages; value and kernel loss with all kinds of heads."""
    networks, train = networks_of(size, discount, problem), problem.train
    data = iv.IVBatch(
        instrument=train.now,
        treatment=Change(train.now, train.later, train.continues),
        outcome=train.reward,
    )
    options: dict[str, Any] = {
        "treatment_optimizer": optax.adam(cosine_decay(rate, size.rounds)),
        "instrument_optimizer": optax.adam(cosine_decay(rate, size.rounds * size.stage1_steps)),
        "stage1_steps": size.stage1_steps,
        "use_bias": False,
    }
    if name == PROXIMAL:
        method = iv.proximal(networks, **options, lam1=second, lam2=second, lam12=size.lam12)
    else:
        method = iv.original(networks, **options, beta1=second, beta2=second)

    def round_(state: Any, key: Any) -> Any:
        rows = jax.random.randint(key, (2, size.batch_size), 0, len(train.reward))
        state, losses = method.round(
            state, *(jax.tree.map(lambda a, r=r: a[r], data) for r in rows)
        )
        return state, losses[1]

    state = method.init(jax.tree.map(lambda a: a[:2], data))
    state, _ = jax.lax.scan(round_, state, jax.random.split(key, size.rounds))
    refitted = iv.refit(networks, state, [data], [data], size.refit_beta * len(train.reward))

    identity = LinearHead(jnp.eye(len(state.stage2.anchor.kernel)), None)

    def features(pairs: Any) -> jax.Array:
        return iv.predict(networks, state, ended(pairs), stage2=identity)

    known = known_head(features, size, discount, problem)
    heads = {REFITTED: refitted.stage2, CURRENT: state.stage2.anchor, KNOWN: known}

    def value(pairs: Any) -> jax.Array:
        psi = features(pairs)
        return jnp.concatenate([head(psi) for head in heads.values()], axis=1)

    judged = dict(zip(heads, judge(value, discount, problem), strict=True))
    skipped = state.stage1.info.skipped + state.stage2.info.skipped
    return judged | {"skipped_heads": skipped}


def run_fqe(
    size: Size, discount: float, rate: Any, second: Any, problem: Problem, key: Any
) -> Outcome:
    """Regress r + gamma Q(s', a') of a target network on (s, a); value and kernel loss."""
    psi = networks_of(size, discount, problem).treatment
    num_steps = 2 * size.rounds * (size.stage1_steps + 1)
    tx = optax.adam(cosine_decay(rate, num_steps))

    def features(params: Any, pairs: Any) -> jax.Array:
        return psi.apply(params["psi"], None, ended(pairs), train=True)[0]

    def value(params: Any, pairs: Any) -> jax.Array:
        return features(params, pairs) @ params["head"]

    def step(carry: Any, key: Any) -> Any:
        params, target, opt_state, count = carry
        rows = jax.random.randint(key, (size.batch_size,), 0, len(problem.train.reward))
        batch = jax.tree.map(lambda a: a[rows], problem.train)
        later = discount * batch.continues * value(target, batch.later)
        grads = jax.grad(
            lambda params: jnp.mean((batch.reward + later - value(params, batch.now)) ** 2)
        )(params)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        copied = (count + 1) % second == 0
        target = jax.tree.map(lambda new, old: jnp.where(copied, new, old), params, target)
        return (params, target, opt_state, count + 1), None

    params = {"psi": problem.psi, "head": jnp.zeros((size.widths[-1] + 1, 1))}
    carry: Any = (params, params, tx.init(params), 0)
    (params, *_), _ = jax.lax.scan(step, carry, jax.random.split(key, num_steps))
    known = known_head(partial(features, params), size, discount, problem)
    judged = judge(
        lambda pairs: features(params, pairs) @ jnp.hstack([params["head"], known.kernel]),
        discount,
        problem,
    )
    return dict(zip((CURRENT, KNOWN), judged, strict=True))


def known_head(
    features: Callable[[Any], jax.Array], size: Size, discount: float, problem: Problem
) -> LinearHead:
    """The least Bellman residual that the features allow: what stage 1 estimates, is known here."""
    pairs, probabilities = problem.continuations
    change = features(problem.train.now[: size.num_known])
    for later, probability in zip(pairs, probabilities, strict=True):
        change = change - discount * probability * features(later)
    reward = jnp.asarray(problem.train.reward[: size.num_known])
    return ridge_solve(change, reward, size.refit_beta * len(reward), use_bias=False)


def judge(value: Callable[[Any], jax.Array], discount: float, problem: Problem) -> jax.Array:
    """The policy's value, and what to select by: (k, 2) for the k columns that `value` returns.

    The kernel loss of Feng, Li and Liu (2019), as a U-statistic on held-out transitions: mean over
    two different ones of residual times kernel of the pairs (s, a) times residual. Zero in the mean
    for the true Q alone, of which it knows nothing, and the same number for every method.
    """
    start, held_out = problem.starts, problem.held_out
    total = jnp.sum(value(start.pairs) * start.weights, axis=0)
    later = discount * held_out.continues * value(held_out.later)
    residual = held_out.reward + later - value(held_out.now)

    def weighted(pair: jax.Array) -> jax.Array:
        distances = jnp.sum((held_out.now - pair) ** 2, axis=1)
        return jnp.exp(-distances / (2 * WIDTH**2)) @ residual

    n = len(residual)
    products = residual * (jax.lax.map(weighted, held_out.now, batch_size=100) - residual)
    return jnp.stack([total, jnp.sum(products, axis=0) / (n * (n - 1))], axis=1)
