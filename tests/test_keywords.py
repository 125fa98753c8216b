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
