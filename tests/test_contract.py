"""Every solver by every way of calling, against one oracle; compilations, memory, constants."""

import inspect
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll
from tests import contract
from tests.test_scale import outputs_of, start


@pytest.mark.slow
@pytest.mark.parametrize("case", contract.covering_cases(contract.WAYS), ids=str)
def test_every_solver_by_every_way_of_calling(case):
    contract.check(case)


def test_any_two_options_meet():
    cases = [case[2:] for case in contract.covering_cases(contract.WAYS)]
    met, all_pairs = (set().union(*map(contract.pairs, rows)) for rows in (cases, contract.OPTIONS))
    assert met == all_pairs


@pytest.mark.slow
def test_every_solver_on_several_devices():
    report = json.loads(outputs_of(start("contract"))[0])
    assert report["devices"] == contract.DEVICES
    assert report["failed"] == {}, report["failed"]


# Compilations -------------------------------------------------------------------------------------

F = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
W = np.arange(12, dtype=np.float32) % 3
HEAD = cfll.LinearHead.zeros(4, 2)
SUMS = cfll.GramStats.zeros(4, 2).add(F, Y)
FAST = {"solver": "primal"}  # to compile; "auto" is called by itself
RULE = cfll.prox(1.0, **FAST)
PARAMS = {"w": jnp.eye(4), "head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}}
TX = cfll.closed_form(optax.sgd(0.1), RULE)
ADAPTIVE = cfll.adaptive_prox(solver="primal")
ADAPTIVE_STATE = cfll.closed_form_head(ADAPTIVE).init(PARAMS)
KALMAN = cfll.kalman(1.0, process_noise=0.1, forgetting=0.9)
KALMAN_STATE = cfll.closed_form_head(KALMAN).init(PARAMS)
STATE, HEAD_STATE = TX.init(PARAMS), cfll.closed_form_head(RULE).init(PARAMS)


def gradient(function):
    """Of the first value of a loss by the features."""
    return lambda s: jax.grad(lambda f: function(f, s)[0])(s * F)


def loss_of(rule, targets=Y, **keywords):
    return lambda s: rule.loss(s * F, targets, cfll.get_state(STATE), **keywords)


def update(**keywords):
    def call(s):
        given = {name: make(s) for name, make in keywords.items()}
        return TX.update(jax.tree.map(jnp.zeros_like, PARAMS), STATE, PARAMS, **given)

    return call


# Each called with other values of the same shapes and dtypes, outside of any jit.
CALLS = {
    **{
        f"prox_solve, {name}": lambda s, n=n, solver=solver: cfll.prox_solve(
            F[:n], s * Y[:n], HEAD, s, solver=solver
        )
        for name, (solver, n, _) in contract.SOLVERS.items()
        if solver
    },
    "prox_solve, matrix": lambda s: cfll.prox_solve(F, Y, HEAD, s * np.eye(4, dtype=np.float32)),
    "prox_solve, python float": lambda s: cfll.prox_solve(F, Y, HEAD, float(s)),
    "ridge_solve": lambda s: cfll.ridge_solve(F, s * Y, s, sample_weight=s * W),
    "ridge_solve, free": lambda s: cfll.ridge_solve(F, s * Y, s, penalize_bias=False),
    "ridge_solve, gradient": gradient(lambda f, s: cfll.ridge_solve(f, Y, s, **FAST).kernel.sum(0)),
    "penalized_solve": lambda s: cfll.penalized_solve(F, Y, HEAD, s),
    "prox_loss": lambda s: cfll.prox_loss(s * F, Y, HEAD, s, sample_weight=s * W, **FAST),
    "prox_loss, gradient": gradient(lambda f, s: cfll.prox_loss(f, Y, HEAD, s, **FAST)),
    "ridge_loss": lambda s: cfll.ridge_loss(s * F, Y, s, **FAST),
    "ridge_loss, gradient": gradient(lambda f, s: cfll.ridge_loss(f, Y, s, **FAST)),
    "LinearHead": lambda s: cfll.LinearHead(HEAD.kernel, HEAD.bias)(s * F),
    "LinearHead.zeros": lambda s: cfll.LinearHead.zeros(4, 2),
    "get_head": lambda s: cfll.get_head(PARAMS, "head"),
    "set_head": lambda s: cfll.set_head(PARAMS, "head", HEAD),
    "GramStats.zeros": lambda s: cfll.GramStats.zeros(4, 2),
    "GramStats.add": lambda s: SUMS.add(s * F, Y, s * W),
    "GramStats.merge": lambda s: SUMS.merge(SUMS),
    "GramStats.decay": lambda s: SUMS.decay(s / 16),
    "GramStats.ridge": lambda s: SUMS.ridge(s),
    "GramStats.ridge, free": lambda s: SUMS.ridge(s, penalize_bias=False),
    "GramStats.prox": lambda s: SUMS.prox(HEAD, s),
    "bayesian_ridge": lambda s: cfll.bayesian_ridge(SUMS, HEAD)[0].predict(s * F),
    "GramStats.solve": lambda s: SUMS.solve(HEAD, s * np.ones(4, np.float32)),
    "prox": loss_of(RULE),
    "ridge": loss_of(cfll.ridge(1.0, **FAST)),
    "averaged_ridge": loss_of(cfll.averaged_ridge(1.0, 0.5, **FAST), sample_weight=W),
    "softmax": loss_of(cfll.softmax(1.0, **FAST), np.float32(Y.max(1, keepdims=True) == Y)),
    "logistic": loss_of(cfll.logistic(1.0, **FAST), np.float32(Y > 0)),
    "poisson": loss_of(cfll.poisson(1.0, **FAST), np.abs(Y)),
    "huber": loss_of(cfll.huber(1.0, **FAST)),
    "adaptive_prox": lambda s: ADAPTIVE.loss(s * F, Y, ADAPTIVE_STATE),
    "kalman": lambda s: KALMAN.loss(s * F, Y, KALMAN_STATE, sample_weight=s * W),
    "every": loss_of(cfll.every(2, RULE)),
    "schedule": loss_of(cfll.prox(optax.constant_schedule(1.0), **FAST)),
    "prox, gradient": gradient(lambda f, s: RULE.loss(f, Y, cfll.get_state(STATE))),
    "closed_form.init": lambda s: cfll.closed_form(optax.sgd(0.1), RULE).init(PARAMS),
    "update, head": update(solution=lambda s: HEAD),
    "update, solution": update(solution=lambda s: loss_of(RULE)(s)[1]),
    "update, closed_form_head": lambda s: cfll.closed_form_head(RULE).update(
        PARAMS, HEAD_STATE, PARAMS, targets=Y, features=s * F
    ),
    "update, features": update(features=lambda s: s * F, targets=lambda s: Y),
    "update, feature_fn": update(
        feature_fn=lambda s: lambda params: s * F @ params["w"], targets=lambda s: Y
    ),
    "get_state": lambda s: cfll.get_state(STATE),
}


def test_every_public_function_is_called():
    text = inspect.getsource(inspect.getmodule(test_every_public_function_is_called))
    types = {
        "AdaptiveState",
        "CG",
        "ClosedFormState",
        "EvidenceInfo",
        "HeadInfo",
        "KalmanState",
        "Posterior",
    }
    types |= {"Route", "Rule", "Solution", "SolveInfo"}
    assert [name for name in {*cfll.__all__} - types if f"cfll.{name}" not in text] == []


@pytest.fixture(scope="module")
def compilations():
    """The compilations so far, a list that grows."""
    events = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(1.0)
    assert events
    return events


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_fourteen_more_calls_compile_nothing(standard_promotion, compilations, name):
    CALLS[name](np.float32(1))
    count = len(compilations)
    for call in range(2, 16):
        CALLS[name](np.float32(call))
        assert len(compilations) == count, f"call {call} compiles"


# Memory and constants -----------------------------------------------------------------------------


def lowered(solver, n, d, weighted=False, outputs=1):
    def solve(features, targets, anchor, weights):
        weights = weights if weighted else None
        if solver is None:
            return (
                cfll.GramStats.zeros(d, outputs).add(features, targets, weights).prox(anchor, 1.0)
            )
        return cfll.prox_solve(features, targets, anchor, 1.0, sample_weight=weights, solver=solver)

    shapes = (n, d), (n, outputs), (n,)
    features, targets, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    anchor = jax.eval_shape(lambda: cfll.LinearHead.zeros(d, outputs))
    return jax.jit(solve).lower(features, targets, anchor, weights)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "weighted"), [(512, False), (100_000, False), (100_000, True)])
def test_the_fallback_of_a_dual_is_small(d, weighted):
    def memory(solver, outputs):
        program = lowered(solver, 16, d, weighted, outputs)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert memory("auto", 3) <= 3 * memory("dual", 3)
    # With one output the dual needs next to nothing; its fallback still copies the features once.
    assert memory("auto", 1) <= memory("dual", 1) + 2.2 * 16 * d * 4


@pytest.mark.parametrize("name", contract.SOLVERS)
def test_nothing_as_large_as_the_batch_is_a_constant(name):
    solver, n, d = contract.SOLVERS[name]
    program = lowered(solver, *((100_000, d) if n > d else (n, 100_000)))
    assert len(program.as_text()) < 200_000
    constants = re.findall(r"\w+\[([\d,]+)\]\S* constant\(", program.compile().as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in ["1", *constants]) <= 16
