"""Rules for other losses: scikit-learn's heads, no rise of the loss, both orders, guards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from scipy.special import expit, logsumexp
from sklearn.linear_model import HuberRegressor, LogisticRegression, PoissonRegressor

import cfll
import cfll.flax
from cfll.rules.rule import initial_state
from cfll.rules.working import LENGTHS
from tests import nets
from tests.oracles import TIMES

NAMES = ["softmax", "logistic", "poisson", "huber"]
EXAMPLES = 100 * TIMES  # for each of the losses

LOSSES = {  # float64 NumPy, (n, o) -> (n,)
    "softmax": lambda z, y: y.sum(-1) * logsumexp(z, axis=-1) - (y * z).sum(-1),
    "logistic": lambda z, y: (np.logaddexp(0, z) - y * z).sum(-1),
    "poisson": lambda z, y: (np.exp(z) - y * z).sum(-1),
    "huber": lambda z, y: np.where(abs(y - z) <= 1, (y - z) ** 2, 2 * abs(y - z) - 1).sum(-1),
}


def make_targets(name, rng, n, o):
    if name == "softmax":
        return np.eye(o)[rng.integers(0, o, n)]
    if name == "logistic":
        return rng.integers(0, 2, (n, o)) * 1.0
    return rng.poisson(3.0, (n, o)) * 1.0 if name == "poisson" else rng.standard_t(2, (n, o))


def penalized(name, head, x, y, anchor, lam, weights):
    """What a rule minimizes, a sum over samples."""
    head, anchor, x, y, weights = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (head, anchor, x, y, weights)
    )
    with np.errstate(over="ignore"):
        losses = weights @ LOSSES[name](x @ head.kernel + head.bias, y)
    distance = sum(np.sum((new - old) ** 2) for new, old in zip(head, anchor, strict=True))
    return losses + float(lam) * distance


# Oracles -----------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
WEIGHTS = RNG.integers(0, 3, size=60) * 1.0
LABELS = np.argmax(X @ RNG.normal(size=(4, 3)) + RNG.gumbel(size=(60, 3)), axis=1)
EXACT = {"tol": 1e-12, "max_iter": 10_000}


def converged(rule, y):
    """Kernel (d, o) and bias after many inner steps from an anchor of zeros."""
    state = initial_state(rule, cfll.LinearHead.zeros(4, y.shape[1], dtype=jnp.float64))
    batch = jnp.asarray(X), jnp.asarray(y, jnp.float64)
    return jax.jit(rule.solve)(*batch, state, sample_weight=jnp.asarray(WEIGHTS)).head


def test_softmax_converges_to_logistic_regression(x64):
    oracle = LogisticRegression(C=1 / (2 * 0.5), **EXACT).fit(X, LABELS, sample_weight=WEIGHTS)
    head = converged(cfll.softmax(0.5, steps=200, penalize_bias=False), np.eye(3)[LABELS])
    np.testing.assert_allclose(head.kernel.T, oracle.coef_, atol=1e-6)
    # A constant added to all biases changes nothing.
    expected = oracle.intercept_ - oracle.intercept_.mean()
    np.testing.assert_allclose(head.bias - head.bias.mean(), expected, atol=1e-6)


def test_logistic_converges_to_logistic_regressions(x64):
    y = np.eye(3)[LABELS]
    head = converged(cfll.logistic(0.5, steps=50, penalize_bias=False), y)
    for k in range(3):
        oracle = LogisticRegression(C=1 / (2 * 0.5), **EXACT).fit(X, y[:, k], sample_weight=WEIGHTS)
        np.testing.assert_allclose(head.kernel[:, k], oracle.coef_[0], atol=1e-6)
        np.testing.assert_allclose(head.bias[k], oracle.intercept_[0], atol=1e-6)


def test_poisson_converges_to_poisson_regressions(x64):
    rng = np.random.default_rng(1)
    y = rng.poisson(np.exp(X[:, :2] + 1)) * 1.0
    head = converged(cfll.poisson(0.5, steps=50, penalize_bias=False), y)
    for k in range(2):
        alpha = 2 * 0.5 / WEIGHTS.sum()  # of half the mean deviance
        oracle = PoissonRegressor(alpha=alpha, solver="newton-cholesky", **EXACT)
        oracle.fit(X, y[:, k], sample_weight=WEIGHTS)
        np.testing.assert_allclose(head.kernel[:, k], oracle.coef_, atol=1e-6)
        np.testing.assert_allclose(head.bias[k], oracle.intercept_, atol=1e-6)


def test_huber_converges_to_huber_regression(x64):
    y = X[:, 0] + 2 + np.random.default_rng(2).standard_t(2, size=60)
    oracle = HuberRegressor(epsilon=1.35, alpha=0.5, **EXACT).fit(X, y, sample_weight=WEIGHTS)
    # It minimizes sum_i h(r_i / scale) scale + alpha |w|^2, and finds the scale, too.
    lam, delta = 0.5 * oracle.scale_, 1.35 * oracle.scale_
    head = converged(cfll.huber(lam, delta, steps=50, penalize_bias=False), y[:, None])
    np.testing.assert_allclose(head.kernel[:, 0], oracle.coef_, atol=1e-4)
    np.testing.assert_allclose(head.bias[0], oracle.intercept_, atol=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("softmax", 2.0), ("logistic", 4.0)])
def test_one_step_is_a_proximal_step_to_the_working_targets(x64, name, factor):
    rng = np.random.default_rng(3)
    anchor = cfll.LinearHead(jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=3)))
    rule, y = getattr(cfll, name)(0.5), make_targets(name, rng, 60, 3)
    head = jax.jit(rule.solve)(jnp.asarray(X), jnp.asarray(y), initial_state(rule, anchor)).head
    z = np.asarray(anchor(jnp.asarray(X)))
    p = expit(z) if name == "logistic" else np.exp(z - logsumexp(z, axis=1, keepdims=True))
    working = jnp.asarray(z + factor * (y - p))
    whole = cfll.prox_solve(jnp.asarray(X), working, anchor, 2 * factor * 0.5)
    length = (head.bias[0] - anchor.bias[0]) / (whole.bias[0] - anchor.bias[0])
    assert np.abs(length - np.asarray(LENGTHS)).min() < 1e-9
    expected = jax.tree.map(lambda new, old: old + length * (new - old), whole, anchor)
    chex.assert_trees_all_close(head, expected, rtol=1e-9, atol=1e-12)


def test_huber_with_a_large_delta_is_prox():
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(X[:, :2] ** 2, jnp.float32)
    anchor = cfll.LinearHead.zeros(4, 2)
    rules = cfll.huber(2.0, 1e3), cfll.prox(2.0)
    both = [jax.jit(rule.loss)(x, y, initial_state(rule, anchor)) for rule in rules]
    chex.assert_trees_all_close(both[0][0], both[1][0], rtol=1e-5)
    chex.assert_trees_all_close(both[0][1].head, both[1][1].head, rtol=1e-4, atol=1e-5)


# The loss never rises ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "logistic", "huber"])
def test_the_parabola_is_above_the_loss(name):
    rng = np.random.default_rng(7)
    scales = 10 ** rng.uniform(-2, 2, (2, 10_000, 1))
    at, z = scales * rng.normal(size=(2, 10_000, 3))
    y = make_targets(name, rng, 10_000, 3)
    slope, c = -2 * np.clip(y - at, -1, 1), 1 / np.maximum(abs(y - at), 1)
    if name == "softmax":
        slope, c = np.exp(at - logsumexp(at, axis=1, keepdims=True)) - y, 1 / 4
    if name == "logistic":
        slope, c = expit(at) - y, 1 / 8
    parabola = LOSSES[name](at, y) + np.sum(slope * (z - at) + c * (z - at) ** 2, axis=1)
    assert (LOSSES[name](z, y) <= parabola * (1 + 1e-9) + 1e-9).all()


@st.composite
def problems(draw, name):
    """Features of any scale, weights with zeros, an anchor that may be far from any optimum."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(8, 3)) * 10.0 ** draw(st.integers(-3, 2))
    kernel, bias = rng.normal(size=(3, 3)), rng.normal(size=3)
    size = 10.0 ** draw(st.integers(-2, 1))
    lam = 10.0 ** draw(st.integers(-4, 4))
    weights = rng.integers(0, 3, size=8) * 1.0
    batch = (x, make_targets(name, rng, 8, 3), kernel * size, bias * size, lam, weights)
    return [jnp.asarray(array, jnp.float32) for array in batch]


@jax.jit(static_argnums=0)
def heads_along(name, x, y, anchor, lam, weights):
    def head_after(steps):
        rule = getattr(cfll, name)(lam, steps=steps)
        return rule.solve(x, y, initial_state(rule, anchor), sample_weight=weights).head

    return [anchor, *(head_after(steps) for steps in (1, 2, 5))]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_inner_step_lets_the_loss_rise(name):
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(problems(name))
    def check(problem):
        x, y, kernel, bias, lam, weights = problem
        anchor = cfll.LinearHead(kernel, bias)
        z = np.abs(np.asarray(x)) @ np.abs(kernel) + np.abs(bias)
        assume(name != "poisson" or z.max() < 80)  # e^z must be finite
        heads = heads_along(name, x, y, anchor, lam, weights)
        losses = [penalized(name, head, x, y, anchor, lam, weights) for head in heads]
        # Rounding in float32: of the loss, and of outputs as large as |phi| |W|.
        slack = 1e-5 * (losses[0] + np.sum(weights[:, None] * (1 + z) * (1 + np.abs(y))))
        # Rates of many orders of magnitude may be too much for float32, visibly.
        assert np.isfinite(losses).all() or (name == "poisson" and z.max() > 15)
        assert not (np.diff(losses) > slack).any()

    check()


# Training ----------------------------------------------------------------------------------------


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    head = {"kernel": jnp.zeros((6, 3), dtype), "bias": jnp.zeros(3, dtype)}
    return {"w": jnp.asarray(rng.normal(size=(4, 6)), dtype), "head": head}


def features_of(params, x=X):
    return jnp.tanh(jnp.asarray(x, params["w"].dtype) @ params["w"])


@pytest.mark.parametrize("name", ["softmax", "poisson"])
def test_both_orders_train_and_follow_a_schedule(standard_promotion, name):
    y = jnp.asarray(make_targets(name, np.random.default_rng(0), 60, 3), jnp.float32)
    rule = getattr(cfll, name)(optax.linear_schedule(1.0, 11.0, 10))
    tx = cfll.closed_form(optax.sgd(0.02), rule)

    def loss_fn(params, opt_state):
        return rule.loss(features_of(params), y, cfll.get_state(opt_state))

    @jax.jit
    def equation_17(params, opt_state):
        grads, solution = jax.grad(loss_fn, has_aux=True)(params, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def algorithm_1(params, opt_state):
        grads = jax.tree.map(jnp.zeros_like, params)  # of the head, too, whatever arrives for it
        grads["w"] = jax.grad(lambda params: loss_fn(params, opt_state)[0])(params)["w"]
        updates, opt_state = tx.update(grads, opt_state, params, targets=y, feature_fn=features_of)
        return optax.apply_updates(params, updates), opt_state

    for step in (equation_17, algorithm_1):
        params = make_params()
        opt_state = tx.init(params)
        history = []
        for _ in range(5):
            params, opt_state = step(params, opt_state)
            z = features_of(params) @ params["head"]["kernel"] + params["head"]["bias"]
            history.append(LOSSES[name](np.asarray(z, np.float64), np.asarray(y)).mean())
        state = cfll.get_state(opt_state)
        assert float(state.lam) == 5.0
        assert int(state.info.skipped) == 0
        assert all(np.diff(history) < 0)
    # It goes on beside a head that comes from elsewhere.
    updates = jax.tree.map(jnp.zeros_like, params)
    _, opt_state = tx.update(updates, opt_state, params, solution=state.anchor)
    assert float(cfll.get_state(opt_state).lam) == 6.0


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_of_the_loss_at_the_fixed_new_head(x64, name):
    rng = np.random.default_rng(4)
    x, y, weights = (
        jnp.asarray(X),
        jnp.asarray(make_targets(name, rng, 60, 3)),
        rng.uniform(size=60),
    )
    anchor = cfll.LinearHead(jnp.asarray(rng.normal(size=(4, 3))), jnp.zeros(3))
    rule = getattr(cfll, name)(0.5)
    state = initial_state(rule, anchor)

    def got(x):
        return rule.loss(x, y, state, sample_weight=jnp.asarray(weights))

    (loss, solution), grads = jax.jit(jax.value_and_grad(got, has_aux=True))(x)
    rest = (y, anchor, 0.5, weights)
    expected = penalized(name, solution.head, x, *rest) / weights.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    step = 1e-5 * rng.normal(size=x.shape)
    ahead, behind = (penalized(name, solution.head, x + s, *rest) for s in (step, -step))
    np.testing.assert_allclose(
        np.sum(grads * step), (ahead - behind) / 2 / weights.sum(), rtol=1e-6
    )

    def count(function):
        return str(jax.make_jaxpr(function)(x)).count("cholesky")

    assert count(got) == count(jax.value_and_grad(got, has_aux=True))


def test_linen_and_nnx(standard_promotion):
    x, y = jnp.asarray(X, jnp.float32), jnp.eye(3)[LABELS]
    rule, net, model = cfll.softmax(1.0), nets.Linen(6, 3), nets.Nnx(4, 6, 3)
    tx = cfll.closed_form(optax.adam(1e-2), rule)
    params = net.init(jax.random.key(0), x)["params"]
    linen = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    optimizer = cfll.flax.Optimizer(model, tx, wrt=nnx.Param)

    @jax.jit
    def linen_step(state):
        def loss_fn(params):
            features = state.apply_fn({"params": params}, x, method="features")
            return rule.loss(features, y, cfll.get_state(state))

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, solution=solution), loss

    @nnx.jit
    def nnx_step(model, optimizer):
        head = cfll.get_state(optimizer)
        both = nnx.value_and_grad(lambda m: rule.loss(m.features(x), y, head), has_aux=True)(model)
        (loss, solution), grads = both
        optimizer.update(model, grads, solution=solution)
        return loss

    losses = []
    for _ in range(3):
        linen, loss = linen_step(linen)
        losses.append([loss, nnx_step(model, optimizer)])
    assert (np.diff(losses, axis=0) < 0).all()


# What does not fit -------------------------------------------------------------------------------


BAD = {"softmax": [np.nan, -1], "logistic": [2], "poisson": [-1, np.inf], "huber": [np.inf]}


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_is_none_is_rejected_unless_its_weight_is_zero(name):
    rule = getattr(cfll, name)(1.0)
    x = jnp.asarray(X[:20], jnp.float32)
    y = jnp.asarray(make_targets(name, np.random.default_rng(5), 20, 3), jnp.float32)
    weights = jnp.asarray(np.arange(20) % 3, jnp.float32)  # the first is zero
    state = initial_state(rule, cfll.LinearHead.zeros(4, 3))

    @jax.jit
    def loss(x, y):
        return rule.loss(x, y, state, sample_weight=weights)

    expected = loss(x, y)
    assert np.isfinite(expected[0])
    for bad in BAD[name]:
        new = cfll.rules.rule.advance(state, loss(x, y.at[1, 1].set(bad))[1])
        assert not bool(new.info.accepted)
        chex.assert_trees_all_equal(new.anchor, state.anchor)
        absent = loss(x.at[0].set(jnp.nan), y.at[0].set(bad))
        chex.assert_trees_all_close(absent, expected, rtol=1e-6)


@pytest.mark.parametrize("junk", [30.0, 300.0, 3e3])
@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_a_row_of_weight_zero_may_have_an_infinite_loss(junk, anchor):
    rule = cfll.poisson(1.0)
    state = initial_state(rule, cfll.LinearHead(jnp.full((4, 2), anchor), jnp.zeros(2)))
    x = 0.3 * jnp.asarray(X[:20], jnp.float32)
    y = jnp.asarray(make_targets("poisson", np.random.default_rng(5), 20, 2), jnp.float32)
    rows = jnp.concatenate([x, jnp.full((2, 4), junk)]), jnp.concatenate([y, jnp.zeros((2, 2))])
    weights = jnp.r_[jnp.ones(20), jnp.zeros(2)]

    def loss(x, y, weights, features):
        x = x.at[:20].add(features)
        return rule.loss(x, y, state, sample_weight=weights)

    differentiated = jax.jit(jax.value_and_grad(loss, argnums=3, has_aux=True))
    for_some = differentiated(*rows, weights, jnp.zeros_like(x))
    for_all = differentiated(x, y, jnp.ones(20), jnp.zeros_like(x))
    chex.assert_trees_all_close(for_some, for_all, rtol=1e-4, atol=1e-5)


def test_a_loss_that_overflows_is_rejected():
    rule = cfll.poisson(1.0)
    state = initial_state(rule, cfll.LinearHead(jnp.full((4, 1), 1e3)))
    _, solution = jax.jit(rule.loss)(jnp.ones((5, 4)), jnp.ones((5, 1)), state)
    assert not bool(cfll.rules.rule.advance(state, solution).info.accepted)


def test_half_precision_features_are_solved_in_float32():
    rule, y = cfll.softmax(1.0), jnp.eye(3, dtype=jnp.bfloat16)[LABELS]
    state = initial_state(rule, cfll.LinearHead.zeros(4, 3))
    half = jnp.asarray(X, jnp.bfloat16)
    loss, solution = jax.jit(rule.loss)(half, y, state)
    expected = jax.jit(rule.loss)(half.astype(jnp.float32), y.astype(jnp.float32), state)
    assert solution.head.kernel.dtype == loss.dtype == jnp.float32
    chex.assert_trees_all_close((loss, solution.head), (expected[0], expected[1].head), rtol=1e-6)


def test_inside_shard_map():
    rule = cfll.poisson(1.0, steps=2)  # loops over steps and outputs
    x = jnp.asarray(X, jnp.float32)
    y = jnp.asarray(make_targets("poisson", np.random.default_rng(6), 60, 3), jnp.float32)
    state = initial_state(rule, cfll.LinearHead.zeros(4, 3))

    def local(x, y):
        return jax.lax.pmean(rule.loss(x, y, state)[0], "data")

    rows = jax.P("data")
    mapped = jax.shard_map(
        local,
        mesh=jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(rows, rows),
        out_specs=jax.P(),
    )
    expected = jax.jit(rule.loss)(x, y, state)[0]
    np.testing.assert_allclose(jax.jit(mapped)(x, y), expected, rtol=1e-5)


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="steps is 0; write a positive"):
        cfll.softmax(1.0, steps=0)
    with pytest.raises(ValueError, match=r"delta is 0; write delta > 0"):
        cfll.huber(1.0, delta=0)
    with pytest.raises(ValueError, match=r"lam is negative \(smallest -1\)"):
        cfll.softmax(-1.0)
    rule = cfll.softmax(1.0)
    one = initial_state(rule, cfll.LinearHead.zeros(4, 1))
    with pytest.raises(ValueError, match=r"softmax of one output is 1.*cfll\.logistic"):
        rule.loss(jnp.ones((5, 4)), jnp.ones((5, 1)), one)
    assert cfll.softmax(1.0, steps=np.int64(2))
    with pytest.raises(ValueError, match=r"features and targets ask for \(4, 2\)"):
        rule.loss(
            jnp.ones((5, 4)), jnp.ones((5, 2)), initial_state(rule, cfll.LinearHead.zeros(4, 3))
        )
