"""The two orders of a two-stage update: what is solved where, and how often networks are asked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll
from cfll import iv
from tests.halving import halving

RATE, LAM1, LAM2, LAM12 = 0.05, 2.0, 3.0, 0.5


def make_batch(seed, n=24):
    rng = np.random.default_rng(seed)
    z, hidden = rng.normal(size=(2, n, 1))
    return iv.IVBatch(*map(jnp.asarray, (z, z + hidden, np.sin(z + hidden) + hidden)))


def make_networks(calls=None):
    rng = np.random.default_rng(3)

    def backbone(name, width):
        def apply(params, stats, inputs, *, train):
            if calls is not None:
                calls.append((name, train))
            return jnp.tanh(inputs @ params), stats

        return iv.Backbone(apply, jnp.asarray(rng.normal(size=(1, width))))

    return iv.Networks(treatment=backbone("treatment", 4), instrument=backbone("instrument", 5))


def make_method(networks, **options):
    sgd = optax.sgd(RATE)
    optimizers = {"treatment_optimizer": sgd, "instrument_optimizer": sgd}
    penalties = {"lam1": LAM1, "lam2": LAM2, "lam12": LAM12}
    return iv.proximal(networks, **{**optimizers, **penalties, **options})


def solve_by_hand(phi, y, w, lam):
    """Eq. (13) with the bias as one more row of w."""
    phi = jnp.concatenate([phi, jnp.ones((len(phi), 1))], axis=1)
    return w + jnp.linalg.solve(phi.T @ phi + lam * jnp.eye(len(w)), phi.T @ (y - phi @ w))


def outputs(phi, w):
    return phi @ w[:-1] + w[-1:]


def mean_square(residual):
    return jnp.mean(jnp.sum(residual**2, axis=-1))


@pytest.mark.slow
def test_a_run_in_the_order_of_equation_17_equals_its_transcription(x64):
    networks, batch1, batch2 = make_networks(), make_batch(0), make_batch(1)
    method = make_method(networks, stage1_steps=3, stage2_steps=2)
    state, _ = jax.jit(method.round)(method.init(batch1), batch1, batch2)

    a, b = networks.instrument.params, networks.treatment.params
    w1, w2 = jnp.zeros((6, 4)), jnp.zeros((5, 1))
    psi = jnp.tanh(batch1.treatment @ b)
    for _ in range(3):
        w1 = solve_by_hand(jnp.tanh(batch1.instrument @ a), psi, w1, LAM1)
        a = a - RATE * jax.grad(
            lambda a, w: mean_square(psi - outputs(jnp.tanh(batch1.instrument @ a), w))
        )(a, w1)

    def predicted(b, w1):  # of E[psi(x) | z] on the second batch, by a head that depends on b
        psi = jnp.tanh(batch1.treatment @ b)
        inner = solve_by_hand(jnp.tanh(batch1.instrument @ a), psi, w1, LAM12)
        return outputs(jnp.tanh(batch2.instrument @ a), inner)

    for _ in range(2):
        w2 = solve_by_hand(predicted(b, w1), batch2.outcome, w2, LAM2)
        b = b - RATE * jax.grad(
            lambda b, w: mean_square(batch2.outcome - outputs(predicted(b, w1), w))
        )(b, w2)

    got = (
        state.instrument.params,
        state.treatment.params[0],
        jnp.concatenate([state.stage1.anchor.kernel, state.stage1.anchor.bias[None]]),
        jnp.concatenate([state.stage2.anchor.kernel, state.stage2.anchor.bias[None]]),
    )
    chex.assert_trees_all_close(got, (a, b, w1, w2), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("order", "passes"), [("solve-then-descend", 1), ("descend-then-solve", 2)]
)
def test_forward_passes_of_the_treatment_network(order, passes):
    calls = []
    method = make_method(make_networks(calls), order=order)
    state = method.init(make_batch(0))
    calls.clear()
    jax.eval_shape(method.stage2, state, make_batch(0), make_batch(1))
    assert calls.count(("treatment", True)) == passes


def test_rules_and_schedules_move_in_both_stages():
    schedule = optax.linear_schedule(1.0, 21.0, 20)
    for order in ("solve-then-descend", "descend-then-solve"):
        method = make_method(make_networks(), lam1=schedule, lam2=halving(64.0), order=order)
        state = method.init(make_batch(0))
        for _ in range(3):
            state, _ = jax.jit(method.round)(state, make_batch(0), make_batch(1))
        np.testing.assert_allclose(state.stage1.lam, schedule(59), rtol=1e-6)
        assert float(state.stage2.lam) < 64.0
        assert int(state.stage2.count) == 3
        assert 0 < float(state.stage1.info.rcond) < 1
        assert str(cfll.Route(state.stage2.info.route)) == "primal"


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.sgd(RATE), optax.contrib.reduce_on_plateau(patience=1)),
        optax.lbfgs(),
        optax.polyak_sgd(RATE),
    ],
    ids=["reduce_on_plateau", "lbfgs", "polyak_sgd"],
)
def test_optimizers_that_ask_for_the_loss_are_told(optimizer, standard_promotion):
    options = {"treatment_optimizer": optimizer, "instrument_optimizer": optimizer}
    batch = make_batch(0)
    for method in (
        make_method(make_networks(), **options),
        iv.original(make_networks(), **options, beta1=1.0, beta2=1.0),
    ):
        state, losses = method.init(batch), []
        stage1 = jax.jit(method.stage1)
        for _ in range(6):
            state, loss = stage1(state, batch)
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        _, loss = jax.jit(method.stage2)(state, batch, batch)
        assert np.isfinite(loss)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="write 'solve-then-descend' or 'descend-then-solve'"):
        make_method(make_networks(), order="Eq. (17)")
