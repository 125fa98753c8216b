"""Rules in the Eq. (17) order and as Algorithm 1: losses, states, wrappers, several heads."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cfll
import cfll.flax
from tests import nets
from tests.halving import halving

PROX3 = cfll.prox(3.0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(24, 3)), jnp.float32)
Y = jnp.asarray(np.sin(RNG.normal(size=(24, 2))), jnp.float32)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 5)), dtype),
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(5, 2)), dtype),
            "bias": jnp.zeros(2, dtype),
        },
    }


def features_of(params, x=X):
    return jnp.tanh(x @ params["w"])


def make_step(rule, tx, x=X, y=Y, **keywords):
    """One step in the Eq. (17) order."""

    @jax.jit
    def step(params, opt_state):
        def loss_fn(params):
            return rule.loss(features_of(params, x), y, cfll.get_state(opt_state), **keywords)

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


# The loss ----------------------------------------------------------------------------------------


def normal_equations(phi, y, anchor, lam):
    """Eq. (13) for automatic differentiation to go through, kernel over bias."""
    phi = jnp.concatenate([phi, jnp.ones((len(phi), 1))], axis=1)
    w = jnp.concatenate([anchor.kernel, anchor.bias[None]])
    return w + jnp.linalg.solve(phi.T @ phi + lam * jnp.eye(len(w)), phi.T @ (y - phi @ w))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prox", "ridge"])
def test_derivatives_of_all_orders_are_those_of_the_loss_through_the_solve(x64, kind):
    params = make_params(jnp.float64)
    x, y = X.astype(jnp.float64), Y.astype(jnp.float64)
    rule = cfll.prox(0.7) if kind == "prox" else cfll.ridge(0.7)
    state = cfll.get_state(cfll.closed_form_head(rule).init(params))
    anchor = state.anchor if kind == "prox" else jax.tree.map(jnp.zeros_like, state.anchor)

    def expected(w):
        phi = jnp.tanh(x @ w)
        rows = normal_equations(phi, y, anchor, 0.7)
        squares = jnp.sum((y - phi @ rows[:-1] - rows[-1:]) ** 2)
        old = jnp.concatenate([anchor.kernel, anchor.bias[None]])
        return (squares + 0.7 * jnp.sum((rows - old) ** 2)) / len(x)

    def got(w):
        return rule.loss(jnp.tanh(x @ w), y, state)[0]

    @jax.jit
    def all_orders(w):
        return [(f(w), jax.grad(f)(w), jax.hessian(f)(w)) for f in (got, expected)]

    (value, grad, hessian), (true_value, true_grad, true_hessian) = all_orders(params["w"])
    chex.assert_trees_all_close(grad, true_grad, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(value, true_value, rtol=1e-12)
    chex.assert_trees_all_close(hessian, true_hessian, rtol=1e-8, atol=1e-10)


def test_the_penalty_has_a_derivative_too(x64):
    phi, y = jnp.tanh(X.astype(jnp.float64)), Y.astype(jnp.float64)
    anchor = cfll.LinearHead(jnp.ones((3, 2)), jnp.ones(2))

    def loss(lam):
        return cfll.prox(lam).loss(phi, y, state)[0]

    state = cfll.rules.rule.initial_state(cfll.prox(0.5), anchor)
    h = 1e-5
    both = jax.jit(jax.value_and_grad(loss))
    (_, slope), (ahead, _), (behind, _) = (both(lam) for lam in (0.5, 0.5 + h, 0.5 - h))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-7)


def test_first_derivatives_contain_no_solve():
    rule = cfll.prox(1.0)
    state = cfll.get_state(cfll.closed_form_head(rule).init(make_params()))

    def value(phi):
        return rule.loss(phi, Y, state)[0]

    def count(function):
        text = str(jax.make_jaxpr(function)(features_of(make_params())))
        return text.count("cholesky"), text.count("triangular_solve")

    assert count(jax.value_and_grad(value)) == count(value)


def test_weights_are_given_to_the_loss():
    weights = jnp.arange(24.0) % 3
    rule, params = cfll.prox(1.0), make_params()
    tx = cfll.closed_form(optax.sgd(0.1), rule)
    opt_state = tx.init(params)
    head = cfll.prox_solve(
        features_of(params), Y, cfll.get_head(params, "head"), 1.0, sample_weight=weights
    )
    new, _, loss = make_step(rule, tx, sample_weight=weights)(params, opt_state)
    chex.assert_trees_all_close(cfll.get_head(new, "head"), head, rtol=1e-5, atol=1e-6)
    of_kernels, _ = cfll.prox_loss(
        features_of(params), Y, cfll.get_head(params, "head"), 1.0, sample_weight=weights
    )
    np.testing.assert_allclose(loss, of_kernels, rtol=1e-6)


# States of rules ---------------------------------------------------------------------------------


def test_a_schedule_advances_in_the_order_of_equation_17():
    schedule = optax.linear_schedule(1.0, 100.0, 10)
    rule, params = cfll.prox(schedule), make_params()
    tx = cfll.closed_form(optax.sgd(0.1), rule)
    step, opt_state = make_step(rule, tx), tx.init(params)
    for _ in range(10):
        params, opt_state, _ = step(params, opt_state)
    state = cfll.get_state(opt_state)
    assert int(state.count) == 10
    np.testing.assert_allclose(state.lam, schedule(9), rtol=1e-6)
    assert cfll.Route(state.info.route) is cfll.Route.PRIMAL
    assert 0 < float(state.info.rcond) < 1


@pytest.mark.parametrize("make", [cfll.prox, cfll.ridge, lambda s: cfll.averaged_ridge(s, 0.5)])
def test_a_schedule_advances_beside_a_head_from_elsewhere(make):
    schedule = optax.linear_schedule(1.0, 100.0, 10)
    for rule, lams in ((make(schedule), [1.0, 10.9, 20.8]), (cfll.every(2, PROX3), [3.0] * 3)):
        tx, params = cfll.closed_form_head(rule), make_params()
        state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
        for lam in lams:
            given = cfll.LinearHead(jnp.ones((5, 2)), jnp.ones(2))
            _, state = tx.update(zeros, state, params, solution=given)
            np.testing.assert_allclose(state.lam, lam, rtol=1e-6)


def test_a_rule_that_learns_stays_beside_a_head_from_elsewhere():
    tx, params = cfll.closed_form_head(halving(8.0)), make_params()
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    given = cfll.LinearHead(jnp.ones((5, 2)), jnp.ones(2))
    _, new = tx.update(zeros, state, params, solution=given)
    chex.assert_trees_all_equal(new.rule_state, state.rule_state)
    assert int(new.count) == 1


def test_a_rejected_solution_keeps_head_and_rule_state():
    rule, params = halving(8.0), make_params()
    tx = cfll.closed_form(optax.sgd(0.01), rule)
    good, bad = make_step(rule, tx), make_step(rule, tx, y=Y.at[0, 0].set(jnp.nan))
    params, opt_state, _ = good(params, tx.init(params))
    kept = cfll.get_state(opt_state)
    _, opt_state, _ = bad(params, opt_state)
    state = cfll.get_state(opt_state)
    chex.assert_trees_all_equal((state.anchor, state.rule_state), (kept.anchor, kept.rule_state))
    assert (bool(state.info.accepted), int(state.info.skipped), int(state.count)) == (False, 1, 2)


def test_a_state_from_outside_the_step_shows_as_stale():
    params, tx = make_params(), cfll.closed_form_head(PROX3)
    first = opt_state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for from_outside in (False, False, True):
        state = first if from_outside else opt_state
        _, solution = PROX3.loss(features_of(params), Y, cfll.get_state(state))
        _, opt_state = tx.update(zeros, opt_state, params, solution=solution)
        assert bool(cfll.get_state(opt_state).info.stale) is from_outside
    _, opt_state = tx.update(zeros, opt_state, params, solution=solution.head)
    assert not cfll.get_state(opt_state).info.stale


def test_a_head_that_the_parameters_cannot_hold_is_rejected():
    rule, params = cfll.prox(1e-6), jax.tree.map(lambda p: p.astype(jnp.float16), make_params())
    tx = cfll.closed_form_head(rule)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    features = features_of(make_params())
    _, state = tx.update(zeros, state, params, targets=1e6 * Y, features=features)
    assert not bool(state.info.accepted)
    _, state = tx.update(zeros, state, params, targets=Y, features=features)
    assert bool(state.info.accepted)


def lam_by_hand(losses, lam):
    """Halved whenever the loss is below the one before, infinity at first."""
    history = []
    for before, loss in itertools.pairwise([np.inf, *losses]):
        lam = lam / 2 if loss < before else lam
        history.append(lam)
    return history


def losses_and_lams(framework, order, rule, steps=6):
    """What a rule saw and did over some steps of training."""
    tx = cfll.closed_form(optax.sgd(0.01), rule)
    losses, lams = [], []
    if framework == "linen":
        net = nets.Linen(5, 2)
        state = cfll.flax.TrainState.create(
            apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=tx
        )

        @jax.jit
        def linen_step(state):
            def loss_fn(params):
                features = state.apply_fn({"params": params}, X, method="features")
                if order == "Eq. (17)":
                    return rule.loss(features, Y, cfll.get_state(state))
                head = cfll.get_head(params, "head")
                return jnp.mean(jnp.sum((Y - head(features)) ** 2, -1)), None

            (_, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            if order == "Eq. (17)":
                return state.apply_gradients(grads=grads, solution=solution)
            features = cfll.flax.feature_fn(state, X)
            return state.apply_gradients(grads=grads, targets=Y, feature_fn=features)

        for _ in range(steps):
            state = linen_step(state)
            losses.append(float(cfll.get_state(state).rule_state.loss))
            lams.append(float(cfll.get_state(state).lam))
        return losses, lams

    net = nets.Nnx(3, 5, 2)
    optimizer = cfll.flax.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def nnx_step(net, optimizer):
        head = cfll.get_state(optimizer)

        def loss_fn(net):
            if order == "Eq. (17)":
                return rule.loss(net.features(X), Y, head)
            return jnp.mean(jnp.sum((Y - net(X)) ** 2, -1)), None

        (_, solution), grads = nnx.value_and_grad(loss_fn, has_aux=True)(net)
        if order == "Eq. (17)":
            optimizer.update(net, grads, solution=solution)
        else:
            feature_fn = cfll.flax.feature_fn(net, X)
            optimizer.update(net, grads, targets=Y, feature_fn=feature_fn)

    for _ in range(steps):
        nnx_step(net, optimizer)
        losses.append(float(cfll.get_state(optimizer).rule_state.loss))
        lams.append(float(cfll.get_state(optimizer).lam))
    return losses, lams


@pytest.mark.parametrize("order", ["Eq. (17)", "Algorithm 1"])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_rule_of_ones_own_trains_in_both_orders_and_frameworks(
    standard_promotion, framework, order
):
    losses, lams = losses_and_lams(framework, order, halving(64.0))
    assert lams == lam_by_hand(losses, 64.0)
    assert lams[-1] < 64.0


def test_extra_keywords_reach_the_rule_and_others_are_refused():
    base = cfll.prox(1.0)

    def solve(features, targets, state, *, sample_weight=None, gain=1.0):
        return base.solve(features, gain * targets, state, sample_weight=sample_weight)

    rule, params = cfll.Rule(base.init, solve), make_params()
    state = cfll.get_state(cfll.closed_form_head(rule).init(params))
    phi, zeros = features_of(params), jax.tree.map(jnp.zeros_like, params)
    _, solution = rule.loss(phi, Y, state, gain=2.0)
    expected = cfll.prox_solve(phi, 2 * Y, state.anchor, 1.0)
    chex.assert_trees_all_close(solution.head, expected, rtol=1e-6)
    tx = cfll.closed_form_head(rule)
    _, new = tx.update(zeros, tx.init(params), params, targets=Y, features=phi, gain=2.0, other=1)
    chex.assert_trees_all_close(new.anchor, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="takes no keyword gian"):
        rule.loss(phi, Y, state, gian=2.0)


# Devices that share a batch ----------------------------------------------------------------------


@pytest.mark.slow
def test_four_devices_with_an_axis_train_as_one():
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "tests.replicated"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("penalize_bias", [True, False])
def test_an_axis_of_vmap_is_a_batch_in_parts(x64, penalize_bias):
    options = {"penalize_bias": penalize_bias}
    state = cfll.get_state(cfll.closed_form_head(cfll.ridge(0.7)).init(make_params(jnp.float64)))
    phi, y = features_of(make_params(jnp.float64), X.astype(jnp.float64)), Y.astype(jnp.float64)
    weights = jnp.arange(24.0) % 3

    def in_parts(array):
        return array.reshape(4, 6, *array.shape[1:])

    for make in (cfll.prox, cfll.ridge, lambda lam, **kw: cfll.averaged_ridge(lam, 0.5, **kw)):
        alone = make(0.7, solver="primal", **options)
        expected, whole = alone.loss(phi, y, state, sample_weight=weights)
        rule = make(0.7, axis_name="i", **options)

        def part(phi, y, weights, rule=rule):
            return rule.loss(phi, y, state, sample_weight=weights)

        losses, parts = jax.vmap(part, axis_name="i")(*map(in_parts, (phi, y, weights)))
        np.testing.assert_allclose(losses.mean(), expected, rtol=1e-12)
        for k in range(4):
            one = jax.tree.map(lambda leaf: leaf[k], parts.head)  # noqa: B023
            chex.assert_trees_all_close(one, whole.head, rtol=1e-10, atol=1e-12)


def test_an_axis_solves_from_sums_alone():
    with pytest.raises(ValueError, match="leave out solver='qr'"):
        cfll.prox(1.0, axis_name="i", solver="qr")


@pytest.mark.parametrize("order", ["Eq. (17)", "Algorithm 1"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "rule", [PROX3, cfll.every(2, cfll.ridge(1.0)), cfll.softmax(1.0), cfll.kalman(1.0)]
)
def test_without_an_axis_replicas_are_refused(rule, check_vma, order):
    params = make_params()

    def make_mesh(size):
        # The default of jax 0.12 is explicit axes, whose inputs would have to be sharded.
        auto = (jax.sharding.AxisType.Auto,)
        return jax.sharding.AbstractMesh((size,), ("i",), axis_types=auto)

    mesh = make_mesh(4)

    def refuse_or_solve(rule, mesh=mesh):
        tx = cfll.closed_form_head(rule)
        state = tx.init(params)

        def solve(x, y):
            features = features_of(params, x)
            if order == "Eq. (17)":
                return rule.loss(features, y, state)[1].head.kernel
            zeros = jax.tree.map(jnp.zeros_like, params)
            return tx.update(zeros, state, params, targets=y, features=features)[0]["head"][
                "kernel"
            ]

        specs = {"in_specs": jax.P("i"), "out_specs": jax.P("i"), "check_vma": check_vma}
        return jax.eval_shape(jax.shard_map(solve, mesh=mesh, **specs), X, Y)

    with pytest.raises(ValueError, match=r"mapped axis 'i' .* cfll.prox\(lam, axis_name='i'\)"):
        refuse_or_solve(rule)
    assert refuse_or_solve(rule._replace(axis_name=())).shape == (4 * 5, 2)
    assert refuse_or_solve(rule, make_mesh(1)).shape == (5, 2)


# Where the state is ------------------------------------------------------------------------------


RULE = PROX3
LABELS = {"w": "a", "head": {"kernel": "b", "bias": "b"}}
WRAPPERS = {
    "closed_form": cfll.closed_form(optax.sgd(0.1), RULE),
    "chain": optax.chain(optax.adam(0.1), cfll.closed_form_head(RULE)),
    "named_chain": optax.named_chain(
        ("sgd", optax.sgd(0.1)), ("solve", cfll.closed_form_head(RULE))
    ),
    "masked": optax.masked(cfll.closed_form_head(RULE), {"w": False, "head": True}),
    "partition": optax.partition({"a": optax.sgd(0.1), "b": cfll.closed_form_head(RULE)}, LABELS),
    "apply_if_finite": optax.apply_if_finite(cfll.closed_form(optax.sgd(0.1), RULE), 3),
    "MultiSteps": optax.MultiSteps(cfll.closed_form(optax.sgd(0.1), RULE), 2),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda lam: cfll.closed_form(optax.sgd(0.1), cfll.prox(lam))
    )(lam=3.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_order_of_equation_17_works_through_wrappers(standard_promotion, name):
    tx, params = WRAPPERS[name], make_params()
    opt_state = tx.init(params)
    anchor = cfll.get_state(opt_state).anchor
    chex.assert_trees_all_equal(anchor, cfll.get_head(params, "head"))
    expected = cfll.prox_solve(features_of(params), Y, anchor, 3.0)
    step = make_step(RULE, tx)
    new, opt_state, _ = step(params, opt_state)
    if name == "MultiSteps":  # the first of two micro-batches: solved, not yet written
        chex.assert_trees_all_equal(new, params)
        new, opt_state, _ = step(new, opt_state)
        return
    state = cfll.get_state(opt_state, "head")
    chex.assert_trees_all_close(state.anchor, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(cfll.get_head(new, "head"), expected, rtol=1e-5, atol=1e-6)
    assert float(state.lam) == 3.0
    assert str(cfll.Route(state.info.route)) == "primal"


def test_a_hyperparameter_is_given_to_the_rule(standard_promotion):
    tx = WRAPPERS["inject_hyperparams"]
    params = make_params()
    opt_state = tx.init(params)
    opt_state.hyperparams["lam"] = jnp.float32(7.0)
    rule = cfll.prox(opt_state.hyperparams["lam"])
    _, opt_state, _ = make_step(rule, tx)(params, opt_state)
    assert float(cfll.get_state(opt_state).lam) == 7.0


def test_states_that_are_not_there_are_named():
    params = make_params()
    with pytest.raises(ValueError, match="has none"):
        cfll.get_state(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match=r"at 'decoder'.*\['head'\]"):
        cfll.get_state(WRAPPERS["chain"].init(params), "decoder")
    with pytest.raises(TypeError, match=r"cfll\.get_state"):
        RULE.loss(X, Y, WRAPPERS["chain"].init(params))


# Several heads -----------------------------------------------------------------------------------


def two_headed(widths=(2, 3)):
    rng = np.random.default_rng(2)
    heads = {
        name: {"kernel": jnp.asarray(rng.normal(size=(5, o)), jnp.float32), "bias": jnp.zeros(o)}
        for name, o in zip(("a", "b"), widths, strict=True)
    }
    return {"w": make_params()["w"], **heads}


def test_two_heads_on_one_backbone(standard_promotion):
    rules = {"a": cfll.prox(1.0), "b": cfll.ridge(0.1)}
    params = two_headed()
    targets = {"a": Y, "b": jnp.concatenate([Y, Y[:, :1] ** 2], axis=1)}
    chained = optax.chain(
        optax.sgd(0.1), *(cfll.closed_form_head(rule, name) for name, rule in rules.items())
    )
    nested = cfll.closed_form(cfll.closed_form(optax.sgd(0.1), rules["a"], "a"), rules["b"], "b")
    for tx in (chained, nested):
        opt_state = tx.init(params)

        @jax.jit
        def step(params, opt_state, tx=tx):
            def loss_fn(params):
                phi = features_of(params)
                both = {
                    name: rule.loss(phi, targets[name], cfll.get_state(opt_state, name))
                    for name, rule in rules.items()
                }
                total = sum(loss for loss, _ in both.values())
                return total, {name: solution for name, (_, solution) in both.items()}

            grads, solution = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
            return optax.apply_updates(params, updates), opt_state

        new, opt_state = step(params, opt_state)
        phi = features_of(params)
        head_a = cfll.prox_solve(phi, targets["a"], cfll.get_head(params, "a"), 1.0)
        head_b = cfll.ridge_solve(phi, targets["b"], 0.1)
        for name, head in (("a", head_a), ("b", head_b)):
            chex.assert_trees_all_close(cfll.get_head(new, name), head, rtol=1e-4, atol=1e-5)
            assert float(cfll.get_state(opt_state, name).info.rcond) < 1
        assert float(cfll.get_state(opt_state, "b").lam) == np.float32(0.1)

        def loss_at_heads(w, heads=(head_a, head_b)):
            phi = jnp.tanh(X @ w)
            return sum(
                jnp.mean(jnp.sum((targets[name] - head(phi)) ** 2, -1))
                for name, head in zip("ab", heads, strict=True)
            )

        w = params["w"] - 0.1 * jax.grad(loss_at_heads)(params["w"])
        chex.assert_trees_all_close(new["w"], w, rtol=1e-4, atol=1e-5)


def test_two_heads_as_algorithm_1_take_dictionaries():
    params = two_headed()
    targets = {"a": Y, "b": Y[:, :1] @ jnp.ones((1, 3))}
    tx = optax.chain(*(cfll.closed_form_head(cfll.prox(1.0), name) for name in "ab"))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, targets=targets, feature_fn=features_of)
    new = optax.apply_updates(params, updates)
    for name in "ab":
        head = cfll.get_head(params, name)
        expected = cfll.prox_solve(features_of(params), targets[name], head, 1.0)
        chex.assert_trees_all_close(cfll.get_head(new, name), expected, rtol=1e-4, atol=1e-5)


def test_a_solution_goes_to_its_own_head_only():
    params = two_headed(widths=(2, 2))
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optax.chain(*(cfll.closed_form_head(RULE, name) for name in "ab"))
    opt_state = tx.init(params)
    state = cfll.get_state(opt_state, "a")
    _, solution = RULE.loss(features_of(params), Y, state)
    with pytest.raises(TypeError, match=r"for the head at 'a', not 'b'.*solution=\{'b'"):
        tx.update(zeros, opt_state, params, solution=solution)
    with pytest.raises(TypeError, match=r"any of \['a', 'b'\].*solution=\{'a': head\}"):
        tx.update(zeros, opt_state, params, solution=solution.head)
    with pytest.raises(ValueError, match="to be told apart"):
        cfll.get_state(opt_state)
    heads = {"a": solution, "b": cfll.LinearHead.zeros(5, 2)}
    updates, opt_state = tx.update(zeros, opt_state, params, solution=heads)
    new = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(cfll.get_head(new, "a"), solution.head, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(cfll.get_head(new, "b"), heads["b"], atol=1e-6)
    assert cfll.Route(cfll.get_state(opt_state, "b").info.route) is cfll.Route.GIVEN


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"solution": None}, "got none for the head at 'head'"),
        ({"solution": {"kernel": X}}, "keys ['kernel'], none of which is the path of the head"),
        ({"solution": {("other",): X}}, "write solution={'head': ...}"),
        ({"solution": {("head",): X}}, "write loss, solution ="),
        ({"solution": (1.0, cfll.LinearHead.zeros(5, 2))}, "a tuple; write loss, solution ="),
        ({"solution": X}, "write loss, solution ="),
        (
            {"solution": cfll.LinearHead.zeros(5, 2), "sample_weight": jnp.ones(24)},
            "no effect beside solution",
        ),
        (
            {"solution": cfll.Solution(cfll.LinearHead.zeros(5, 2), (), cfll.SolveInfo(0, 1))},
            "use one rule for loss and optimizer",
        ),
    ],
)
def test_solutions_that_do_not_fit(keywords, words):
    tx, params = cfll.closed_form_head(RULE), make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(TypeError) as caught:
        tx.update(zeros, tx.init(params), params, **keywords)
    assert words in str(caught.value)


# Weights ------------------------------------------------------------------------------------------


def test_making_a_rule_wakes_no_backend():
    program = """
import cfll, jax
cfll.prox(10.0), cfll.ridge(1.0), cfll.softmax(1.0), cfll.kalman(1.0), cfll.adaptive_prox()
jax.config.update("jax_num_cpu_devices", 2)  # an error where there is a backend
assert jax.device_count() == 2
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("make", [cfll.prox, cfll.ridge, cfll.softmax, cfll.kalman])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("10", TypeError, "is '10'; write a real number > 0"),
        (None, TypeError, "is None; write a real number > 0"),
        (1j, TypeError, "write a real number > 0"),
        (float("nan"), ValueError, "is NaN or infinite"),
        (float("inf"), ValueError, "is NaN or infinite"),
        (-1.0, ValueError, "is negative"),
    ],
)
def test_a_penalty_that_is_none_is_refused_where_it_is_written(make, value, error, words):
    with pytest.raises(error, match=words):
        make(value)


def test_the_kalman_filter_has_no_schedule():
    with pytest.raises(TypeError, match=r"beta is a function; here stands its value"):
        cfll.kalman(optax.constant_schedule(1.0))


def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match=r"jnp\.abs"):
        cfll.ridge_solve(X, Y, 0.5, sample_weight=jnp.full(24, 1 + 1j))
