"""Theorem 1 and 2: the envelope gradient equals automatic differentiation through the solve."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfll

RNG = np.random.default_rng(0)
F, Y = RNG.normal(size=(12, 5)), RNG.normal(size=(12, 3))
ANCHOR = cfll.LinearHead(RNG.normal(size=(5, 3)), RNG.normal(size=3))
WEIGHTS = RNG.uniform(0.5, 2, 12)
LAMS = {"scalar": 0.7, "vector": np.linspace(0.5, 1, 5), "matrix": np.eye(5) + 0.2}


def full_objective(features, targets, anchor, lam, weights, penalize_bias=True):
    """Eq. (12) at Eq. (13), as printed, differentiated through the linear solve."""
    matrix = (
        lam * jnp.eye(5) if jnp.ndim(lam) == 0 else jnp.diag(lam) if jnp.ndim(lam) == 1 else lam
    )
    mu = jnp.trace(matrix) / 5 if penalize_bias else 0.0
    penalty = jnp.zeros((6, 6)).at[:5, :5].set(matrix).at[5, 5].set(mu)
    phi = jnp.concatenate([features, jnp.ones((12, 1))], axis=1)
    previous = jnp.concatenate([anchor.kernel, anchor.bias[None, :]])
    weighted = phi * weights[:, None]
    head = jnp.linalg.solve(phi.T @ weighted + penalty, weighted.T @ targets + penalty @ previous)
    fit = jnp.sum(weights[:, None] * (targets - phi @ head) ** 2)
    step = head - previous
    return (fit + jnp.trace(step.T @ penalty @ step)) / jnp.sum(weights)


@pytest.mark.slow
@pytest.mark.parametrize("penalize_bias", [True, False])
@pytest.mark.parametrize("kind", LAMS)
def test_gradient_equals_differentiation_through_the_solve(x64, kind, penalize_bias):
    def loss(features, targets, anchor, lam, weights):
        return cfll.prox_loss(
            features, targets, anchor, lam, sample_weight=weights, penalize_bias=penalize_bias
        )[0]

    def reference(features, targets, anchor, lam, weights):
        return full_objective(features, targets, anchor, lam, weights, penalize_bias)

    args = jax.tree.map(jnp.asarray, (F, Y, ANCHOR, LAMS[kind], WEIGHTS))
    argnums = (0, 1, 2, 3, 4)  # the envelope theorem holds for all of them
    (value, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f, argnums))(*args) for f in (loss, reference)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        # 1e-5 is the promise; measured: 1e-13. A free bias has no derivative by the anchor's.
        assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want) + 1e-12


def test_ridge_loss_is_theorem_1(x64):
    zero = cfll.LinearHead(jnp.zeros((5, 3)), jnp.zeros(3))

    def reference(features):
        return full_objective(features, jnp.asarray(Y), zero, 0.7, jnp.ones(12))

    (value, grad), (expected, expected_grad) = (
        jax.jit(jax.value_and_grad(f))(jnp.asarray(F))
        for f in (lambda features: cfll.ridge_loss(features, Y, 0.7)[0], reference)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-8, atol=1e-12)


def test_gradient_is_that_of_the_batch_loss_at_the_fixed_head(x64):
    features = jnp.asarray(F)
    (_, head), grad = jax.value_and_grad(cfll.prox_loss, has_aux=True)(features, Y, ANCHOR, 0.7)
    fixed = jax.grad(lambda f: jnp.mean(jnp.sum((Y - head(f)) ** 2, axis=-1)))(features)
    np.testing.assert_allclose(grad, fixed, rtol=1e-12)  # Eq. (16)


def test_second_derivatives_are_right(x64):
    def ours(features):
        return cfll.prox_loss(features, Y, ANCHOR, 0.7)[0]

    def reference(features):
        return full_objective(features, Y, ANCHOR, 0.7, jnp.asarray(WEIGHTS * 0 + 1))

    features, tangent = jnp.asarray(F), jnp.asarray(np.random.default_rng(1).normal(size=F.shape))

    @jax.jit
    def derivatives(features, tangent):
        """Forward and backward, and all four second derivatives that these make."""

        def both(loss):
            def forward(features):
                return jax.jvp(loss, (features,), (tangent,))[1]

            first = forward, jax.grad(loss)
            second = [jax.jvp(f, (features,), (tangent,))[1] for f in first]
            second += [jax.vjp(f, features)[1](f(features))[0] for f in first]
            return [f(features) for f in first], second

        return both(ours), both(reference)

    chex.assert_trees_all_close(*derivatives(features, tangent), rtol=1e-8, atol=1e-10)


def test_no_factorization_in_the_backward_pass():
    features = jnp.asarray(F, jnp.float32)
    targets, anchor = jnp.asarray(Y, jnp.float32), cfll.LinearHead.zeros(5, 3)
    _, backward, _ = jax.vjp(
        lambda f: cfll.prox_loss(f, targets, anchor, 0.7), features, has_aux=True
    )
    jaxpr = str(jax.make_jaxpr(backward)(jnp.ones(())))
    for primitive in ("cholesky", "triangular_solve", "qr", "householder", "eigh", "cond"):
        assert primitive not in jaxpr


def test_the_head_is_a_constant():
    def kernel_sum(features):
        return jnp.sum(cfll.ridge_loss(features, jnp.ones((4, 1)), 1.0)[1].kernel)

    np.testing.assert_array_equal(jax.grad(kernel_sum)(jnp.eye(4)), np.zeros((4, 4)))


def test_bfloat16_features_get_a_bfloat16_gradient():
    features = jnp.asarray(F, jnp.bfloat16)
    targets = jnp.asarray(Y, jnp.float32)
    (loss, _), grad = jax.value_and_grad(cfll.ridge_loss, has_aux=True)(features, targets, 1.0)
    assert (loss.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)


def test_padding_changes_neither_loss_nor_gradient(x64):
    padded = jnp.concatenate([jnp.asarray(F), jnp.full((3, 5), jnp.nan)])
    targets = jnp.concatenate([jnp.asarray(Y), jnp.full((3, 3), jnp.nan)])
    weights = jnp.concatenate([jnp.ones(12), jnp.zeros(3)])

    def loss(features):
        return cfll.prox_loss(features, targets, ANCHOR, 0.7, sample_weight=weights)[0]

    value, grad = jax.jit(jax.value_and_grad(loss))(padded)
    plain = jax.jit(jax.value_and_grad(lambda f: cfll.prox_loss(f, Y, ANCHOR, 0.7)[0]))
    expected, expected_grad = plain(jnp.asarray(F))
    np.testing.assert_allclose(value, expected)
    np.testing.assert_allclose(grad[:12], expected_grad, rtol=1e-10)
    np.testing.assert_array_equal(grad[12:], np.zeros((3, 5)))


def test_errors_reach_the_caller():
    with pytest.raises(ValueError, match=r"targets\[..., None\]"):
        cfll.prox_loss(jnp.ones((4, 2)), jnp.ones(4), cfll.LinearHead.zeros(2, 1), 1.0)
    with pytest.raises(ValueError, match="lam is negative"):
        cfll.prox_loss(jnp.ones((4, 2)), jnp.ones((4, 1)), cfll.LinearHead.zeros(2, 1), -1.0)
    with pytest.raises(ValueError, match="beta is negative"):
        cfll.ridge_loss(jnp.ones((4, 2)), jnp.ones((4, 1)), -1.0)
