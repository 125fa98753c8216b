"""The transformation: the paper's algorithms, Optax's contract, the guard, the messages."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll
from tests import oracles

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(2)
    return {
        "backbone": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype)},
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(4, 2)), dtype),
            "bias": jnp.asarray(rng.normal(size=2), dtype),
        },
    }


def features_of(params, x=X):
    return jnp.tanh(x.astype(params["backbone"]["kernel"].dtype) @ params["backbone"]["kernel"])


def loss_of(params, x=X, y=Y):
    return jnp.mean(jnp.sum((y - cfll.get_head(params, "head")(features_of(params, x))) ** 2, -1))


def make_step(tx, x=X, y=Y, **keywords):
    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_of)(params, x, y)
        extra = {"targets": y, "feature_fn": lambda p: features_of(p, x), **keywords}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


PROX = cfll.prox(lam=1.0)
FAST = cfll.prox(lam=1.0, solver="primal")  # to compile, where the route does not matter


# The paper's algorithms, each in a plain Optax step -----------------------------------------------


def to_params(net):
    as_jax = jnp.asarray
    return {
        "hidden": {"kernel": as_jax(net.a), "bias": as_jax(net.c)},
        "head": {"kernel": as_jax(net.w), "bias": as_jax(net.b)},
    }


def hidden_features(params, x):
    hidden = params["hidden"]
    return jnp.tanh(x @ hidden["kernel"] + hidden["bias"][None, :])


def batch_loss(params, x, y):
    prediction = cfll.get_head(params, "head")(hidden_features(params, x))
    return jnp.mean(jnp.sum((y - prediction) ** 2, axis=-1))


def check_history(history, trajectory):
    assert len(history) == len(trajectory)
    for params, net in zip(history, trajectory, strict=True):
        # float64 on both sides; 1e-9 leaves room for a condition number of 1e6
        chex.assert_trees_all_close(params, to_params(net), rtol=1e-9, atol=1e-9)


def test_algorithm_1(x64):
    net, batches = oracles.network_problem()
    tx = cfll.closed_form(optax.sgd(0.05), cfll.prox(lam=0.5), head="head")
    params, history = to_params(net), []
    state = tx.init(params)
    for x, y in batches:
        grads = jax.grad(batch_loss)(params, x, y)
        updates, state = tx.update(
            grads,
            state,
            params,
            targets=y,
            feature_fn=lambda p: hidden_features(p, x),  # noqa: B023
        )
        params = optax.apply_updates(params, updates)
        history.append(params)
    check_history(history, oracles.algorithm_1(net, batches, rate=0.05, lam=0.5))


def test_algorithm_2(x64):
    net, batches = oracles.network_problem()
    tx = cfll.closed_form(optax.sgd(0.05), cfll.prox(lam=0.5), head="head")
    params, history = to_params(net), []
    x, y = batches[0]
    first = cfll.prox_solve(hidden_features(params, x), y, cfll.get_head(params, "head"), 0.5)
    params = cfll.set_head(params, "head", first)
    state = tx.init(params)
    for (x, y), (x_next, y_next) in itertools.pairwise(batches):
        grads = jax.grad(batch_loss)(params, x, y)
        updates, state = tx.update(
            grads,
            state,
            params,
            targets=y_next,
            feature_fn=lambda p: hidden_features(p, x_next),  # noqa: B023
        )
        params = optax.apply_updates(params, updates)
        history.append(params)
    check_history(history, oracles.algorithm_2(net, batches, rate=0.05, lam=0.5))


def test_equation_17(x64):
    net, batches = oracles.network_problem()
    rule = cfll.prox(lam=0.5)
    tx = cfll.closed_form(optax.sgd(0.05), rule, head="head")
    params, history = to_params(net), []
    state = tx.init(params)

    def objective(params, head, x, y):
        return rule.loss(hidden_features(params, x), y, head)

    for x, y in batches:
        head = cfll.get_state(state)
        (_, solution), grads = jax.value_and_grad(objective, has_aux=True)(params, head, x, y)
        updates, state = tx.update(grads, state, params, solution=solution)
        params = optax.apply_updates(params, updates)
        history.append(params)
    check_history(history, oracles.equation_17(net, batches, rate=0.05, lam=0.5))


def test_ridge_forgets_and_averaged_ridge_averages(x64):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), make_params())
    phi, y = features_of(params), Y.astype(jnp.float64)
    old, fit = cfll.get_head(params, "head"), cfll.ridge_solve(phi, y, 0.3)
    for rule, expected in [
        (cfll.ridge(0.3), fit),
        (cfll.averaged_ridge(0.3, 0.75), jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old, fit)),
    ]:
        tx = cfll.closed_form_head(rule)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params, targets=y, features=phi)
        new = cfll.get_head(optax.apply_updates(params, updates), "head")
        chex.assert_trees_all_close(new, expected, rtol=1e-12)


# Optax's contract ---------------------------------------------------------------------------------


def test_unknown_keywords_are_accepted_and_the_second_step_does_not_recompile(standard_promotion):
    tx = cfll.closed_form(optax.adam(1e-2), PROX)
    step = make_step(tx, a_keyword_that_nobody_knows=1)
    params = make_params()
    params, state = step(params, tx.init(params))
    for _ in range(2):
        params, state = step(params, state)
    assert step._cache_size() == 1


def test_training_converges_on_a_learnable_problem(standard_promotion):
    teacher = make_params()
    targets = cfll.get_head(teacher, "head")(features_of(teacher))
    params = make_params()
    params["backbone"]["kernel"] = params["backbone"]["kernel"] + 0.3
    tx = cfll.closed_form(optax.adam(1e-2), cfll.prox(lam=1e-2))
    step, state = make_step(tx, y=targets), tx.init(params)
    for _ in range(400):
        params, state = step(params, state)
    assert float(loss_of(params, y=targets)) < 1e-4


def test_map_params_is_a_no_op():
    for tx in (cfll.closed_form_head(PROX), cfll.closed_form(optax.adam(1e-2), PROX)):
        state = tx.init(make_params())
        mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        chex.assert_trees_all_equal(mapped, state)


@pytest.mark.parametrize("wrt", ["lam", "beta"])
def test_inject_hyperparams_gives_equal_updates_and_state(wrt):
    def factory(penalty):
        rule = cfll.prox(penalty) if wrt == "lam" else cfll.ridge(penalty)
        return cfll.closed_form(optax.sgd(0.1), rule)

    plain, injected = factory(2.0), optax.inject_hyperparams(factory)(penalty=2.0)
    params = make_params()
    plain_params, plain_state = make_step(plain)(params, plain.init(params))
    new_params, state = make_step(injected)(params, injected.init(params))
    chex.assert_trees_all_close(new_params, plain_params, rtol=1e-5)
    chex.assert_trees_all_close(state.inner_state, plain_state, rtol=1e-5, atol=1e-6)
    # and it can be changed in flight, without recompiling
    step = make_step(injected)
    step(params, state)
    state.hyperparams["penalty"] = jnp.asarray(50.0, jnp.float32)
    _, state = step(params, state)
    assert float(cfll.get_state(state).lam) == 50.0
    assert step._cache_size() == 1


def test_state_types_are_stable_under_cond_and_scan(standard_promotion):
    tx = cfll.closed_form(optax.adam(1e-2), cfll.prox(lam=optax.linear_schedule(1.0, 2.0, 10)))
    params = make_params()
    step = make_step(tx)

    def body(carry, flag):
        return jax.lax.cond(flag, lambda: step(*carry), lambda: carry), None

    flags = jnp.array([True, False, True])
    (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), flags)
    assert int(cfll.get_state(state).info.skipped) == 0


def test_a_constant_schedule_is_a_number():
    params, results = make_params(), []
    for lam in (3.0, optax.constant_schedule(3.0)):
        tx = cfll.closed_form(optax.sgd(0.1), cfll.prox(lam, solver="primal"))
        step, p, state = make_step(tx), params, tx.init(params)
        for _ in range(3):
            p, state = step(p, state)
        results.append((p, state))
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-6)


def test_a_schedule_moves_the_recorded_lam():
    tx = cfll.closed_form_head(cfll.prox(optax.linear_schedule(1.0, 5.0, 4), solver="primal"))
    params = make_params()
    step, state = make_step(tx), tx.init(params)
    seen = []
    for _ in range(3):
        params, state = step(params, state)
        seen.append(float(state.lam))
    assert seen == [1.0, 2.0, 3.0]


def test_multi_steps_solves_on_the_last_micro_batch_and_never_passes_nan(standard_promotion):
    inner = cfll.closed_form(optax.sgd(0.1), PROX)
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    params = make_params()
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    bad = jnp.full_like(Y, jnp.nan)
    updates, state = tx.update(zeros, state, params, targets=bad, features=features_of(params))
    chex.assert_trees_all_equal(updates, zeros)  # 0 * NaN would be NaN: the guard is inside
    updates, state = tx.update(zeros, state, params, targets=Y, features=features_of(params))
    new = cfll.get_head(optax.apply_updates(params, updates), "head")
    expected = cfll.prox_solve(features_of(params), Y, cfll.get_head(params, "head"), 1.0)
    chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)


def test_micro_batches_go_through_gram_stats():
    tx, params = cfll.closed_form(optax.sgd(0.1), PROX), make_params()
    state = tx.init(params)
    stats = cfll.GramStats.zeros(4, 2)
    for rows in (slice(0, 5), slice(5, 16)):
        stats = stats.add(features_of(params)[rows], Y[rows])
    anchor = cfll.get_state(state).anchor
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, state, params, solution=stats.prox(anchor, 1.0))
    new = cfll.get_head(optax.apply_updates(params, updates), "head")
    chex.assert_trees_all_close(
        new, cfll.prox_solve(features_of(params), Y, anchor, 1.0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("spec", [jax.P(), jax.P("x")])
def test_state_types_do_not_change_under_a_mesh(standard_promotion, spec):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = jax.sharding.NamedSharding(mesh, jax.P())
        params = jax.device_put(make_params(), put)
        batch = jax.device_put((X, Y), jax.sharding.NamedSharding(mesh, spec))
        tx = cfll.closed_form(optax.adam(1e-2), PROX)
        state = tx.init(params)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == jax.tree.map(jax.typeof, state)
        _, new_state = make_step(tx, *batch)(params, state)
        assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)


def test_init_takes_shapes_only():
    shapes = jax.eval_shape(make_params)
    state = cfll.closed_form_head(PROX).init(shapes)
    assert state.anchor.kernel.shape == (4, 2)


def test_it_sets_the_head_whatever_the_chain_did_to_its_gradient():
    params = make_params()
    chain = optax.chain(
        optax.clip_by_global_norm(1e-3), optax.sgd(0.1), cfll.closed_form_head(PROX)
    )
    named = optax.named_chain(("sgd", optax.sgd(0.0)), ("head", cfll.closed_form_head(PROX)))
    for tx in (chain, named):
        new, state = make_step(tx)(params, tx.init(params))
        anchor = cfll.get_state(state).anchor
        chex.assert_trees_all_close(cfll.get_head(new, "head"), anchor, rtol=1e-5, atol=1e-6)


def test_the_backbone_optimizer_stores_nothing_for_the_head():
    params = make_params()
    state = cfll.closed_form(optax.adam(1e-2), PROX).init(params)
    backbone = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]))
    adam = optax.tree.get(state, "mu")
    assert sum(leaf.size for leaf in jax.tree.leaves(adam)) == backbone


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adamw(1e-2, weight_decay=0.1),
        optax.contrib.muon(1e-2),
        optax.lion(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        optax.apply_if_finite(optax.adam(1e-2), 3),
        optax.contrib.schedule_free_sgd(1e-2),
    ],
)
def test_backbone_optimizers(standard_promotion, optimizer):
    tx, params = cfll.closed_form(optimizer, FAST), make_params()
    step, state = make_step(tx), tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    chex.assert_trees_all_close(
        cfll.get_head(params, "head"), cfll.get_state(state).anchor, rtol=1e-4, atol=1e-5
    )


# The guard ----------------------------------------------------------------------------------------


def test_a_nan_batch_keeps_the_head_and_is_counted():
    tx, params = cfll.closed_form(optax.sgd(0.1), PROX), make_params()
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    bad = jnp.full_like(Y, jnp.nan)
    updates, state = tx.update(grads, state, params, targets=bad, feature_fn=features_of)
    info = cfll.get_state(state).info
    assert (bool(info.accepted), int(info.skipped)) == (False, 1)
    new = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(new["head"], params["head"], rtol=1e-6)
    chex.assert_trees_all_close(
        new["backbone"]["kernel"], params["backbone"]["kernel"] - 0.1, rtol=1e-6
    )
    _, state = tx.update(grads, state, params, targets=Y, feature_fn=features_of)
    info = cfll.get_state(state).info
    assert (bool(info.accepted), int(info.skipped)) == (True, 1)


def test_a_solution_that_is_not_finite_is_refused():
    tx, params = cfll.closed_form(optax.sgd(0.1), PROX), make_params()
    bad = cfll.LinearHead(jnp.full((4, 2), jnp.inf), jnp.zeros(2))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, solution=bad)
    chex.assert_trees_all_equal(updates, zeros)
    assert int(cfll.get_state(state).info.skipped) == 1
    assert cfll.Route(cfll.get_state(state).info.route) == cfll.Route.GIVEN


def test_a_step_that_float16_cannot_hold_is_refused(standard_promotion):
    params = {"head": {"kernel": jnp.full((1, 1), 4e4, jnp.float16)}}
    rule, x = cfll.ridge(1e-6), jnp.array([[1.0], [2.0]])
    tx = cfll.closed_form_head(rule)
    state = tx.init(params)
    for target, skipped in ((-4e4, 1), (1.0, 1)):  # both finite; the way to the first is not
        solution = rule.loss(x, target * x, cfll.get_state(state))[1]
        updates, state = tx.update(params, state, params, solution=solution)
        params = optax.apply_updates(params, updates)
        assert bool(jnp.isfinite(params["head"]["kernel"]).all())
        assert state.info.skipped == skipped
    np.testing.assert_allclose(params["head"]["kernel"], 1, atol=32)  # float16 near 4e4


def test_heads_at_the_same_path_are_told_apart():
    tx, params = cfll.closed_form_head(PROX), make_params()
    states = {"generator": tx.init(params), "critic": tx.init(params)}
    for head in (None, "head"):
        with pytest.raises(ValueError, match="2 closed-form heads at 'head'"):
            cfll.get_state(states, head)
    chex.assert_trees_all_equal(cfll.get_state(states["critic"]), states["critic"])


def test_ten_thousand_steps_with_a_nan_batch_every_hundredth():
    # The backbone's own protection against NaN gradients is Optax's.
    tx = cfll.closed_form(optax.apply_if_finite(optax.sgd(0.05), 10), PROX)
    params = make_params()

    def body(carry, i):
        params, state = carry
        y = jnp.where(i % 100 == 99, jnp.nan, Y)
        grads = jax.grad(loss_of)(params, X, y)
        updates, state = tx.update(grads, state, params, targets=y, feature_fn=features_of)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(10_000))[0])
    params, state = run((params, tx.init(params)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((params, state)))
    assert int(cfll.get_state(state).info.skipped) == 100
    assert float(loss_of(params)) < float(loss_of(make_params()))


def test_singular_features_are_solved_and_the_route_is_shown():
    tx = cfll.closed_form_head(cfll.prox(lam=1e-9))
    params = make_params()
    features = jnp.tile(features_of(params)[:, :1], (1, 4))
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, tx.init(params), params, targets=Y, features=features)
    assert cfll.Route(state.info.route) == cfll.Route.QR
    assert bool(state.info.accepted)


def test_something_else_writing_the_head_shows_as_drift():
    wrong_order = optax.chain(cfll.closed_form_head(FAST), optax.sgd(0.1))
    right_order = optax.chain(optax.sgd(0.1), cfll.closed_form_head(FAST))
    drifts = []
    for tx in (right_order, wrong_order):
        params = make_params()
        step, state = make_step(tx), tx.init(params)
        for _ in range(2):
            params, state = step(params, state)
        drifts.append(float(cfll.get_state(state).info.drift))
    assert drifts[0] < 1e-6 < 1e-2 < drifts[1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_backbone_that_uses_the_head_shows_as_overruled(tied):
    tx, params = cfll.closed_form(optax.sgd(0.1), PROX), make_params()
    state = tx.init(params)

    def loss_of(params):
        features = features_of(params)
        if tied:
            features = features + params["head"]["kernel"][None, :, 0]
        return PROX.loss(features, Y, cfll.get_state(state))

    grads, solution = jax.grad(loss_of, has_aux=True)(params)
    _, new = tx.update(grads, state, params, solution=solution)
    overruled = float(cfll.get_state(new).info.overruled)
    assert overruled == float(jnp.max(jnp.abs(grads["head"]["kernel"])))
    assert (overruled > 0) == tied
    _, new = tx.update(grads, state, params, targets=Y, features=features_of(params))
    assert float(cfll.get_state(new).info.overruled) == 0  # here gradients of heads are usual


# Messages -----------------------------------------------------------------------------------------


def call(tx=None, params=None, update_params=True, **keywords):
    tx, params = tx or cfll.closed_form(optax.sgd(0.1), PROX), params or make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    return tx.update(zeros, tx.init(params), params if update_params else None, **keywords)


MASK = {"backbone": {"kernel": False}, "head": {"kernel": True, "bias": True}}


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda: call(), TypeError, ["none", "feature_fn=lambda p", "cfll.flax.TrainState"]),
        (lambda: call(features=X), TypeError, ["targets=y"]),
        (lambda: call(targets=Y, features=X, feature_fn=X), TypeError, ["feature_fn and features"]),
        (lambda: call(targets=Y, feature_fn=X), TypeError, ["not a function"]),
        (lambda: call(targets=Y, features=Y), ValueError, ["(16, 2)", "(..., 4)"]),
        (lambda: call(targets=Y, feature_fn=lambda p: (X, {})), TypeError, ["tuple"]),
        (lambda: call(solution=cfll.LinearHead.zeros(4, 3)), ValueError, ["(4, 3)", "(4, 2)"]),
        (
            lambda: call(solution=cfll.LinearHead.zeros(4, 2, use_bias=False)),
            ValueError,
            ["solution has no bias"],
        ),
        (
            lambda: call(cfll.closed_form_head(PROX), update_params=False, targets=Y, features=X),
            ValueError,
            ["needs the parameters"],
        ),
        (
            lambda: cfll.closed_form(optax.sgd(0.1), PROX, "decoder").init(make_params()),
            ValueError,
            ["'decoder'", "head"],
        ),
        (lambda: cfll.closed_form_head(10.0), TypeError, ["float", "cfll.prox(lam=10.0)"]),  # type: ignore[arg-type]
        (
            lambda: call(
                optax.masked(cfll.closed_form_head(PROX), MASK), targets=Y, feature_fn=features_of
            ),
            ValueError,
            ["optax.masked", "cfll.closed_form"],
        ),
        (
            lambda: optax.masked(
                cfll.closed_form_head(PROX), jax.tree.map(lambda leaf: not leaf, MASK)
            ).init(make_params()),
            ValueError,
            ["hidden by optax.masked", "cfll.closed_form"],
        ),
        (lambda: cfll.averaged_ridge(1.0, 1.5), ValueError, ["0 <= decay < 1"]),
    ],
)
def test_errors_contain_the_fix(run, error, words):
    with pytest.raises(error) as caught:
        run()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_of_the_backbone_alone_are_refused(whole):
    params = {"w": jnp.eye(3), "head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    rule = cfll.prox(1.0)
    tx = cfll.closed_form(optax.sgd(0.1), rule) if whole else cfll.closed_form_head(rule)
    state = tx.init(params)
    keywords = {"features": jnp.ones((4, 3)), "targets": jnp.ones((4, 2))}
    nothing = {"kernel": None, "bias": None}
    for gradients in ({"w": jnp.eye(3)}, {"w": jnp.eye(3), "head": nothing}):
        with pytest.raises(TypeError, match=r"differentiate by all parameters.*jnp\.zeros_like"):
            tx.update(gradients, state, params, **keywords)


class Slotted:
    """An optimizer whose functions are methods of what has no dictionary."""

    __slots__ = ()

    def init(self, params):
        return optax.EmptyState()

    def update(self, updates, state, params=None):
        return updates, state


def test_an_optimizer_of_bound_methods_is_asked_for_its_keywords():
    one = Slotted()
    tx = cfll.closed_form(optax.GradientTransformation(one.init, one.update), cfll.prox(1.0))
    assert cfll.get_state(tx.init({"head": {"kernel": jnp.zeros((3, 2))}})).lam == 1


def test_keywords_dropped_on_the_way_are_named():
    inner = optax.MultiSteps(cfll.closed_form(optax.sgd(0.1), PROX), 2).gradient_transformation()
    with pytest.raises(TypeError, match="MultiSteps"):
        call(optax.chain(inner), targets=Y, feature_fn=features_of)


# Every k-th update --------------------------------------------------------------------------------


def check_every_third(step, params, state):
    """The parameters before and after each of seven updates, of which every third solves."""
    history, routes = [params], []
    for _ in range(7):
        params, state = step(params, state)
        history.append(params)
        routes.append(cfll.Route(cfll.get_state(state).info.route))
    heads = [params["head"]["kernel"] for params in history]
    same = [bool((a == b).all()) for a, b in itertools.pairwise(heads)]
    assert same == [False, True, True, False, True, True, False]
    assert set(routes) == {cfll.Route.PRIMAL}  # the last solve's, in between
    assert cfll.get_state(state).count == 7
    assert step._cache_size() == 1
    return history


def test_every_kth_update_solves(standard_promotion):
    always, third = (cfll.closed_form(optax.sgd(0.1), cfll.every(k, FAST)) for k in (1, 3))
    params = make_params()
    history = check_every_third(make_step(third), params, third.init(params))
    # The first update is the one that solves always.
    first, _ = make_step(always)(params, always.init(params))
    np.testing.assert_array_equal(first["head"]["kernel"], history[1]["head"]["kernel"])


def test_every_kth_update_solves_in_the_order_of_equation_17():
    rule = cfll.every(3, FAST)
    tx = cfll.closed_form(optax.sgd(0.1), rule)

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            return rule.loss(features_of(params), Y, cfll.get_state(state))

        grads, solution = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, solution=solution)
        return optax.apply_updates(params, updates), state

    params = make_params()
    history = check_every_third(step, params, tx.init(params))
    for k, (old, new) in enumerate(itertools.pairwise(history)):
        head = cfll.get_head(old, "head")
        if k % 3 == 0:
            head = cfll.prox_solve(features_of(old), Y, head, 1.0)
        # The backbone descends in every update, at the head that is solved or kept.
        old = cfll.set_head(old, "head", head)
        moved = old["backbone"]["kernel"] - 0.1 * jax.grad(loss_of)(old)["backbone"]["kernel"]
        expected = {**old, "backbone": {"kernel": moved}}
        chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)


def test_every_kth_update_keeps_a_head_that_met_nan(standard_promotion):
    tx = cfll.closed_form(optax.sgd(0.0), cfll.every(2, PROX))
    params = make_params()
    state = tx.init(params)
    bad = make_step(tx, x=X.at[0, 0].set(jnp.nan))
    new, state = bad(params, state)
    np.testing.assert_array_equal(new["head"]["kernel"], params["head"]["kernel"])
    info = cfll.get_state(state).info
    assert not info.accepted
    assert info.skipped == 1


@pytest.mark.parametrize("interval", [0, 2.0, True])
def test_the_interval_is_a_positive_whole_number(interval):
    with pytest.raises(ValueError, match="write a whole number"):
        cfll.every(interval, PROX)
