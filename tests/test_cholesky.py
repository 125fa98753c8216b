"""Factors that are made in halves, against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfll.solve import cholesky

SIZES = (1, 640, 641, 1400)  # up to 640 they are LAPACK's


def make_matrix(size):
    """Positive definite, condition number about 30; NaN where it is not to be read."""
    rows = np.random.default_rng(size).normal(size=(2 * size, size))
    exact = rows.T @ rows / size
    matrix = np.where(np.tri(size, dtype=bool), exact, np.nan).astype(np.float32)
    return exact, jnp.asarray(matrix)


@pytest.mark.parametrize("size", SIZES)
def test_factor_and_solution_are_exact(size):
    # Tolerances: eps times the condition number, 4e-6, times the largest entries and a margin.
    exact, matrix = make_matrix(size)
    lower = jax.jit(cholesky.cholesky)(matrix)
    np.testing.assert_allclose(lower, np.linalg.cholesky(exact), atol=2e-5)
    assert not np.any(np.triu(lower, 1))
    rhs = np.random.default_rng(0).normal(size=(size, 3))
    found = jax.jit(cholesky.cho_solve)(lower, jnp.asarray(rhs, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.solve(exact, rhs), atol=2e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_matrix_without_a_factor_is_seen(size, where):
    _, matrix = make_matrix(size)
    index = 0 if where == "first" else size - 1
    matrix = matrix.at[index, index].set(-1.0)
    lower, rcond = jax.jit(cholesky.cholesky_with_rcond)(matrix)
    assert np.isnan(lower[-1, -1])
    assert np.isnan(rcond)


def test_many_factors_at_once():
    _, matrix = make_matrix(700)
    alone = jax.jit(cholesky.cholesky)(matrix)
    both = jax.jit(jax.vmap(cholesky.cholesky))(jnp.stack([matrix, 4.0 * matrix]))
    np.testing.assert_allclose(both[0], alone, atol=1e-5)
    np.testing.assert_allclose(both[1], 2.0 * alone, atol=1e-5)
