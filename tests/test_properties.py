"""Property tests of the kernels: finite or visibly NaN, optimal, equivariant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cfll
from tests.oracles import TIMES, spoil_columns

pytestmark = pytest.mark.slow

# Few shapes, since each is compiled; many values.
SHAPES = st.sampled_from([(1, 1, 1), (5, 3, 2), (3, 8, 1), (12, 4, 3)])


@st.composite
def problems(draw):
    """Features with repeated, zero and badly scaled columns; weights with zeros; any penalty."""
    n, d, o = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = rng.normal(size=(n, d)) * 10.0 ** draw(st.integers(-6, 6))
    features = features * 10.0 ** rng.integers(-3, 4, size=d)
    kinds = st.sampled_from(["as it is", "zero", "repeated", "constant"])
    spoil_columns(features, [draw(kinds) for _ in range(d)])
    targets = rng.normal(size=(n, o)) * 10.0 ** draw(st.integers(-3, 3))
    weights = rng.integers(0, 3, size=n) * 1.0
    lam = 10.0 ** draw(st.integers(-8, 8))
    anchor = cfll.LinearHead(
        jnp.asarray(rng.normal(size=(d, o)), jnp.float32),
        jnp.asarray(rng.normal(size=o), jnp.float32),
    )
    as_float32 = [jnp.asarray(array, jnp.float32) for array in (features, targets, weights, lam)]
    return (*as_float32[:2], anchor, *as_float32[2:])


@jax.jit
def solve(features, targets, anchor, weights, lam):
    return cfll.prox_solve(features, targets, anchor, lam, sample_weight=weights)


def objective(head, features, targets, anchor, weights, lam):
    """Eq. (12) in float64."""
    kernel, bias, w0, b0, phi, y, w = (
        np.asarray(leaf, np.float64)
        for leaf in (head.kernel, head.bias, anchor.kernel, anchor.bias, features, targets, weights)
    )
    fit = np.sum(w[:, None] * (y - phi @ kernel - bias) ** 2)
    return fit + float(lam) * (np.sum((kernel - w0) ** 2) + np.sum((bias - b0) ** 2))


@settings(max_examples=300 * TIMES, deadline=None)
@given(problems())
def test_always_finite_and_never_worse_than_the_anchor(problem):
    features, targets, anchor, weights, lam = problem
    head = solve(features, targets, anchor, weights, lam)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in head)
    at_anchor = objective(anchor, *problem)
    # float32 rounding of predictions as large as the largest product |phi| |W|
    size = np.abs(np.asarray(features, np.float64)) @ np.abs(np.asarray(anchor.kernel, np.float64))
    slack = 1e-5 * np.sum(np.asarray(weights)[:, None] * (size + np.abs(targets)) ** 2)
    assert objective(head, *problem) <= at_anchor * (1 + 1e-5) + slack


@settings(max_examples=100 * TIMES, deadline=None)
@given(problems(), st.permutations(range(12)))
def test_the_order_of_samples_does_not_matter(problem, order):
    features, targets, anchor, weights, _ = problem
    order = np.asarray([i for i in order if i < len(features)])
    lam = jnp.asarray(1e-2, jnp.float32) * (1 + jnp.max(jnp.abs(features)) ** 2)
    head = solve(features, targets, anchor, weights, lam)
    shuffled = solve(features[order], targets[order], anchor, weights[order], lam)
    np.testing.assert_allclose(shuffled.kernel, head.kernel, rtol=1e-3, atol=1e-3)


@settings(max_examples=100 * TIMES, deadline=None)
@given(problems())
def test_a_weight_of_two_is_a_sample_twice(problem):
    features, targets, anchor, weights, _ = problem
    lam = jnp.asarray(1e-2, jnp.float32) * (1 + jnp.max(jnp.abs(features)) ** 2)
    head = solve(features, targets, anchor, weights, lam)
    repeats = np.asarray(weights, int)
    stats = cfll.GramStats.zeros(features.shape[1], targets.shape[1])
    for row, repeat in enumerate(repeats):
        for _ in range(repeat):
            stats = add_one(stats, features[row : row + 1], targets[row : row + 1])
    np.testing.assert_allclose(stats.prox(anchor, lam).kernel, head.kernel, rtol=1e-3, atol=1e-3)


@jax.jit
def add_one(stats, features, targets):
    return stats.add(features, targets)


@settings(max_examples=200 * TIMES, deadline=None)
@given(
    st.sampled_from([(4, 2), (2, 4)]),
    st.lists(st.sampled_from([0.0, 1.0, -1e30, 1e30, np.nan, np.inf]), min_size=8, max_size=8),
)
def test_the_transformation_never_writes_what_is_not_finite(shape, values):
    params = {"head": {"kernel": jnp.ones((shape[1], 1)), "bias": jnp.ones(1)}}
    new_kernel, skipped = guarded_update(
        params, jnp.asarray(values, jnp.float32).reshape(shape), jnp.ones((shape[0], 1))
    )
    assert bool(jnp.isfinite(new_kernel).all())
    if not np.isfinite(values).all():
        assert int(skipped) == 1


@jax.jit
def guarded_update(params, features, targets):
    tx = cfll.closed_form_head(cfll.prox(lam=1e-3))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, targets=targets, features=features)
    return params["head"]["kernel"] + updates["head"]["kernel"], state.info.skipped
