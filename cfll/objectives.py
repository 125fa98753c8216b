r"""prox_loss, ridge_loss: losses whose gradient is Theorem 1 and 2 of the paper.

The loss as a function of the features alone, the head being the closed-form minimizer,

.. math::
    \mathcal L^\star(\phi) = \min_W \mathcal L(W, \phi) = \mathcal L(W^\star(\phi), \phi).

Since :math:`\nabla_W \mathcal L(W^\star, \phi) = 0`, the chain rule's term through the solve is
zero (Eq. (8), envelope theorem), whatever :math:`\mathcal L` is differentiated by:

.. math:: \mathrm d \mathcal L^\star = \partial \mathcal L(W, \cdot)|_{W = W^\star}.

So the derivative rule below holds for features, targets, anchor, penalty and weights alike. It is
itself a function of :math:`W^\star(\phi)`, which `cfll.solve` knows how to differentiate:
second derivatives are right, too, and first derivatives contain no solve.
"""

from functools import partial

import jax
import jax.numpy as jnp

from cfll import _checks, solve
from cfll.cg import CG
from cfll.cholesky import dot
from cfll.heads import LinearHead, widest_dtype


def prox_loss(
    features: jax.Array,
    targets: jax.Array,
    anchor: LinearHead,
    lam: jax.typing.ArrayLike,
    *,
    penalize_bias: bool = True,
    sample_weight: jax.Array | None = None,
    solver: str | CG = "auto",
) -> tuple[jax.Array, LinearHead]:
    r"""The proximal loss at its own best head, Eq. (14), and that head, Eq. (13).

    .. math::
        \frac{1}{\sum_i w_i} \Big( \sum_i w_i \|y_i - W^{\star\top} \phi_i\|^2
        + \lambda \|W^\star - W_t\|_F^2 \Big)

    The gradient is that of the batch's loss at the fixed head (Theorem 2). Both are divided by the
    number of samples, so that learning rates do not depend on the batch size; inside the
    parentheses ``lam`` multiplies a *sum*, as in `cfll.prox_solve`.

    Args:
      features: (..., d), as in `cfll.prox_solve`.
      targets: (..., o).
      anchor: the head to stay near, :math:`W_t`.
      lam: the proximal coefficient, scalar, (d,) or (d, d).
      penalize_bias: as in `cfll.prox_solve`.
      sample_weight: as in `cfll.prox_solve`.
      solver: as in `cfll.prox_solve`.

    Returns:
      The loss, a scalar: mean over samples, sum over outputs, penalty included. And the new head,
      a constant to differentiation: pass it on as ``solution``.

    Raises:
      ValueError, TypeError: while tracing, as in `cfll.prox_solve`.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> features, targets = jnp.eye(2), jnp.array([[1.0], [3.0]])
      >>> anchor = LinearHead.zeros(2, 1, use_bias=False)
      >>> (loss, head), grad = jax.value_and_grad(prox_loss, has_aux=True)(
      ...     features, targets, anchor, 1.0)
      >>> print(f"{loss:.3f}", np.asarray(head.kernel).round(3).ravel())
      2.500 [0.5 1.5]

    References:
      Closed-Form Last Layer Optimization, Eq. (12) to (16), Theorem 2.
    """
    options = (penalize_bias, solver, "lam")
    return _at_best_head(options, features, targets, anchor, lam, sample_weight)


def ridge_loss(
    features: jax.Array,
    targets: jax.Array,
    beta: jax.typing.ArrayLike,
    *,
    use_bias: bool = True,
    penalize_bias: bool = True,
    sample_weight: jax.Array | None = None,
    solver: str | CG = "auto",
) -> tuple[jax.Array, LinearHead]:
    r"""The ridge loss at its own best head, Eq. (5), and that head, Eq. (2).

    .. math::
        \frac{1}{\sum_i w_i} \Big( \sum_i w_i \|y_i - W^{\star\top} \phi_i\|^2
        + \beta \|W^\star\|_F^2 \Big)

    Args:
      features: (..., d), as in `cfll.ridge_solve`.
      targets: (..., o).
      beta: the penalty on a *sum* over samples, scalar, (d,) or (d, d).
      use_bias: fit an intercept.
      penalize_bias: as in `cfll.ridge_solve`.
      sample_weight: as in `cfll.ridge_solve`.
      solver: as in `cfll.ridge_solve`.

    Returns:
      The loss, a scalar: mean over samples, sum over outputs, penalty included. And the head, a
      constant to differentiation.

    Raises:
      ValueError, TypeError: while tracing, as in `cfll.ridge_solve`.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> loss, head = ridge_loss(jnp.eye(2), jnp.array([[1.0], [3.0]]), 1.0, use_bias=False)
      >>> print(f"{loss:.3f}", np.asarray(head.kernel).round(3).ravel())
      2.500 [0.5 1.5]

    References:
      Closed-Form Last Layer Optimization, Eq. (5) to (9), Theorem 1.
    """
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    _checks.check_batch(features, targets)
    zero = LinearHead.zeros(features.shape[-1], targets.shape[-1], use_bias)
    options = (penalize_bias, solver, "beta")
    return _at_best_head(options, features, targets, zero, beta, sample_weight)


def _best_head(options, features, targets, anchor, penalty, sample_weight):
    penalize_bias, solver, name = options
    return solve.penalized_solve(
        features,
        targets,
        anchor,
        penalty,
        penalize_bias=penalize_bias,
        sample_weight=sample_weight,
        solver=solver,
        name=name,
    )[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _at_best_head(options, *args):
    head = _best_head(options, *args)
    return _objective(options[0], head, *args), head


@_at_best_head.defjvp
def _at_best_head_jvp(options, primals, tangents):
    head = _best_head(options, *primals)
    loss, dloss = jax.jvp(partial(_objective, options[0], head), primals, tangents)
    return (loss, head), (dloss, jax.tree.map(jnp.zeros_like, head))


def _objective(penalize_bias, head, features, targets, anchor, penalty, sample_weight):
    """Eq. (12) divided by the number of samples, at any head."""
    dtype = widest_dtype(head.kernel)
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    samples = features.shape[:-1]
    features = features.astype(dtype).reshape(-1, features.shape[-1])
    targets = targets.astype(dtype).reshape(-1, targets.shape[-1])
    total = jnp.full((), max(features.shape[0], 1), dtype)
    if sample_weight is not None:
        weights = solve.expand_weights(jnp.asarray(sample_weight, dtype), samples)
        features = solve.drop_absent(features, weights)
        targets = solve.drop_absent(targets, weights)
        total = jnp.sum(weights)
        total = jnp.where(total == 0, jnp.ones((), dtype), total)

    squares = jnp.sum(jnp.square(targets - head(features)), axis=-1)
    if sample_weight is not None:
        squares = squares * weights

    step = jax.tree.map(lambda new, old: new - jnp.asarray(old, dtype), head, anchor)
    penalty = jnp.asarray(penalty, dtype)
    if penalty.ndim == 2:
        distance = jnp.sum(step.kernel * dot(penalty, step.kernel))
    else:
        per_feature = jnp.sum(jnp.square(step.kernel), axis=-1)
        distance = jnp.sum(per_feature * jnp.broadcast_to(penalty, per_feature.shape))
    bias_penalty = solve.bias_share(penalty, step.bias is not None, penalize_bias)
    if bias_penalty is not None:
        distance += bias_penalty * jnp.sum(jnp.square(step.bias))
    return (jnp.sum(squares) + distance) / total
