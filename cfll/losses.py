r"""prox_loss, ridge_loss: losses whose gradient is Theorem 1 and 2 of the paper.

The loss as a function of the features alone, the head being the closed-form minimizer,

.. math::
    \mathcal L^\star(\phi) = \min_W \mathcal L(W, \phi) = \mathcal L(W^\star(\phi), \phi).

Since :math:`\nabla_W \mathcal L(W^\star, \phi) = 0`, the chain rule's term through the solve is
zero (Eq. (8), envelope theorem), whatever :math:`\mathcal L` is differentiated by. So the head is
solved on inputs that are `constant_at_first_order`: first derivatives contain no solve, and second
derivatives, in which :math:`W^\star(\phi)` counts, are right.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from cfll import samples
from cfll.heads import LinearHead, widest_dtype
from cfll.solve import CG, penalized_solve
from cfll.solve.cholesky import dot
from cfll.solve.problem import as_penalty, bias_penalty_of


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
    parentheses ``lam`` multiplies a *sum*, as in `cfll.prox_solve`. For those who keep the head
    themselves; with an optimizer's state it is the ``loss`` of `cfll.prox`.

    Args:
      features, targets, penalize_bias, sample_weight, solver: as in `cfll.prox_solve`.
      anchor: the head to stay near, :math:`W_t`.
      lam: the proximal coefficient, scalar, (d,) or (d, d).

    Returns:
      The loss, a scalar: mean over samples, sum over outputs, penalty included. And the new head,
      a constant to (first) differentiation.

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
    options: Any = {"penalize_bias": penalize_bias, "sample_weight": sample_weight}
    batch = features, targets, anchor, lam
    fixed, fixed_options = constant_at_first_order((batch, options))
    head, _ = penalized_solve(*fixed, solver=solver, **fixed_options)
    return penalized_loss(head, *batch, **options), head


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
      features, targets, use_bias, penalize_bias, sample_weight, solver: as in `cfll.ridge_solve`.
      beta: the penalty on a *sum* over samples, scalar, (d,) or (d, d).

    Returns:
      The loss, a scalar: mean over samples, sum over outputs, penalty included. And the head, a
      constant to (first) differentiation.

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
    options: Any = {"penalize_bias": penalize_bias, "sample_weight": sample_weight}
    batch = features, targets, None, beta
    fixed, fixed_options = constant_at_first_order((batch, options))
    fixed_options |= {"use_bias": use_bias, "solver": solver, "name": "beta"}
    head, _ = penalized_solve(*fixed, **fixed_options)
    return penalized_loss(head, *batch, **options), head


def penalized_loss(
    head: LinearHead,
    features: jax.Array,
    targets: jax.Array,
    anchor: LinearHead | None = None,
    penalty: jax.typing.ArrayLike = 0.0,
    *,
    penalize_bias: bool = True,
    sample_weight: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Eq. (12) divided by the number of samples, at any head; an anchor of None is zero.

    With an axis_name the part of this device: the mean over the axis is the loss of all samples.
    """
    features, targets = samples.check_batch(features, targets, sample_weight, per_output=True)
    dtype = widest_dtype(head.kernel)
    rows = samples.flatten(features, targets, sample_weight, dtype)
    penalty = as_penalty(penalty, dtype)

    def run(rows: samples.Samples, head: LinearHead, anchor: Any, penalty: jax.Array) -> jax.Array:
        squares = jnp.sum(rows.weigh(jnp.square(rows.targets - head(rows.features))))
        step = head
        if anchor is not None:
            step = jax.tree.map(lambda new, old: new - jnp.asarray(old, dtype), head, anchor)
        distance = _penalty_of(step, penalty, penalize_bias)
        total = rows.total()
        if axis_name is not None:
            total = jax.lax.pmean(total, axis_name)
            distance = distance / jax.lax.psum(1, axis_name)
        return (squares + distance) / jnp.where(total == 0, jnp.ones((), dtype), total)

    run = samples.let_xla_shard(run, rows.features, jax.P())
    return run(rows, head, anchor, penalty)


def _penalty_of(step: LinearHead, penalty: jax.Array, penalize_bias: bool) -> jax.Array:
    """tr(D^T Lambda D) + mu |delta|^2."""
    if penalty.ndim == 2:
        distance = jnp.sum(step.kernel * dot(penalty, step.kernel))
    else:
        per_feature = jnp.sum(jnp.square(step.kernel), axis=-1)
        distance = jnp.sum(per_feature * jnp.broadcast_to(penalty, per_feature.shape))
    bias_penalty = bias_penalty_of(penalty, step.bias is not None, penalize_bias)
    if bias_penalty is None or step.bias is None:
        return distance
    return distance + bias_penalty * jnp.sum(jnp.square(step.bias))


def constant_at_first_order(tree: Any) -> Any:
    """The same tree, whose first derivative is zero, and whose second is not.

    The rule below returns the primal without its mark: what is differentiated once more depends on
    it as usual. `jax.lax.stop_gradient` would be zero for ever.
    """
    return jax.tree.map(lambda x: _first_order_constant(x) if _is_inexact(x) else x, tree)


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


@jax.custom_jvp
def _first_order_constant(x: jax.Array) -> jax.Array:
    return x


def _zero_tangent(primals: tuple[jax.Array], tangents: Any) -> tuple[jax.Array, Any]:
    (x,) = primals
    return x, SymbolicZero(jax.typeof(x).to_tangent_aval())


_first_order_constant.defjvp(_zero_tangent, symbolic_zeros=True)
