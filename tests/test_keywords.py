"""No keyword of a training step is lost on its way, in linen and in NNX."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import cfll
import cfll.flax

X, Y = jnp.linspace(0, 1, 24).reshape(8, 3), jnp.linspace(1, 2, 8)[:, None]
RULE = cfll.prox(1.0)


class Linen(nn.Module):
    def setup(self):
        self.hidden, self.norm, self.head = nn.Dense(4), nn.BatchNorm(), nn.Dense(1)

    def features(self, x, train):
        return nn.tanh(self.norm(self.hidden(x), use_running_average=not train))

    def __call__(self, x, train):
        return self.head(self.features(x, train))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def features(self, x):
        return nnx.tanh(self.hidden(x))


def linen_step(optimizer, **keywords):
    """One step in the Eq. (17) order; the statistics are given and further keywords, too."""
    net = Linen()
    variables = net.init(jax.random.key(0), X, train=True)
    state = cfll.flax.TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=optimizer,
        batch_stats=variables["batch_stats"],
    )

    def loss_fn(params):
        both = {"params": params, "batch_stats": state.batch_stats}
        features, new = state.apply_fn(
            both, X, method="features", train=True, mutable=["batch_stats"]
        )
        loss, solution = RULE.loss(features, Y, cfll.get_state(state))
        return loss, (solution, new["batch_stats"])

    grads, (solution, stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, solution=solution, batch_stats=stats, **keywords)


def nnx_step(optimizer, **keywords):
    model = Nnx(nnx.Rngs(0))
    optimizer = cfll.flax.Optimizer(model, optimizer, wrt=nnx.Param)
    head = cfll.get_state(optimizer)
    grads, solution = nnx.grad(lambda m: RULE.loss(m.features(X), Y, head), has_aux=True)(model)
    optimizer.update(model, grads, solution=solution, **keywords)
    return optimizer


STEPS = {"linen": linen_step, "nnx": nnx_step}
PLAIN = cfll.closed_form(optax.sgd(0.1), RULE)


@pytest.mark.parametrize("framework", STEPS)
@pytest.mark.parametrize("keyword", ["batch_stat", "sample_weights", "value"])
def test_a_keyword_that_nobody_takes_is_an_error(standard_promotion, framework, keyword):
    with pytest.raises(TypeError, match=f"the keyword {keyword} is neither"):
        STEPS[framework](PLAIN, **{keyword: 1.0})


def mine(updates, state, params=None, *, temperature, **extra):
    del params, extra
    return jax.tree.map(lambda update: update * temperature, updates), state


INJECTED = optax.inject_hyperparams(lambda rate: optax.chain(optax.scale(rate), OWN))
OWN = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), mine)


@pytest.mark.parametrize("framework", STEPS)
@pytest.mark.parametrize(
    ("make", "keywords"),
    [
        (lambda: optax.contrib.reduce_on_plateau(), {"value": 1.0}),
        (lambda: OWN, {"temperature": 0.5}),
        (lambda: optax.masked(OWN, lambda tree: True), {"temperature": 1}),
        (lambda: OWN._replace(update=partial(mine)), {"temperature": 1}),
        (lambda: INJECTED(rate=1.0), {"temperature": 1}),
    ],
)
def test_a_keyword_that_somebody_takes_arrives(standard_promotion, framework, make, keywords):
    tx = optax.chain(make(), PLAIN)
    state = cfll.get_state(STEPS[framework](tx, **keywords))
    assert bool(state.info.accepted)
    assert int(state.count) == 1


@pytest.mark.parametrize("framework", STEPS)
def test_through_multi_steps_and_plain_wrappers(standard_promotion, framework):
    for tx in (
        optax.MultiSteps(PLAIN, 1),
        optax.MultiSteps(PLAIN, 1).gradient_transformation(),
        optax.inject_hyperparams(lambda lam: cfll.closed_form(optax.sgd(0.1), cfll.prox(lam)))(1.0),
        optax.apply_if_finite(PLAIN, 3),
    ):
        assert int(cfll.get_state(STEPS[framework](tx)).count) == 1


def test_a_line_search_takes_what_its_function_takes(standard_promotion):
    tx = optax.chain(
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=3),
        cfll.closed_form_head(RULE),
    )
    taken = cfll.keywords.parameters_of([tx.update])
    assert {"value", "grad", "value_fn", "solution"} <= taken


def test_statistics_move_once():
    state = linen_step(PLAIN)
    assert float(jnp.abs(state.batch_stats["norm"]["mean"]).max()) > 0


PARAMS = {"w": jnp.eye(3), "a": {"kernel": jnp.zeros((3, 1))}, "b": {"kernel": jnp.zeros((3, 1))}}


@pytest.mark.parametrize("name", ["sample_weight", "solution"])
def test_an_address_without_a_head_is_refused(name):
    inner = cfll.closed_form(optax.sgd(0.1), RULE, "a")
    tx = cfll.closed_form(inner, RULE, "b")
    state = tx.init(PARAMS)
    if name == "solution":
        keywords = {key: RULE.loss(X, Y, cfll.get_state(state, key))[1] for key in "ab"}
        right, wrong = {"solution": keywords}, {"solution": {**keywords, "c": keywords["a"]}}
    else:
        right = {"targets": Y, "features": X, "sample_weight": {("b",): jnp.zeros(8)}}
        wrong = {**right, "sample_weight": {"c": jnp.zeros(8)}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS, **right)
    assert jnp.any(updates["a"]["kernel"])
    assert jnp.any(updates["b"]["kernel"]) == (name == "solution")  # weights of zero: no data
    with pytest.raises(TypeError, match=f"{name} is a dictionary with the key 'c'"):
        tx.update(PARAMS, state, PARAMS, **wrong)


def test_variables_of_nnx_are_arrays_everywhere():
    model = Nnx(nnx.Rngs(0))
    tx = optax.inject_hyperparams(lambda lam: cfll.closed_form(optax.sgd(0.1), cfll.prox(lam)))
    optimizer = cfll.flax.Optimizer(model, tx(lam=2.0), wrt=nnx.Param)
    features, state = model.features(X), cfll.get_state(optimizer)
    expected = cfll.prox_solve(features, Y, state.anchor, 2.0).kernel

    lam = optimizer.opt_state.hyperparams["lam"]
    assert callable(lam)  # and no schedule
    anchor = cfll.LinearHead(model.head.kernel, model.head.bias)
    stats = cfll.GramStats.zeros(4, 1).add(features, Y)
    for kernel in (
        cfll.prox(lam).loss(features, Y, state)[1].head.kernel,
        cfll.prox_solve(features, Y, anchor, lam).kernel,
        stats.prox(anchor, lam).kernel,
    ):
        assert jnp.allclose(kernel, expected, rtol=1e-4)
    (one, _), (two, _) = (cfll.bayesian_ridge(stats, head) for head in (anchor, state.anchor))
    assert jnp.allclose(one.head.kernel, two.head.kernel)
    loss, _ = cfll.poisson(lam).loss(features, Y, state)
    assert loss == cfll.poisson(2.0).loss(features, Y, state)[0]
