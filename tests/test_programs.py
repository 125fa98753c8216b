"""Programs drawn by hypothesis: any order, rule, wrapper, dtype, framework and fault, three steps.

``CFLL_EXAMPLES=50 python -m pytest -n0 tests/test_programs.py`` draws 50 times as many.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_map_with_path

import cfll
import cfll.flax
from tests import compiled
from tests.oracles import TIMES

pytestmark = pytest.mark.slow

N, INPUTS, D, OUTPUTS, LAM, DECAY = 8, 3, 4, 2, 0.5, 0.25
# Of a head, relative to the old and the new one: features are made twice, by two programs.
DTYPES = {"float32": 1e-4, "float64": 1e-9, "bfloat16": 5e-2, "float16": 5e-3}
WRAPPERS = ["closed_form", "chain", "masked", "partition", "MultiSteps", "inject_hyperparams"]
WRAPPERS += ["apply_if_finite"]
FAULT_AT = 1  # the second of three steps


class Program(NamedTuple):
    order: str
    rule: str
    wrapper: str
    dtype: str
    call: str
    framework: str
    fault: str
    bias: bool
    seed: int


programs = st.builds(
    Program,
    order=st.sampled_from(["solution", "features", "feature_fn"]),
    rule=st.sampled_from(["prox", "ridge", "averaged_ridge", "every", "schedule"]),
    wrapper=st.sampled_from(WRAPPERS),
    dtype=st.sampled_from(list(DTYPES)),
    call=st.sampled_from(["jit", "eager", "donated"]),
    framework=st.sampled_from(["plain", "linen", "nnx"]),
    fault=st.sampled_from(["none", "none", "NaN input", "NaN target", "no weight", "huge"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


# The program --------------------------------------------------------------------------------------


def rule_of(program, lam=LAM):
    fast = {"solver": "primal"}  # to compile
    return {
        "prox": lambda: cfll.prox(lam, **fast),
        "ridge": lambda: cfll.ridge(lam, **fast),
        "averaged_ridge": lambda: cfll.averaged_ridge(lam, DECAY, **fast),
        "every": lambda: cfll.every(2, cfll.prox(lam, **fast)),
        "schedule": lambda: cfll.prox(optax.linear_schedule(LAM, 3 * LAM, 2), **fast),
    }[program.rule]()


def optimizer_of(program):
    """The transformation; its backbone takes no gradient that is NaN, and clips others."""
    rule = rule_of(program)
    backbone = optax.chain(optax.zero_nans(), optax.clip(1.0), optax.sgd(0.1))
    head, whole = cfll.closed_form_head(rule), cfll.closed_form(backbone, rule)

    def is_head(tree, value):
        return tree_map_with_path(lambda path, _: ("head" in keystr(path)) == value, tree)

    def labels(tree):
        return jax.tree.map(lambda flag: "head" if flag else "backbone", is_head(tree, True))

    def injected(lam):
        return cfll.closed_form(backbone, rule_of(program, lam))

    return {
        "closed_form": lambda: whole,
        "chain": lambda: optax.chain(backbone, optax.clip_by_global_norm(10.0), head),
        "masked": lambda: optax.chain(
            optax.masked(backbone, partial(is_head, value=False)),
            optax.masked(head, partial(is_head, value=True)),
        ),
        "partition": lambda: optax.partition({"backbone": backbone, "head": head}, labels),
        "MultiSteps": lambda: optax.MultiSteps(whole, 2),
        "inject_hyperparams": lambda: optax.inject_hyperparams(injected)(lam=LAM),
        "apply_if_finite": lambda: optax.apply_if_finite(whole, 100),
    }[program.wrapper]()


def features_of(params, x):
    return jnp.tanh(x @ params["hidden"]["kernel"])


class LinenNet(nn.Module):
    dtype: str
    bias: bool

    def setup(self):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        self.hidden = nn.Dense(D, use_bias=False, **options)
        self.head = nn.Dense(OUTPUTS, use_bias=self.bias, **options)

    def features(self, x):
        return nn.tanh(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


class NnxNet(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(INPUTS, D, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(D, OUTPUTS, use_bias="bias" in params["head"], rngs=rngs)
        for layer, leaves in ((self.hidden, params["hidden"]), (self.head, params["head"])):
            for name, leaf in leaves.items():
                setattr(layer, name, nnx.Param(jnp.array(leaf)))

    def features(self, x):
        return nnx.tanh(self.hidden(x))


def loss_at(program, opt_state, features, head, y, w):
    """The loss and, in the order of Eq. (17), the solution."""
    if program.order == "solution":
        injected = program.wrapper == "inject_hyperparams"
        lam = opt_state.hyperparams["lam"] if injected else LAM
        if isinstance(lam, nnx.Variable):
            lam = lam[...]
        rule, state = rule_of(program, lam), cfll.get_state(opt_state)
        return rule.loss(features, y, state, sample_weight=w)
    squares = jnp.sum((y - head(features)) ** 2, axis=-1)
    return jnp.sum(w * squares) / jnp.maximum(jnp.sum(w), 1), None


def keywords_of(program, solution, features, feature_fn, y, w):
    if program.order == "solution":
        return {"solution": solution}
    given = {"features": features} if program.order == "features" else {"feature_fn": feature_fn}
    return {**given, "targets": y, "sample_weight": w}


def plain(program, params):
    tx = optimizer_of(program)

    def step(carry, x, y, w):
        params, opt_state = carry

        def loss_fn(params):
            features, head = features_of(params, x), cfll.get_head(params, "head")
            return loss_at(program, opt_state, features, head, y, w)

        grads, solution = jax.grad(loss_fn, has_aux=True)(params)
        feature_fn = partial(features_of, x=x)
        given = keywords_of(program, solution, features_of(params, x), feature_fn, y, w)
        updates, opt_state = tx.update(grads, opt_state, params, **given)
        return optax.apply_updates(params, updates), opt_state

    def read(carry):
        return carry[0], cfll.get_state(carry[1])

    return (params, tx.init(params)), jitted(program, step), read


def linen(program, params):
    net = LinenNet(program.dtype, program.bias)
    state = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=optimizer_of(program))

    def step(state, x, y, w):
        def loss_fn(params):
            features = state.apply_fn({"params": params}, x, method="features")
            return loss_at(program, state.opt_state, features, cfll.get_head(params, "head"), y, w)

        grads, solution = jax.grad(loss_fn, has_aux=True)(state.params)
        feature_fn = cfll.flax.feature_fn(state, x)
        given = keywords_of(program, solution, feature_fn(state.params), feature_fn, y, w)
        return state.apply_gradients(grads=grads, **given)

    return state, jitted(program, step), lambda state: (state.params, cfll.get_state(state))


def flax_nnx(program, params):
    net = NnxNet(params)
    optimizer = cfll.flax.Optimizer(net, optimizer_of(program), wrt=nnx.Param)

    def update(net, optimizer, x, y, w):
        def loss_fn(net):
            head = cfll.get_head(nnx.state(net, nnx.Param), "head")
            return loss_at(program, optimizer.opt_state, net.features(x), head, y, w)

        grads, solution = nnx.grad(loss_fn, has_aux=True)(net)
        feature_fn = cfll.flax.feature_fn(net, x)
        given = keywords_of(program, solution, net.features(x), feature_fn, y, w)
        optimizer.update(net, grads, **given)

    update = update if program.call == "eager" else nnx.jit(update)

    def step(carry, x, y, w):
        update(*carry, x, y, w)
        return carry

    def read(carry):
        params = nnx.to_pure_dict(nnx.state(carry[0], nnx.Param))
        return params, cfll.get_state(carry[1])

    return (net, optimizer), step, read


def jitted(program, step):
    if program.call == "eager":
        return step
    fast = {"xla_backend_optimization_level": 0}
    donated = (0,) if program.call == "donated" else ()
    return jax.jit(step, donate_argnums=donated, compiler_options=fast)


# What it should do, in float64 NumPy --------------------------------------------------------------


def solved(features, y, w, anchor, lam, bias):
    if bias:
        features = np.hstack([features, np.ones((len(features), 1))])
    rows = features.T * w
    gram = rows @ features + lam * np.eye(features.shape[1])
    return anchor + np.linalg.solve(gram, rows @ (y - features @ anchor))


def next_head(program, features, y, w, old, count):
    """The rule, transcribed."""
    lam = LAM * (1 + min(count, 2)) if program.rule == "schedule" else LAM
    if program.rule == "every" and count % 2:
        return old
    if "ridge" not in program.rule:
        return solved(features, y, w, old, lam, program.bias)
    new, decay = solved(features, y, w, 0 * old, lam, program.bias), DECAY
    return new if program.rule == "ridge" else decay * old + (1 - decay) * new


def rows_of(head):
    leaves = [np.asarray(leaf, np.float64) for leaf in head if leaf is not None]
    return np.vstack([leaf.reshape(-1, OUTPUTS) for leaf in leaves])


def data_of(program):
    """Parameters, and for each step inputs, targets and weights."""
    rng = np.random.default_rng(program.seed)
    dtype = np.dtype(program.dtype)
    wide = np.float64 if program.dtype == "float64" else np.float32
    head = {"kernel": rng.normal(size=(D, OUTPUTS)), "bias": rng.normal(size=OUTPUTS)}
    if not program.bias:
        del head["bias"]
    params = {"hidden": {"kernel": rng.normal(size=(INPUTS, D))}, "head": head}
    batches = []
    for step in range(3):
        x, y = rng.normal(size=(N, INPUTS)), rng.normal(size=(N, OUTPUTS))
        w = rng.choice([0.0, 1.0, 2.0], size=N)
        w[0] = 1.0
        if step == FAULT_AT:
            x[0, 0] = np.nan if program.fault == "NaN input" else x[0, 0]
            y[0, 0] = np.nan if program.fault == "NaN target" else y[0, 0]
            y = y * (1e30 if program.fault == "huge" else 1)
            w = w * (program.fault != "no weight")
        batches.append((x.astype(dtype), y.astype(wide), w.astype(wide)))
    as_dtype = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(dtype)), params)
    return as_dtype, batches


def check_program(program):
    params, batches = data_of(program)
    types = jax.tree.map(jax.typeof, params)
    make = {"plain": plain, "linen": linen, "nnx": flax_nnx}[program.framework]
    carry, step, read = make(program, params)
    eps = float(ml_dtypes.finfo(program.dtype).eps)
    expected = rows_of(cfll.get_head(jax.tree.map(np.asarray, read(carry)[0]), "head"))
    count = skipped = largest = 0
    for number, (x, y, w) in enumerate(batches):
        before = jax.tree.map(np.asarray, read(carry)[0])
        carry = step(carry, *map(jnp.asarray, (x, y, w)))
        after, state = jax.tree.map(np.asarray, read(carry))
        assert jax.tree.map(jax.typeof, after) == types
        wide = np.float64 if program.dtype == "float64" else np.float32
        assert all(leaf.dtype == wide for leaf in jax.tree.leaves(state.anchor))
        for leaf in jax.tree.leaves((after, state)):
            assert np.isfinite(leaf.astype(float)).all()

        faulty = number == FAULT_AT and program.fault
        broken = faulty and "NaN" in program.fault
        used = after if program.order == "feature_fn" else before
        features = np.asarray(features_of(jax.tree.map(jnp.asarray, used), x), float)
        idle = program.wrapper == "MultiSteps" and number % 2 == 0  # adds up gradients
        idle |= program.wrapper == "apply_if_finite" and broken  # drops the step
        # Whether numbers of 1e30 fit, and the gradients at a head of 1e30 afterwards, is for the
        # dtype to say; the state says what came of it.
        if program.fault == "huge" and number > FAULT_AT and program.wrapper == "apply_if_finite":
            idle |= int(state.count) == count
        if faulty == "huge":
            idle |= int(state.count) == count
            refused = not idle and int(state.info.skipped) > skipped
            assert not refused or program.dtype == "float16"
        else:
            refused = broken and not (program.rule == "every" and count % 2)
        old = expected
        if not idle:
            if not refused:
                expected = next_head(program, features, y.astype(float), w, old, count)
            count, skipped = count + 1, skipped + refused
        size = np.abs(old).max() + np.abs(expected).max()
        largest, found = max(largest, size), rows_of(state.anchor)
        np.testing.assert_allclose(found, expected, rtol=0, atol=DTYPES[program.dtype] * size)
        assert int(state.count) == count
        assert int(state.info.skipped) == skipped
        assert bool(state.info.accepted) == (not refused) or idle
        assert int(state.info.route) in set(cfll.Route)
        written = rows_of(cfll.get_head(after, "head"))
        np.testing.assert_allclose(written, found, rtol=0, atol=eps * size)
        # Parameters hold the anchor rounded, and the rounding of what was added to them.
        assert float(state.info.drift) <= eps * largest


@settings(max_examples=40 * TIMES, deadline=None)
@given(programs)
def test_three_steps_of_any_program(program):
    hides_parameters = program.wrapper in ("masked", "partition")
    assume(not (hides_parameters and program.order == "feature_fn"))
    assume(not (program.wrapper == "inject_hyperparams" and program.rule == "schedule"))
    # Outside of jit apply_if_finite compiles at every call.
    assume(not (program.wrapper == "apply_if_finite" and program.call == "eager"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.config.update("jax_enable_x64", program.dtype == "float64")
        try:
            check_program(program)
        finally:
            jax.config.update("jax_enable_x64", False)
            compiled.forget_in_time()
