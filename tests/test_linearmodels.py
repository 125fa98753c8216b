"""Refitted heads on identity features against linearmodels' 2SLS, on its two textbook data sets."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfll import iv

CARD = [
    "exper",
    "expersq",
    "black",
    "smsa",
    "south",
    "smsa66",
    *(f"reg66{i}" for i in range(2, 10)),
]
CASES = {
    "card": ("lwage", "educ", ["nearc4"], CARD),
    "mroz": ("lwage", "educ", ["motheduc", "fatheduc"], ["exper", "expersq"]),
}


@pytest.mark.parametrize("name", CASES)
def test_refitted_heads_are_two_stage_least_squares(x64, name):
    iv2sls = pytest.importorskip("linearmodels.iv").IV2SLS
    data_set = pytest.importorskip(f"linearmodels.datasets.{name}")
    outcome, endogenous, instruments, exogenous = CASES[name]
    table = data_set.load()
    table = table[[outcome, endogenous, *instruments, *exogenous]].dropna().astype(float)
    table.insert(0, "const", 1.0)
    expected = iv2sls(
        table[outcome], table[["const", *exogenous]], table[[endogenous]], table[instruments]
    ).fit()

    def identity(params, stats, inputs, *, train):
        return inputs * params, stats

    net = iv.Backbone(identity, jnp.ones(()))
    networks = iv.Networks(treatment=net, instrument=net)
    # Controls are their own instruments: they are treatments that stage 1 predicts exactly.
    columns = ([*instruments, *exogenous], [endogenous, *exogenous], [outcome])
    data = iv.IVBatch(*(jnp.asarray(table[each].to_numpy()) for each in columns))
    batches = [iv.IVBatch(*(array[i::3] for array in data[:3])) for i in range(3)]
    sgd = {"treatment_optimizer": optax.sgd(0.1), "instrument_optimizer": optax.sgd(0.1)}
    state = iv.original(networks, **sgd, beta1=1.0, beta2=1.0).init(data)
    head = iv.refit(networks, state, batches, batches, beta=1e-9).stage2
    coefficients = expected.params[[endogenous, *exogenous, "const"]]
    ours = np.append(head.kernel[:, 0], head.bias)
    np.testing.assert_allclose(ours, coefficients, rtol=1e-6, atol=1e-9)
