"""One step of every method against what its definition says, on a network without hidden tricks."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import cfll
from benchmarks.core import methods
from benchmarks.core.methods import (
    ALGORITHM_1,
    ALGORITHM_2,
    AVERAGE,
    EQUATION_17,
    GRADIENT,
    PROXIMAL,
    RIDGE,
    TWO_TIMESCALE,
    Batch,
    Hyper,
    Method,
)
from benchmarks.core.search import best_of, descend, search
from benchmarks.core.tuner import Tuner
from benchmarks.reporting.intervals import half_interval

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

RATE, STRENGTH = 0.1, 3.0
HYPER = Hyper(np.float32(RATE), np.float32(STRENGTH), np.int32(10))


def apply(params, stats, inputs, *, train):
    return jnp.tanh(inputs @ params["w"]), stats


def batch(seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(20, 3)).astype(np.float32)
    return Batch(inputs, np.eye(4, dtype=np.float32)[rng.integers(0, 4, 20)])


def start(method):
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (3, 6)), "head": {"kernel": jnp.zeros((6, 4))}}
    state = methods.init(method, HYPER, params, {}, seed=0)
    # A head that is neither zero nor optimal.
    head = cfll.LinearHead(
        0.1 * jax.random.normal(key, (6, 4)), jnp.ones(4) if method.use_bias else None
    )
    params = cfll.set_head(state.params, "head", head)
    return state._replace(
        params=params, opt_state=methods.transformation(method, HYPER).init(params)
    ), head


def take(method):
    state, head = start(method)
    first, following = batch(1), batch(2)
    step = jax.jit(partial(methods.step, method, apply))
    new, loss = step(HYPER, state, first, following)
    return state, head, first, following, new, loss


def sgd_step(w, gradient):
    """The first step of Nesterov's momentum: (1 + 0.9) times the gradient."""
    return w - 1.9 * RATE * gradient


def loss_at(head, first, w):
    return jnp.mean(jnp.sum((first.targets - head(jnp.tanh(first.inputs @ w))) ** 2, axis=-1))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("order", [ALGORITHM_1, ALGORITHM_2, EQUATION_17])
def test_proximal(order, use_bias):
    state, head, first, following, new, _ = take(Method("SGD", PROXIMAL, order, use_bias=use_bias))
    w = state.params["w"]
    if order == EQUATION_17:
        solved = cfll.prox_solve(jnp.tanh(first.inputs @ w), first.targets, head, STRENGTH)
        expected_w = sgd_step(w, jax.grad(partial(loss_at, solved, first))(w))
    else:
        expected_w = sgd_step(w, jax.grad(partial(loss_at, head, first))(w))
        last = first if order == ALGORITHM_1 else following
        features = jnp.tanh(last.inputs @ expected_w)
        solved = cfll.prox_solve(features, last.targets, head, STRENGTH)
    np.testing.assert_allclose(new.params["w"], expected_w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.params["head"]["kernel"], solved.kernel, rtol=1e-4, atol=1e-6)
    assert ("bias" in new.params["head"]) == use_bias


@pytest.mark.parametrize("head_kind", [RIDGE, AVERAGE])
def test_ridge_and_its_average_descend_at_the_head_just_solved(head_kind):
    method = Method("SGD", head_kind, EQUATION_17 if head_kind == RIDGE else "")
    state, head, first, _, new, _ = take(method)
    w = state.params["w"]
    solved = cfll.ridge_solve(jnp.tanh(first.inputs @ w), first.targets, STRENGTH)
    mu = 0.5 if head_kind == AVERAGE else 0.0
    solved = jax.tree.map(lambda old, new: mu * old + (1 - mu) * new, head, solved)
    expected_w = sgd_step(w, jax.grad(partial(loss_at, solved, first))(w))
    np.testing.assert_allclose(new.params["w"], expected_w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.params["head"]["kernel"], solved.kernel, rtol=1e-4, atol=1e-6)


def test_two_timescales_are_two_rates():
    *_, gradient, _ = take(Method("SGD", GRADIENT))
    state, *_, two, _ = take(Method("SGD", TWO_TIMESCALE))
    np.testing.assert_allclose(two.params["w"], gradient.params["w"], rtol=1e-6)
    before = state.params["head"]["kernel"]
    one_step = gradient.params["head"]["kernel"] - before
    np.testing.assert_allclose(
        two.params["head"]["kernel"] - before, STRENGTH * one_step, rtol=1e-4
    )


def test_cross_entropy_is_optax_s():
    state, head, first, _, _, loss = take(Method("Adam", GRADIENT, loss="cross entropy"))
    outputs = head(jnp.tanh(first.inputs @ state.params["w"]))
    expected = optax.softmax_cross_entropy(outputs, first.targets).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_algorithm_2_starts_with_a_head_of_the_first_batch():
    method = Method("SGD", PROXIMAL, ALGORITHM_2)
    state, head = start(method)
    first = batch(1)
    prepared = methods.first_head(method, apply, HYPER, state, first)
    solved = cfll.prox_solve(
        jnp.tanh(first.inputs @ state.params["w"]), first.targets, head, STRENGTH
    )
    np.testing.assert_allclose(prepared.params["head"]["kernel"], solved.kernel, rtol=1e-5)
    np.testing.assert_allclose(
        cfll.get_state(prepared.opt_state).anchor.kernel, solved.kernel, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["zeros", "lecun", "xavier", "he"])
def test_initializations_have_the_papers_variance(name):
    d, o = 300, 100
    params = {"w": jnp.zeros((1, d)), "head": {"kernel": jnp.ones((d, o)), "bias": jnp.ones(o)}}
    state = methods.init(Method("SGD", PROXIMAL, init=name), HYPER, params, {}, seed=3)
    variance = {"zeros": 0.0, "lecun": 1 / d, "xavier": 2 / (d + o), "he": 2 / d}[name]
    head = state.params["head"]
    np.testing.assert_allclose(head["kernel"].var(), variance, rtol=0.05)
    assert not head["bias"].any()


def test_the_search_finds_the_minimum_of_a_valley():
    calls = []

    def cost(point):
        calls.append(point)
        return (point[0] - 7) ** 2 + (point[1] - 2) ** 2 + (point[0] - 7) * (point[1] - 2) / 2

    tried = descend(cost, (2, 5), (10, 6))
    assert best_of(tried) == (7, 2)
    assert len(calls) == len(set(calls)) == len(tried) < 30
    assert {(6, 2), (8, 2), (7, 1), (7, 3)} <= set(tried)  # the best lies between worse ones


def test_the_search_stops_at_the_edge_and_at_its_limit():
    assert best_of(descend(lambda p: -p[0], (0,), (5,))) == (4,)
    assert len(descend(lambda p: -p[0], (0,), (100,), at_most=7)) == 7
    assert best_of(descend(lambda p: float("inf"), (1, 1), (3, 3))) == (1, 1)


def test_the_search_leaves_a_region_where_everything_diverges():
    def cost(point):
        return abs(point[0] - 1) + point[1] if point[0] < 3 else float("inf")

    assert best_of(descend(cost, (8, 4), (10, 6))) == (1, 0)


@pytest.mark.parametrize("runs", [2, 3, 7])
def test_the_interval_is_student_s(runs):
    values = np.random.default_rng(0).normal(size=(runs, 4))
    expected = scipy.stats.t.interval(
        0.95, runs - 1, values.mean(axis=0), scipy.stats.sem(values, axis=0)
    )
    half = half_interval(values)
    np.testing.assert_allclose(values.mean(axis=0) + half, expected[1])
    assert np.isnan(half_interval(values[:1])).all()


@pytest.mark.parametrize("slope", [1, 2, 0.5, -1])
@pytest.mark.parametrize("start", [(7, 5), (5, 7), (9, 3)])
def test_the_joint_search_follows_a_ridge_where_steps_along_axes_stop(slope, start):
    sizes = (14, 11)

    def cost(point):
        across = (point[0] - 7) - slope * (point[1] - 5)
        return across**2 + 0.03 * (point[1] - 3) ** 2

    tried = search(cost, start, sizes)
    least = min(cost((i, j)) for i in range(sizes[0]) for j in range(sizes[1]))
    assert len(tried) <= 20
    assert tried[best_of(tried)] <= least + 0.03


def test_steps_along_axes_stop_on_a_ridge():
    def cost(point):
        return (point[0] - point[1]) ** 2 + 0.03 * (point[1] - 3) ** 2

    assert best_of(descend(cost, (9, 9), (14, 11))) == (9, 9)
    assert best_of(search(cost, (9, 9), (14, 11))) == (3, 3)


def test_the_joint_search_walks_out_of_divergence_and_stays_inside():
    def cost(point):
        assert point in itertools.product(range(10), range(4))
        return math.inf if point[0] > 2 else abs(point[0] - 1) + abs(point[1] - 3)

    assert best_of(search(cost, (9, 0), (10, 4))) == (1, 3)
    assert len(search(cost, (1, 3), (10, 4), at_most=5)) == 5
    assert set(search(lambda point: point[0], (1,), (3,))) == {(0,), (1,)}


def test_the_tuner_searches_on_few_seeds_and_decides_on_more():
    """Of seed 0 alone 4 is best, of both 2: found by a search on both, or among three finalists."""

    def cost(values, seed):
        calls.append((*values, seed))
        return {1.0: (3, 9), 2.0: (2, 1), 4.0: (1, 8), 8.0: (5, 0)}[values[0]][seed]

    grid = Tuner(descend, rates=(1.0, 2.0, 4.0, 8.0), strengths={})
    for tuner, best in (
        (grid, 4.0),
        (grid._replace(search_seeds=2), 2.0),
        (grid._replace(num_finalists=3, final_seeds=2), 2.0),
    ):
        calls = []
        found = tuner.tune(cost, tuner.axes(None), [(2.1,)], (0, 1))
        assert found.best == (best,)
    assert sorted(rate for rate, seed in calls if seed == 1) == [1.0, 2.0, 4.0]
    assert found.tried == {(2.0,): 2, (1.0,): 3, (4.0,): 1, (8.0,): 5}
