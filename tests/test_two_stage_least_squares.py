"""With features that are the data themselves, `cfll.iv` is two-stage least squares (2SLS).

Exogenous covariates that enter linearly are part of both the treatment and the instrument: each is
its own instrument. (A covariate network is for products of treatment and covariate features.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfll import iv

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

VANISHING = 1e-9
WAYS = ("refitted", "proximal", "descend-then-solve", "original")


def columns(params, stats, inputs, *, train):
    """Features without a network: the arrays of a pytree, side by side."""
    return jnp.concatenate(jax.tree.leaves(inputs), axis=1), stats


def coefficients(way, endogenous, exogenous, instruments, outcome):
    """Of endogenous and exogenous regressors and of the intercept, (k,), by `cfll.iv`."""
    nothing = iv.Backbone(columns, params={})
    networks = iv.Networks(treatment=nothing, instrument=nothing)
    batch = iv.IVBatch(
        instrument={"exogenous": exogenous, "instruments": instruments},
        treatment={"endogenous": endogenous, "exogenous": exogenous},
        outcome=outcome,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    still = {"treatment_optimizer": optax.sgd(0.0), "instrument_optimizer": optax.sgd(0.0)}
    if way == "original":
        method = iv.original(networks, **still, beta1=VANISHING, beta2=VANISHING)
    else:
        order = way if way == "descend-then-solve" else "solve-then-descend"
        lams = dict.fromkeys(("lam1", "lam2", "lam12"), VANISHING)
        method = iv.proximal(networks, **still, **lams, order=order, stage1_steps=2)
    state = method.init(batch)
    if way == "refitted":
        halves = [jax.tree.map(lambda a, s=s: a[s::2], batch) for s in (0, 1)]
        head = iv.refit(networks, state, halves, halves, beta=VANISHING).stage2
    else:
        head = jax.jit(method.round)(state, batch, batch)[0].stage2.anchor
    return np.append(head.kernel[:, 0], head.bias)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:2])
def test_generated_data_against_the_closed_form(way):
    rng = np.random.default_rng(0)
    n = 400
    c, z = rng.normal(size=(n, 2)), rng.normal(size=(n, 3))
    hidden = rng.normal(size=(n, 1))
    x = z @ rng.normal(size=(3, 2)) + c @ rng.normal(size=(2, 2)) + hidden
    y = x @ [[2.0], [-1.0]] + c @ [[0.5], [1.0]] + 3 + 4 * hidden
    # beta = (X' P X)^-1 X' P y, with P the projection on exogenous variables and instruments.
    regressors = np.column_stack([x, c, np.ones(n)])
    basis = np.linalg.qr(np.column_stack([c, z, np.ones(n)]))[0]
    fitted = basis @ (basis.T @ regressors)
    expected = np.linalg.solve(fitted.T @ regressors, fitted.T @ y)[:, 0]
    np.testing.assert_allclose(coefficients(way, x, c, z, y), expected, rtol=1e-6)
    naive = np.linalg.lstsq(regressors, y, rcond=None)[0][:, 0]
    assert np.abs(naive[:2] - [2, -1]).max() > 0.5 > 2 * np.abs(expected[:2] - [2, -1]).max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["card", "mroz"])
def test_wages_against_linearmodels(name, way):
    """The return of a year of school: Card (1995), college nearby; Mroz (1987), the parents'."""
    pytest.importorskip("linearmodels")
    from linearmodels.datasets import card, mroz
    from linearmodels.iv import IV2SLS

    if name == "card":
        table = card.load()
        exogenous = ["exper", "expersq", "black", "south", "smsa", "smsa66"]
        exogenous += [f"reg66{k}" for k in range(2, 10)]
        instruments = ["nearc2", "nearc4"]
    else:
        table = mroz.load().dropna(subset=["lwage"])
        exogenous, instruments = ["exper", "expersq"], ["motheduc", "fatheduc"]
    endogenous, exogenous, instruments, outcome = (
        table[names].to_numpy(float) for names in (["educ"], exogenous, instruments, ["lwage"])
    )
    with_ones = np.column_stack([exogenous, np.ones(len(outcome))])
    expected = IV2SLS(outcome, with_ones, endogenous, instruments).fit().params
    expected = np.append(expected.iloc[-1:], expected.iloc[:-1])
    got = coefficients(way, endogenous, exogenous, instruments, outcome)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_bellman_equation_by_instruments_is_solved_as_tables_solve_it():
    """Offline policy evaluation: instrument s, treatment s and s', their features' difference."""
    rng = np.random.default_rng(1)
    discount, n = 0.9, 500
    now = rng.integers(0, 3, n)
    later = (now + rng.integers(0, 2, n)) % 3
    rewards = now + rng.normal(size=n)

    def difference(params, stats, inputs, *, train):
        return inputs["now"] - discount * inputs["later"], stats

    networks = iv.Networks(
        treatment=iv.Backbone(difference, params={}), instrument=iv.Backbone(columns, params={})
    )
    one_hot = np.eye(3)
    batch = iv.IVBatch(
        instrument=one_hot[now],
        treatment={"now": one_hot[now], "later": one_hot[later]},
        outcome=rewards[:, None],
    )
    batch = jax.tree.map(jnp.asarray, batch)
    still = {"treatment_optimizer": optax.sgd(0.0), "instrument_optimizer": optax.sgd(0.0)}
    method = iv.proximal(networks, **still, lam1=1.0, lam2=1.0, use_bias=False)
    state = method.init(batch)
    head = iv.refit(networks, state, [batch], [batch], beta=VANISHING).stage2
    # Where every state was seen, the two stages are the table of frequencies and mean rewards.
    frequencies = np.array(
        [np.bincount(later[now == s], minlength=3) / (now == s).sum() for s in range(3)]
    )
    mean_rewards = np.array([rewards[now == s].mean() for s in range(3)])
    values = np.linalg.solve(np.eye(3) - discount * frequencies, mean_rewards)
    np.testing.assert_allclose(head.kernel[:, 0], values, rtol=1e-6)
    ended = {"now": jnp.asarray(one_hot), "later": jnp.zeros((3, 3))}
    np.testing.assert_allclose(
        iv.predict(networks, state, ended, stage2=head)[:, 0], values, rtol=1e-6
    )
    residuals = one_hot[now] - discount * one_hot[later]
    naive = np.linalg.lstsq(residuals, rewards, rcond=None)[0]  # s' and the residual share noise
    assert np.abs(naive - values).max() > 0.04 * np.abs(values).max()
