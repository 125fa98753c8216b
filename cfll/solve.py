r"""ridge_solve, prox_solve: regularized least squares on arrays; knows no optimizer.

Everything here is one problem. With weights :math:`w_i` (one if absent), an anchor
:math:`(W_t, b_t)` (zero for ridge) and residuals :math:`r_i = y_i - W_t^\top \phi_i - b_t`, the
*correction* :math:`(D, \delta)` minimizes

.. math::
    \sum_i w_i \|r_i - D^\top \phi_i - \delta\|^2 + \mathrm{tr}(D^\top \Lambda D) + \mu \|\delta\|^2

and the head is anchor plus correction: Eq. (13) of the paper, better conditioned. With
:math:`\tilde\phi = (\phi, 1)`, the normal equations are :math:`A x = \tilde\Phi^\top S r` with
:math:`A = \tilde\Phi^\top S \tilde\Phi + \mathrm{diag}(\Lambda, \mu)` and :math:`S = \mathrm{diag}
(w)`. These routes lead to the solution:

``primal``
    Cholesky of :math:`A`, of size d + 1. The ones column of :math:`\tilde\Phi` is never built: the
    Gram matrix is bordered with the sums of the features.
``dual``
    Cholesky of :math:`C = I + S^{1/2} \Phi \Lambda^{-1} \Phi^\top S^{1/2}`, of size n, and
    :math:`D = \Lambda^{-1} \Phi^\top S^{1/2} \alpha` with :math:`C \alpha = S^{1/2} (r - \delta)`.
    The bias is eliminated: it costs one more right-hand side.
``qr``
    QR of the stacked matrix :math:`(S^{1/2} \tilde\Phi; \mathrm{diag}(\Lambda, \mu)^{1/2})`, whose
    condition number is the square root of that of :math:`A`, and the singular values of R.
``cg``
    No factorization: conjugate gradients on :math:`A`, which is only ever multiplied with. See
    `cfll.CG`, which also sets when to stop.
``auto``
    primal or dual by shape, which is known while tracing, guarded by the pivots of the factor.

Guard. The relative error of Cholesky's answer is at most about eps / ``rcond``, an estimate by
`cfll.cholesky`. By its size, that answer is taken as it is, or after at most one or three steps of
iterative refinement with residuals from the data, or (``auto`` only) thrown away for the ``qr``
route. `_LEVELS` has the numbers. That bound is for the worst targets; how much the next step of
refinement would change says what these targets got. So refinement stops when that is nothing beside
the head, which is anchor plus correction; of many outputs a few random combinations are asked
first, since a step for all of them costs as much as the solve.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfll import _checks
from cfll.cg import CG, conjugate_gradients
from cfll.cholesky import cho_solve, cholesky, cholesky_with_rcond, dot, lower_gram
from cfll.heads import LinearHead, widest_dtype

# Codes in SolveInfo.route. "given": the caller solved; "eigh": from sums, see stats.py.
ROUTES = ("primal", "dual", "qr", "eigh", "given", "cg")

# rcond, in multiples of the machine epsilon, below which (0) at most one step of refinement, (1)
# three, (2) QR. In float32: 2e-3, 1.2e-4, 6e-6. A step multiplies the error by about eps / rcond.
_LEVELS = (2e4, 1e3, 5e1)
_STEPS = (0, 1, 3)
# A step of refinement that changes no more of the solution than this, in multiples of the machine
# epsilon and the root mean square over outputs, is not needed.
_SETTLED = 300
# How many combinations of the outputs are refined to see that. Errors may all point one way, and
# then their square has a chi-squared distribution with as many degrees of freedom: with 8 it is
# taken for less than 1 / 25 of itself once in 40,000 times.
_PROBES = 8
# Below this, refinement is what makes the answer: who has sums and no data cannot solve.
SINGULAR = 1e2
# What the qr route takes for rounding, in multiples of the machine epsilon.
_NOISE = 32


class SolveInfo(NamedTuple):
    """How a head was solved.

    Attributes:
      route: int32 scalar, index into `cfll.solve.ROUTES`.
      rcond: float32 scalar, estimate of the reciprocal condition number of the penalized system
        scaled to unit diagonal, as seen by rounding: a solve without refinement errs by about
        1e-7 / rcond in float32, and below 1e-5 the system is close to singular. NaN if Cholesky
        failed, 1 where there was none.
      iterations: int32 scalar, of ``cg``; 0 for the others.
      residual: float32 scalar, what ``cg`` left of the residual at the anchor, the worst output, in
        the norm of the preconditioner; 0 for the others. Above the tolerance: it was not finished.
    """

    route: jax.Array
    rcond: jax.Array
    iterations: Any = np.int32(0)
    residual: Any = np.float32(0)


def given() -> SolveInfo:
    """The diagnostics of a head that was not solved here, of any shape.

    Args:
      None.

    Returns:
      Scalars: route "given" (int32), reciprocal condition number 1 (float32), no iterations
      (int32), no residual (float32).

    Examples:
      >>> ROUTES[given().route]
      'given'
    """
    return SolveInfo(jnp.int32(ROUTES.index("given")), jnp.float32(1), jnp.int32(0), jnp.float32(0))


def ridge_solve(
    features: jax.Array,
    targets: jax.Array,
    beta: jax.typing.ArrayLike,
    *,
    use_bias: bool = True,
    penalize_bias: bool = True,
    sample_weight: jax.Array | None = None,
    solver: str | CG = "auto",
) -> LinearHead:
    r"""The ridge head of a batch.

    .. math::
        W^\star = \arg\min_{W, b} \sum_i w_i \|y_i - W^\top \phi_i - b\|^2
        + \beta \|W\|_F^2 + \beta \|b\|^2

    which is Eq. (2) with the bias as one more weight. ``beta`` multiplies a *sum* over samples.

    Args:
      features: (..., d), any float dtype; all leading axes are samples. bfloat16 and float16 are
        accumulated and solved in float32, float64 stays float64.
      targets: (..., o), floats, the same leading axes. One-hot for classification.
      beta: the penalty, in units of features squared times samples: a scalar, (d,) per feature, or
        a symmetric positive semi-definite (d, d). The bias takes the mean of its diagonal.
      use_bias: fit an intercept.
      penalize_bias: whether the intercept is penalized as the paper does; ``False`` leaves it free,
        as scikit-learn does.
      sample_weight: weights of the samples, shape of the leading axes or of the first of them. A
        row of weight zero is a row that is not there, even if it holds NaN.
      solver: "auto", "primal", "dual", "qr" or "cg"; see the module's docstring. Only "auto"
        guards against singular systems; the others answer NaN where they fail. `cfll.CG` is "cg"
        with options.

    Returns:
      The head, float32 or float64. Data-dependent trouble (NaN in, negative traced penalty) is NaN.

    Raises:
      ValueError, TypeError: while tracing, for shapes, dtypes and concrete values that do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> features = jnp.array([[0.0], [1.0], [2.0]])
      >>> head = ridge_solve(features, 3 * features + 1, beta=1e-6)
      >>> print(head(jnp.array([10.0])).round(2))
      [31.]

    References:
      Closed-Form Last Layer Optimization, Eq. (2) and (11).
    """
    return penalized_solve(
        features,
        targets,
        None,
        beta,
        use_bias=use_bias,
        penalize_bias=penalize_bias,
        sample_weight=sample_weight,
        solver=solver,
        name="beta",
    )[0]


def prox_solve(
    features: jax.Array,
    targets: jax.Array,
    anchor: LinearHead,
    lam: jax.typing.ArrayLike,
    *,
    penalize_bias: bool = True,
    sample_weight: jax.Array | None = None,
    solver: str | CG = "auto",
) -> LinearHead:
    r"""The proximal head of a batch: the best head near the previous one.

    .. math::
        W^\star = \arg\min_W \sum_i w_i \|y_i - W^\top \phi_i\|^2 + \lambda \|W - W_t\|_F^2
        = W_t + (\Phi^\top \Phi + \lambda I)^{-1} \Phi^\top (Y - \Phi W_t)

    which is Eq. (13), solved for the correction. ``lam`` multiplies a *sum* over samples. A bias
    is fitted if and only if ``anchor`` has one.

    Args:
      features: (..., d), as in `ridge_solve`.
      targets: (..., o), as in `ridge_solve`.
      anchor: the head to stay near, kernel (d, o).
      lam: the proximal coefficient, in units of features squared times samples: a scalar, (d,)
        per feature, or a symmetric positive semi-definite (d, d). The bias takes the mean of its
        diagonal.
      penalize_bias: whether the bias is kept near the anchor's; ``False`` refits it freely.
      sample_weight: as in `ridge_solve`.
      solver: as in `ridge_solve`.

    Returns:
      The head, float32 or float64.

    Raises:
      ValueError, TypeError: while tracing, as in `ridge_solve`.

    Examples:
      >>> import jax.numpy as jnp
      >>> features, targets = jnp.eye(2), jnp.array([[1.0], [3.0]])
      >>> anchor = LinearHead(jnp.array([[1.0], [1.0]]))
      >>> print(prox_solve(features, targets, anchor, lam=1.0).kernel.round(3))
      [[1.]
       [2.]]

    References:
      Closed-Form Last Layer Optimization, Eq. (12) and (13); as a Kalman filter, Appendix A.
    """
    return penalized_solve(
        features,
        targets,
        anchor,
        lam,
        penalize_bias=penalize_bias,
        sample_weight=sample_weight,
        solver=solver,
    )[0]


def penalized_solve(
    features: jax.Array,
    targets: jax.Array,
    anchor: LinearHead | None,
    penalty: jax.typing.ArrayLike,
    *,
    use_bias: bool = True,
    penalize_bias: bool = True,
    sample_weight: jax.Array | None = None,
    solver: str | CG = "auto",
    name: str = "lam",
) -> tuple[LinearHead, SolveInfo]:
    """`prox_solve` with its diagnostics: what a rule calls.

    Args:
      features: (..., d), as in `ridge_solve`.
      targets: (..., o), as in `ridge_solve`.
      anchor: the head to stay near; None for ridge: the same as zeros, but no product with them.
      penalty: scalar, (d,) or (d, d), multiplying a sum over samples.
      use_bias: without an anchor, whether to fit a bias; an anchor says so itself.
      penalize_bias: as in `prox_solve`.
      sample_weight: as in `ridge_solve`.
      solver: as in `ridge_solve`.
      name: what the caller calls the penalty, for messages.

    Returns:
      The head and the `SolveInfo`: the route taken and the condition estimate.

    Raises:
      ValueError, TypeError: while tracing, as in `ridge_solve`.

    Examples:
      >>> import jax.numpy as jnp
      >>> twins = jnp.ones((8, 2))  # two equal features and next to no penalty: singular
      >>> head, info = penalized_solve(twins, twins[:, :1], None, 1e-9, use_bias=False)
      >>> print(ROUTES[info.route], head.kernel.round(3).ravel())
      qr [0.5 0.5]
    """
    _checks.check_solver(solver)
    options = solver if isinstance(solver, CG) else CG()
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    _checks.check_batch(features, targets)
    samples, d, o = features.shape[:-1], features.shape[-1], targets.shape[-1]
    if anchor is not None:
        _checks.check_anchor(anchor, d, o)

    dtype = widest_dtype(features, targets, *([] if anchor is None else [anchor.kernel]))
    features = features.astype(dtype).reshape(-1, d)
    targets = targets.astype(dtype).reshape(-1, o)
    if anchor is not None:
        anchor = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), anchor)
    rows = features.shape[0]

    weights = None
    if sample_weight is not None:
        _checks.check_weights(sample_weight, samples)
        weights = expand_weights(jnp.asarray(sample_weight, dtype), samples)
        features, targets = drop_absent(features, weights), drop_absent(targets, weights)

    has_bias = use_bias if anchor is None else anchor.bias is not None
    _checks.check_penalty(name, penalty, d, rows, has_bias and not penalize_bias)
    penalty = as_penalty(penalty, dtype)
    bias_penalty = bias_share(penalty, has_bias, penalize_bias)

    system = _System(features, weights, penalty, bias_penalty)
    if solver == "auto":
        # A matrix penalty would need a factor of its own in the dual, and n = 0 has no dual at all.
        small = 0 < rows < d and penalty.ndim < 2
        route, guarded = ("dual" if small else "primal"), True
    elif isinstance(solver, CG):
        route, guarded = "cg", False
    else:
        route, guarded = ("primal" if rows == 0 and solver == "dual" else solver), False
    info: Any = SolveInfo(*(jax.P() for _ in SolveInfo._fields))  # type: ignore[arg-type]
    like: Any = LinearHead(jax.P(), jax.P() if has_bias else None)  # type: ignore[arg-type]
    if anchor is not None:
        like = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, anchor)
    out_specs = (like, info)
    plan = _Plan(route, guarded, options)
    run = in_auto_mode(partial(_correct, plan), features, out_specs)
    return run(system, targets, anchor)


class _Plan(NamedTuple):
    """What is decided while tracing."""

    route: str
    guarded: bool
    options: CG  # of the route "cg"


def _correct(
    plan: _Plan, system: "_System", targets: jax.Array, anchor: LinearHead | None
) -> tuple[LinearHead, SolveInfo]:
    factor = _factorize(plan, jax.lax.stop_gradient(system))
    residual = targets if anchor is None else targets - anchor(system.features)
    if plan.route == "dual":
        # Its alpha is about lam / |features|^2 of the residual, and must not vanish: solve in units
        # in which the residual is one. Elsewhere that would only cost devices one more message.
        unit = jax.lax.stop_gradient(_power_of_two(residual))
        near = None if anchor is None else _scale(anchor, 1 / unit)
        correction, effort = _solve(plan, factor, system, residual / unit, near)
        correction = _scale(correction, unit)
    else:
        correction, effort = _solve(plan, factor, system, residual, anchor)
    head = correction if anchor is None else jax.tree.map(jnp.add, anchor, correction)
    code = jnp.where(
        factor.level == len(_STEPS), ROUTES.index("qr"), ROUTES.index(plan.route)
    ).astype(jnp.int32)
    return head, SolveInfo(
        route=code,
        rcond=factor.rcond.astype(jnp.float32),
        iterations=effort.iterations.astype(jnp.int32),
        residual=effort.residual,
    )


def _scale(head: LinearHead, units: jax.Array) -> LinearHead:
    """Each output times its unit, (1, o)."""
    return LinearHead(head.kernel * units, None if head.bias is None else head.bias * units[0])


def _power_of_two(rows: jax.Array) -> jax.Array:
    """For each column the power of two above its largest entry, one where that is zero; (1, o)."""
    largest = jnp.max(jnp.abs(rows), axis=0, keepdims=True, initial=0)
    usable = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, jnp.ones_like(largest)))
    # A float has one exponent more below than above one: the unit must have a finite inverse.
    low, high = jnp.finfo(rows.dtype).minexp + 1, jnp.finfo(rows.dtype).maxexp - 2
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, low, high))


def in_auto_mode(
    run: Callable[..., Any], features: jax.Array, out_specs: Any
) -> Callable[..., Any]:
    """Let XLA shard a function of the samples where the mesh of the features has explicit axes.

    A product over sharded samples is ambiguous to sharding-in-types, and LAPACK has no rule there.

    Args:
      run: the function.
      features: decides by its type.
      out_specs: partition specs of the outputs, a tree like them.

    Returns:
      ``run``, wrapped if need be.
    """
    mesh = jax.typeof(features).sharding.mesh
    if not mesh.explicit_axes:
        return run
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, spec),
        out_specs,
        is_leaf=lambda node: isinstance(node, jax.P),
    )
    return jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=shardings)


def expand_weights(sample_weight: jax.Array, samples: tuple[int, ...]) -> jax.Array:
    """Repeat weights of the leading axes over the others.

    Args:
      sample_weight: shape ``samples[:k]``.
      samples: the shape of all sample axes.

    Returns:
      One weight per row, shape (n,); NaN where negative.
    """
    shape = sample_weight.shape + (1,) * (len(samples) - sample_weight.ndim)
    return nan_where_negative(jnp.broadcast_to(sample_weight.reshape(shape), samples).reshape(-1))


def drop_absent(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Zero what is not finite in rows of weight zero, since 0 * NaN is NaN.

    Finite values stay: the derivative with respect to a weight that is zero needs them.

    Args:
      rows: (n, k).
      weights: (n,).

    Returns:
      The rows, (n, k).
    """
    absent = (weights == 0)[:, None] & ~jnp.isfinite(rows)
    return jnp.where(absent, jnp.zeros((), rows.dtype), rows)


def bias_share(penalty: jax.Array, has_bias: bool, penalize_bias: bool) -> jax.Array | None:
    """The bias's penalty: that of an average feature, which for a scalar is the scalar.

    Args:
      penalty: scalar, (d,) or (d, d).
      has_bias: whether there is a bias.
      penalize_bias: whether it is penalized.

    Returns:
      A scalar, or None without a bias.
    """
    if not has_bias:
        return None
    if not penalize_bias:
        return jnp.zeros((), penalty.dtype)
    return jnp.mean(jnp.diagonal(penalty) if penalty.ndim == 2 else penalty)


# The problem as arrays, and the three products that all routes are made of ------------------------


class _System(NamedTuple):
    features: jax.Array  # (n, d)
    weights: jax.Array | None  # (n,)
    penalty: jax.Array  # (), (d,) or (d, d): Lambda
    bias_penalty: jax.Array | None  # (): mu, None without a bias


class _Factor(NamedTuple):
    matrix: jax.Array  # Cholesky factor, (d + 1, d + 1) primal, (n, n) dual; qr: V, unscaled
    extra: Any  # dual: the penalty's Cholesky factor or None; qr: Sigma^-2, (d + 1, 1)
    rcond: jax.Array  # (): estimate of the reciprocal condition number
    level: jax.Array  # (): index into _STEPS, or len(_STEPS) for QR


def _weigh(system: _System, rows: jax.Array) -> jax.Array:
    return rows if system.weights is None else rows * system.weights[:, None]


def _adjoint(system: _System, rows: jax.Array) -> LinearHead:
    """Phi~^T S rows, for rows of shape (n, o)."""
    weighted = _weigh(system, rows)
    bias = None if system.bias_penalty is None else jnp.sum(weighted, axis=0)
    # This way around the smaller matrix is transposed, and copied for it.
    return LinearHead(dot(weighted.T, system.features).T, bias)


def _penalize(system: _System, x: LinearHead) -> LinearHead:
    """diag(Lambda, mu) x."""
    if system.penalty.ndim == 2:
        kernel = dot(system.penalty, x.kernel)
    else:
        kernel = _column(system.penalty) * x.kernel
    bias = None
    if system.bias_penalty is not None and x.bias is not None:
        bias = system.bias_penalty * x.bias
    return LinearHead(kernel, bias)


def _multiply(system: _System, x: LinearHead) -> LinearHead:
    """A x, by two products with the features."""
    return jax.tree.map(jnp.add, _adjoint(system, x(system.features)), _penalize(system, x))


def _column(penalty: jax.Array) -> jax.Array:
    return penalty if penalty.ndim == 0 else penalty[:, None]


# The solve, differentiable without differentiating a factorization --------------------------------
#
# x solves  A x = Phi~^T S rho.  Differentiating, with r = rho - Phi~ x,
#
#     A dx = g + Phi~^T S (drho - dPhi x),      g = d(Phi~^T S) r - dLambda x:
#
# the same matrix, so the same factor. `_tangent_solve` solves it by `jax.lax.custom_linear_solve`,
# which knows the operator besides the factor: it can be transposed (reverse mode) and
# differentiated again (higher orders), while the factor itself stays a constant.


class _Effort(NamedTuple):
    """What the iteration took; floats, because integers have tangents of their own type."""

    iterations: jax.Array  # float32 ()
    residual: jax.Array  # float32 ()


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(
    plan: _Plan, factor: _Factor, system: _System, rho: jax.Array, near: LinearHead | None
) -> tuple[LinearHead, _Effort]:
    # What the correction is added to, ``near``, only says how exact the correction has to be.
    none = _Effort(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    if plan.route == "cg":
        return _cg(plan.options, factor, system, _adjoint(system, rho))
    if plan.route == "qr":
        return _qr(system, rho), none
    # Outside the branches: samples over several devices are summed together with the Gram matrix.
    rhs = _adjoint(system, rho) if plan.route == "primal" else None
    refined: Any
    refined = {"primal": _refined_primal, "dual": _refined_dual}[plan.route]
    if not plan.guarded:
        return refined(factor, system, rho, rhs, near), none
    x = jax.lax.cond(
        factor.level == len(_STEPS),
        lambda: _qr(system, rho),
        lambda: refined(factor, system, rho, rhs, near),
    )
    return x, none


@_solve.defjvp
def _solve_jvp(plan, primals, tangents):
    factor, system, rho, near = primals
    _, dsystem, drho, _ = tangents
    x, effort = _solve(plan, factor, system, rho, near)
    residual = rho - x(system.features)
    _, g = jax.jvp(
        lambda s: jax.tree.map(jnp.subtract, _adjoint(s, residual), _penalize(s, x)),
        (system,),
        (dsystem,),
    )
    data_side = drho - dot(dsystem.features, x.kernel)
    dx = _tangent_solve(plan, factor, system, g, data_side)
    return (x, effort), (dx, jax.tree.map(jnp.zeros_like, effort))


def _tangent_solve(
    plan: _Plan, factor: _Factor, system: _System, g: LinearHead, rho: jax.Array
) -> LinearHead:
    """Solve A x = g + Phi~^T S rho, linear in g and rho."""

    def by_qr(factor: _Factor) -> LinearHead:
        def solve(rhs: LinearHead) -> LinearHead:
            rows = factor.extra * dot(factor.matrix.T, stack_head(rhs))
            return split_head(dot(factor.matrix, rows), rhs.bias is not None)

        return _normal_solve(system, _right_hand_side(system, g, rho), solve)

    def by_cholesky() -> LinearHead:
        return {"primal": _primal, "dual": _dual}[plan.route](factor, system, g, rho)

    if plan.route == "cg":
        fixed = jax.lax.stop_gradient(system)
        return _normal_solve(
            system,
            _right_hand_side(system, g, rho),
            lambda rhs: _cg(plan.options, factor, fixed, rhs)[0],
        )
    if plan.route == "qr":
        return by_qr(factor)
    if not plan.guarded:
        return by_cholesky()
    return jax.lax.cond(
        factor.level == len(_STEPS),
        lambda: by_qr(_factorize_qr(jax.lax.stop_gradient(system))),
        by_cholesky,
    )


def _normal_solve(
    system: _System, rhs: LinearHead, solve: Callable[[LinearHead], LinearHead]
) -> LinearHead:
    """Solve A x = rhs by a function that has a factor of A."""
    matvec = partial(_multiply, system)
    return jax.lax.custom_linear_solve(matvec, rhs, lambda _, b: solve(b), symmetric=True)


def _factorize(plan: _Plan, system: _System) -> _Factor:
    factor = {
        "primal": _factorize_primal,
        "dual": _factorize_dual,
        "qr": _factorize_qr,
        "cg": _precondition,
    }[plan.route](system)
    if plan.route in ("qr", "cg"):
        return factor
    eps = jnp.finfo(system.features.dtype).eps
    # Written so that NaN counts as below all of them.
    below = sum((~(factor.rcond >= level * eps)).astype(jnp.int32) for level in _LEVELS)
    level = jnp.minimum(below, len(_STEPS) - (0 if plan.guarded else 1))
    return factor._replace(level=level)


def _right_hand_side(system: _System, g: LinearHead | None, rho: jax.Array | None) -> LinearHead:
    """The right-hand side g + Phi~^T S rho; None stands for zero."""
    if rho is None:
        assert g is not None
        return g
    rhs = _adjoint(system, rho)
    return rhs if g is None else jax.tree.map(jnp.add, rhs, g)


def _step_limit(factor: _Factor, x: jax.Array, near: jax.Array | None) -> jax.Array:
    """How many steps of refinement may be needed, int32.

    The error of Cholesky, eps / rcond, is relative to the correction; what counts is the head. An
    anchor far away is canceled by the correction, from one that is near the correction is small.
    """
    limit = jnp.array(_STEPS, jnp.int32)[factor.level]
    if near is None:
        return limit
    units, head = _in_units(x, near)
    enlarged = jnp.linalg.norm(x / units) / jnp.linalg.norm(head)  # not a number: refine
    exact = factor.rcond >= _LEVELS[0] * jnp.finfo(x.dtype).eps * enlarged
    return jnp.where(exact, 0, jnp.maximum(limit, 1))


def _in_units(x: jax.Array, near: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A unit for each output, (1, o), and the head, x + near, in them: outputs may differ a lot."""
    head = x if near is None else x + near
    units = _power_of_two(head)
    return units, head / units


def _refine(
    solve: Callable[[jax.Array], jax.Array],
    residual: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    targets: jax.Array,
    limit: jax.Array,
    near: jax.Array | None,
    num_auxiliary: int = 0,
) -> jax.Array:
    """Solve again for what is left, until that changes nothing or for ``limit`` times.

    Nothing of the head, which is the solution and what it is added to: as a network converges, its
    corrections become small, and their last digits are of no use.

    Args:
      solve: the factor at work, column by column.
      residual: of a solution and its targets, column by column; from the data, not from the
        Gram matrix, whose rounding is what to undo.
      x: the solution so far, (m, o).
      targets: (n, o).
      limit: int32 scalar.
      near: what the solution without its auxiliary rows is added to, (m, o), or None.
      num_auxiliary: so many rows of x, the first, are no part of the head.

    Returns:
      The solution, (m, o).
    """
    outputs = x.shape[1]
    probed = outputs >= 8 * _PROBES
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (outputs, _PROBES))
    units, head = _in_units(x[num_auxiliary:], near)
    size = jnp.linalg.norm(head)
    tolerance = _SETTLED * jnp.finfo(x.dtype).eps

    def settled(change: jax.Array, combinations: float) -> jax.Array:
        allowed = tolerance * size * math.sqrt(combinations)
        return jnp.linalg.norm(change[num_auxiliary:]) <= allowed  # NaN is not settled

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        change = solve(residual(x, targets))
        return x + change, settled(change / units, 1)

    def step_if_needed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        combined = jnp.asarray(signs, x.dtype) / units.T
        change = solve(residual(dot(x, combined), dot(targets, combined)))
        done = settled(change, _PROBES)
        return jax.lax.cond(done, lambda x: (x, done), step, x)

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        count, x, _ = state
        x, done = step_if_needed(x) if probed else step(x)
        return count + 1, x, done

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, _, done = state
        return (count < limit) & ~done

    start = jnp.zeros((), jnp.int32), x, jnp.zeros((), bool)
    return jax.lax.while_loop(unfinished, body, start)[1]  # type: ignore[arg-type]


# Primal: size d + 1 ------------------------------------------------------------------------------


def border(
    gram: jax.Array, feature_sum: jax.Array, total: jax.Array, penalty: jax.Array, bias_penalty: Any
) -> jax.Array:
    """A = ((gram + Lambda, sums), (sums^T, total + mu)), the bordered Gram matrix.

    Args:
      gram: (d, d).
      feature_sum: (d,), the weighted sums of the features.
      total: (), the sum of the weights.
      penalty: scalar, (d,) or (d, d).
      bias_penalty: scalar, or None without a bias.

    Returns:
      (d + 1, d + 1) with a bias, (d, d) without.
    """
    d = gram.shape[0]
    gram = gram + (penalty if penalty.ndim == 2 else jnp.diag(jnp.broadcast_to(penalty, (d,))))
    if bias_penalty is None:
        return gram
    corner = (total + bias_penalty).reshape(1, 1)
    top = jnp.concatenate([gram, feature_sum[:, None]], axis=1)
    return jnp.concatenate([top, jnp.concatenate([feature_sum[None, :], corner], axis=1)])


def _factorize_primal(system: _System) -> _Factor:
    features = system.features
    weighted = _weigh(system, features)
    total = (
        jnp.full((), features.shape[0], features.dtype)
        if system.weights is None
        else jnp.sum(system.weights)
    )
    matrix = border(
        lower_gram(features, weighted),
        jnp.sum(weighted, axis=0),
        total,
        system.penalty,
        system.bias_penalty,
    )
    lower, rcond = cholesky_with_rcond(matrix)
    return _Factor(lower, None, rcond, jnp.zeros((), jnp.int32))


def stack_head(x: LinearHead) -> jax.Array:
    """Kernel over bias, (d + 1, o): the right-hand side of the bordered system.

    Args:
      x: a head, or a gradient in its shape.

    Returns:
      (d + 1, o), or (d, o) without a bias.
    """
    return x.kernel if x.bias is None else jnp.concatenate([x.kernel, x.bias[None, :]])


def split_head(rows: jax.Array, has_bias: bool) -> LinearHead:
    """The inverse of `stack_head`.

    Args:
      rows: (d + 1, o), or (d, o) without a bias.
      has_bias: which of the two.

    Returns:
      The head.
    """
    return LinearHead(rows[:-1], rows[-1]) if has_bias else LinearHead(rows)


def _refined_primal(
    factor: _Factor,
    system: _System,
    rho: jax.Array,
    rhs: LinearHead,
    near: LinearHead | None,
) -> LinearHead:
    solve = partial(cho_solve, factor.matrix)
    x, rows = solve(stack_head(rhs)), None if near is None else stack_head(near)
    x = _refine(solve, partial(_left_of, system), x, rho, _step_limit(factor, x, rows), rows)
    return split_head(x, rhs.bias is not None)


def _left_of(system: _System, x: jax.Array, rho: jax.Array) -> jax.Array:
    """The residual of the normal equations, (d + 1, o), from that of the data."""
    head = split_head(x, system.bias_penalty is not None)
    left = _adjoint(system, rho - head(system.features))
    return stack_head(jax.tree.map(jnp.subtract, left, _penalize(system, head)))


def _primal(
    factor: _Factor, system: _System, g: LinearHead | None, rho: jax.Array | None
) -> LinearHead:
    def solve(rhs: LinearHead) -> LinearHead:
        return split_head(cho_solve(factor.matrix, stack_head(rhs)), rhs.bias is not None)

    return _normal_solve(system, _right_hand_side(system, g, rho), solve)


# Dual: size n ------------------------------------------------------------------------------------
#
# With Z = S^{1/2} Phi and s = S^{1/2} 1, put  D = Lambda^{-1} (g + Z^T alpha). Then the normal
# equations hold if  alpha + Z Lambda^{-1} Z^T alpha + s delta = S^{1/2} rho - Z Lambda^{-1} g  and
# s^T alpha - mu delta = -g_0: a bordered system with the factor of C in its corner.


def _unpenalize(system: _System, extra: Any, rows: jax.Array) -> jax.Array:
    """Lambda^{-1} rows, for rows of shape (d, k)."""
    if system.penalty.ndim == 2:
        return jax.lax.custom_linear_solve(
            partial(dot, system.penalty), rows, lambda _, b: cho_solve(extra, b), symmetric=True
        )
    return rows / _column(system.penalty)


def _roots(system: _System) -> tuple[jax.Array, jax.Array]:
    """Z = S^{1/2} Phi, (n, d), and s = S^{1/2} 1, (n, 1)."""
    if system.weights is None:
        return system.features, jnp.ones((system.features.shape[0], 1), system.features.dtype)
    root = jnp.sqrt(system.weights)[:, None]
    return system.features * root, root


def _factorize_dual(system: _System) -> _Factor:
    z, s = _roots(system)
    extra = cholesky(system.penalty) if system.penalty.ndim == 2 else None
    if system.penalty.ndim == 0:
        kernel = dot(z, z.T) / system.penalty  # n^2 divisions instead of n d
    else:
        kernel = dot(z, _unpenalize(system, extra, z.T))
    lower, rcond = cholesky_with_rcond(kernel + jnp.eye(z.shape[0], dtype=z.dtype))
    if system.bias_penalty is not None:
        # A free bias without a sample that counts is the one singularity that C does not show.
        determined = system.bias_penalty + jnp.sum(jnp.square(s)) > 0
        rcond = jnp.where(determined, rcond, jnp.full((), jnp.nan, rcond.dtype))
    return _Factor(lower, extra, rcond, jnp.zeros((), jnp.int32))


def _dual_operator(
    factor: _Factor, system: _System
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """The bordered system times (alpha, delta), and its solution by the factor of C.

    Alpha over delta is one array: JAX transposes a linear solve only if all of its right-hand sides
    are linear in the input, and the last row may be a constant.
    """
    z, s = _roots(system)
    unpenalize = partial(_unpenalize, system, factor.extra)
    mu = system.bias_penalty

    def matvec(unknowns: jax.Array) -> jax.Array:
        alpha = unknowns if mu is None else unknowns[:-1]
        return _bordered_rows(system, unknowns, dot(z, unpenalize(dot(z.T, alpha))))

    if mu is None:
        return matvec, partial(cho_solve, factor.matrix)
    column = jax.lax.stop_gradient(cho_solve(factor.matrix, s))
    schur = jax.lax.stop_gradient(mu + jnp.sum(s * column))

    def solve(rows: jax.Array) -> jax.Array:
        alpha = cho_solve(factor.matrix, rows[:-1])
        delta = (dot(jax.lax.stop_gradient(s).T, alpha) - rows[-1:]) / schur
        return jnp.concatenate([alpha - column * delta, delta])

    return matvec, solve


def _bordered_rows(system: _System, unknowns: jax.Array, predicted: jax.Array) -> jax.Array:
    """(alpha + Z D + s delta; s^T alpha - mu delta), given Z D."""
    if system.bias_penalty is None:
        return unknowns + predicted
    _, s = _roots(system)
    alpha, delta = unknowns[:-1], unknowns[-1:]
    last = dot(s.T, alpha) - system.bias_penalty * delta
    return jnp.concatenate([alpha + predicted + s * delta, last])


def _dual_right_hand_side(
    factor: _Factor, system: _System, g: LinearHead | None, rho: jax.Array | None
) -> jax.Array:
    z, s = _roots(system)
    rows = None if rho is None else s * rho
    if g is not None:
        from_g = -dot(z, _unpenalize(system, factor.extra, g.kernel))
        rows = from_g if rows is None else rows + from_g
    assert rows is not None
    if system.bias_penalty is None:
        return rows
    last = jnp.zeros((1, rows.shape[1]), rows.dtype)
    if g is not None and g.bias is not None:
        last = -g.bias[None, :]
    return jnp.concatenate([rows, last])


def _from_dual(
    factor: _Factor, system: _System, g: LinearHead | None, unknowns: jax.Array
) -> LinearHead:
    """Kernel Lambda^{-1} (g + Z^T alpha) and bias delta."""
    z, _ = _roots(system)
    has_bias = system.bias_penalty is not None
    alpha, delta = (unknowns[:-1], unknowns[-1]) if has_bias else (unknowns, None)
    kernel = dot(z.T, alpha)
    return LinearHead(
        _unpenalize(system, factor.extra, kernel if g is None else kernel + g.kernel), delta
    )


def _refined_dual(
    factor: _Factor, system: _System, rho: jax.Array, rhs: None, near: LinearHead | None
) -> LinearHead:
    """Refine alpha, delta and the kernel together.

    Not alpha alone, whose own rounding the kernel Lambda^{-1} Z^T alpha magnifies where the data
    outweigh the penalty; nor the kernel alone: Lambda^{-1} (g - Z^T C^{-1} Z Lambda^{-1} g), which
    would solve for what is left of its normal equations, cancels there.
    """
    del rhs
    z, _ = _roots(system)
    n, has_bias = len(z), system.bias_penalty is not None
    dual_rows = n + has_bias
    _, solve_dual = _dual_operator(factor, system)

    def solve(rows: jax.Array) -> jax.Array:
        unknowns = solve_dual(rows)
        kernel = _unpenalize(system, factor.extra, dot(z.T, unknowns[:n]))
        return jnp.concatenate([unknowns, kernel])

    def left_of(x: jax.Array, rho: jax.Array) -> jax.Array:
        known = _bordered_rows(system, x[:dual_rows], dot(z, x[dual_rows:]))
        return _dual_right_hand_side(factor, system, None, rho) - known

    unknowns = solve_dual(_dual_right_hand_side(factor, system, None, rho))
    once = _from_dual(factor, system, None, unknowns)
    rows = None if near is None else stack_head(near)
    limit = _step_limit(factor, stack_head(once), rows)

    def refine() -> LinearHead:
        x = jnp.concatenate([unknowns, once.kernel])
        # The bias is above the kernel here, as delta is.
        above = None if rows is None else jnp.roll(rows, has_bias, axis=0)
        x = _refine(solve, left_of, x, rho, limit, above, num_auxiliary=n)
        return LinearHead(x[dual_rows:], x[n] if has_bias else None)

    # Without refinement no copy of the kernel below alpha.
    return jax.lax.cond(limit > 0, refine, lambda: once)


def _dual(
    factor: _Factor, system: _System, g: LinearHead | None, rho: jax.Array | None
) -> LinearHead:
    matvec, solve = _dual_operator(factor, system)
    rhs = _dual_right_hand_side(factor, system, g, rho)
    unknowns = jax.lax.custom_linear_solve(matvec, rhs, lambda _, b: solve(b), symmetric=True)
    return _from_dual(factor, system, g, unknowns)


# QR: no squared condition number ------------------------------------------------------------------
#
# Stack M = (Z~; diag(Lambda, mu)^{1/2}), scale its columns to norm one, M = Q R, R = U Sigma V^T.
# Then x = V Sigma^{-1} U^T Q^T (S^{1/2} rho; 0) and A^{-1} g = V Sigma^{-2} V^T g. Direction k sees
# the data with strength |Z~ V_k|. Below rounding that strength is noise, as it is for repeated
# features, and the quotient of noise and a small Sigma_k (its square below eps) would be a huge
# weight: such a direction gets no correction, as in exact arithmetic. One step of refinement
# follows, for residuals larger than the targets.
#
# Q, as large as the features, is never kept: R and Q^T rho are updated block by block of the rows.
# Every guarded step sets aside the memory of this route, which so is that of a block.


class _Stacked(NamedTuple):
    """What of M is not data, and the norms of its columns."""

    penalty_rows: jax.Array  # (d + 1, d + 1), scaled
    norms: jax.Array  # (1, d + 1)


def _stack_penalty(system: _System) -> _Stacked:
    features, (_, s) = system.features, _roots(system)
    d, dtype = features.shape[1], features.dtype
    eps = jnp.finfo(dtype).eps
    if system.penalty.ndim == 2:
        values, vectors = jnp.linalg.eigh(system.penalty, symmetrize_input=True)
        # Negative by more than rounding is not a penalty: NaN, which callers see.
        floor = -10 * eps * d * jnp.max(jnp.abs(values))
        values = jnp.where(values >= floor, jnp.maximum(values, 0), jnp.nan)
        root = jnp.sqrt(values)[:, None] * vectors.T
    else:
        root = jnp.diag(jnp.broadcast_to(jnp.sqrt(system.penalty), (d,)))
    if system.bias_penalty is not None:
        corner = jnp.sqrt(system.bias_penalty).reshape(1)
        root = jnp.pad(root, ((0, 1), (0, 1))) + jnp.diag(jnp.pad(corner, (d, 0)))

    def over_samples(reduce: Callable[[jax.Array], jax.Array], unit: jax.Array) -> jax.Array:
        columns = reduce(features * s / unit[:, :d])
        if system.bias_penalty is None:
            return columns
        return jnp.concatenate([columns, reduce(s / unit[:, d:])], axis=1)

    largest = jnp.maximum(over_samples(_largest, jnp.ones((1, len(root)), dtype)), _largest(root))
    unit = jnp.where(largest > 0, largest, 1)  # no overflow in the squares
    squares = over_samples(_sum_squares, unit) + _sum_squares(root / unit)
    norms = jnp.where(squares > 0, unit * jnp.sqrt(squares), 1)
    return _Stacked(root / norms, norms)


def _largest(rows: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(rows), axis=0, keepdims=True, initial=0)


def _sum_squares(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows), axis=0, keepdims=True)


def _fold_rows(step: Callable[..., Any], carry: Any, system: _System, rho: jax.Array) -> Any:
    """Fold ``step(carry, rows of (Z, s), rows of S^{1/2} rho)`` over blocks of samples."""
    n, d = system.features.shape
    size = max(d, 256, n // 8)
    _, s = _roots(system)

    def on(carry: Any, features: jax.Array, s: jax.Array, rho: jax.Array) -> Any:
        rows = features * s
        if system.bias_penalty is not None:
            rows = jnp.concatenate([rows, s], axis=1)
        return step(carry, rows, rho * s)

    arrays = system.features, s, rho

    def body(k: jax.Array, carry: Any) -> Any:
        return on(carry, *(jax.lax.dynamic_slice_in_dim(a, k * size, size) for a in arrays))

    whole = n // size if n > size else 0
    if whole:
        carry = jax.lax.fori_loop(0, whole, body, carry)
    if n > whole * size:
        carry = on(carry, *(array[whole * size :] for array in arrays))
    return carry


def _triangle(system: _System, stacked: _Stacked, rho: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R, (d + 1, d + 1), and Q^T (S^{1/2} rho; 0), (d + 1, o)."""

    def step(carry: tuple[jax.Array, jax.Array], rows: jax.Array, rho: jax.Array) -> Any:
        r, rotated = carry
        q, r = jnp.linalg.qr(jnp.concatenate([r, rows / stacked.norms]))
        return r, dot(q.T, jnp.concatenate([rotated, rho]))

    nothing = jnp.zeros((len(stacked.penalty_rows), rho.shape[1]), rho.dtype)
    return _fold_rows(step, (stacked.penalty_rows, nothing), system, rho)


class _Basis(NamedTuple):
    """The directions of the problem, from the singular values of R."""

    u: jax.Array  # (d + 1, d + 1)
    vt: jax.Array  # (d + 1, d + 1)
    inverse: jax.Array  # (d + 1, 1): Sigma^{-1}, zero where Sigma is noise
    seen: jax.Array  # (d + 1, 1): 1.0 where the data are more than noise
    rcond: jax.Array  # ()


def _find_basis(system: _System, stacked: _Stacked, r: jax.Array) -> _Basis:
    eps = jnp.finfo(r.dtype).eps
    u, sigma, vt = jnp.linalg.svd(r)

    def seen_by(squares: jax.Array, rows: jax.Array, _: jax.Array) -> jax.Array:
        return squares + _sum_squares(dot(rows / stacked.norms, vt.T))[0]

    none = system.features[:, :0]
    strength = jnp.sqrt(_fold_rows(seen_by, jnp.zeros_like(sigma), system, none))
    cut = _NOISE * eps * sigma[0]
    inverse = jnp.where(sigma <= cut, 0, 1 / sigma)  # NaN stays NaN
    seen = (strength > cut) | (jnp.square(sigma / sigma[0]) > eps)
    rcond = jnp.square(sigma[-1] / sigma[0])
    return _Basis(u, vt, inverse[:, None], seen.astype(u.dtype)[:, None], rcond)


def _factorize_qr(system: _System) -> _Factor:
    stacked = _stack_penalty(system)
    r, _ = _triangle(system, stacked, system.features[:, :0])
    basis = _find_basis(system, stacked, r)
    v = basis.vt.T / stacked.norms.T
    return _Factor(v, jnp.square(basis.inverse), basis.rcond, jnp.zeros((), jnp.int32))


def _qr(system: _System, rho: jax.Array) -> LinearHead:
    stacked = _stack_penalty(system)
    has_bias = system.bias_penalty is not None

    # A loop, so that both steps run the same program and get the same R to the last bit: rounding
    # alone may turn the weak directions of Q, and U belongs to the R that it was made from.
    def step(k: jax.Array, carry: tuple[jax.Array, _Basis]) -> tuple[jax.Array, _Basis]:
        x, basis = carry
        head = split_head(x, has_bias)
        r, rotated = _triangle(system, stacked, rho - head(system.features))
        basis = jax.lax.cond(k == 0, lambda: _find_basis(system, stacked, r), lambda: basis)
        from_data = basis.seen * dot(basis.u.T, rotated)
        pull = basis.inverse * dot(basis.vt, stack_head(_penalize(system, head)) / stacked.norms.T)
        change = dot(basis.vt.T, basis.inverse * (from_data - pull)) / stacked.norms.T
        return x + change, basis

    square = jnp.zeros_like(stacked.penalty_rows)
    nothing = _Basis(square, square, square[:, :1], square[:, :1], square[0, 0])
    x = jnp.zeros((len(square), rho.shape[1]), rho.dtype)
    return split_head(jax.lax.fori_loop(0, 2, step, (x, nothing))[0], has_bias)


# Conjugate gradients: no factor at all -----------------------------------------------------------


def _precondition(system: _System) -> _Factor:
    """The diagonal of A in the place of a factor."""
    features = system.features
    penalty = jnp.diagonal(system.penalty) if system.penalty.ndim == 2 else system.penalty
    diagonal = jnp.sum(_weigh(system, jnp.square(features)), axis=0) + penalty
    if system.bias_penalty is not None:
        rows = jnp.ones((features.shape[0], 1), features.dtype)
        corner = jnp.sum(_weigh(system, rows), axis=0) + system.bias_penalty
        diagonal = jnp.concatenate([diagonal, corner])
    zero = jnp.zeros((), jnp.int32)
    return _Factor(diagonal, None, jnp.ones((), features.dtype), zero)


def _cg(
    options: CG, factor: _Factor, system: _System, rhs: LinearHead
) -> tuple[LinearHead, _Effort]:
    has_bias = rhs.bias is not None

    def matvec(rows: jax.Array) -> jax.Array:
        return stack_head(_multiply(system, split_head(rows, has_bias)))

    found = conjugate_gradients(matvec, stack_head(rhs), factor.matrix, options)
    effort = _Effort(found.iterations.astype(jnp.float32), found.residual.astype(jnp.float32))
    return split_head(found.solution, has_bias), effort


def as_penalty(penalty: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
    """The penalty as an array; the symmetric part of a matrix, since no other part counts.

    Args:
      penalty: scalar, (d,) or (d, d).
      dtype: the dtype to solve in.

    Returns:
      The penalty; NaN where it is negative.
    """
    array = jnp.asarray(penalty, dtype)
    return nan_where_negative((array + array.T) / 2 if array.ndim == 2 else array)


def nan_where_negative(array: jax.Array) -> jax.Array:
    """Negative penalties and weights make a system that may look solvable: answer NaN instead.

    Args:
      array: scalar or (k,); of a matrix (d, d) the diagonal counts.

    Returns:
      The array, NaN where negative; all NaN for a matrix with a negative diagonal entry.
    """
    if array.ndim == 2:  # a matrix has off-diagonal entries of any sign
        return jnp.where(
            jnp.any(jnp.diagonal(array) < 0), jnp.full((), jnp.nan, array.dtype), array
        )
    return jnp.where(array >= 0, array, jnp.full((), jnp.nan, array.dtype))
