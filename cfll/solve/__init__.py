r"""ridge_solve, prox_solve, penalized_solve: regularized least squares; knows no optimizer.

All of them are one problem. With weights :math:`w_i` (one if absent), an anchor :math:`(W_t, b_t)`
(zero for ridge) and residuals :math:`r_i = y_i - W_t^\top \phi_i - b_t`, the *correction*
:math:`(D, \delta)` minimizes

.. math::
    \sum_i w_i \|r_i - D^\top \phi_i - \delta\|^2 + \mathrm{tr}(D^\top \Lambda D) + \mu \|\delta\|^2

and the head is anchor plus correction: Eq. (13) of the paper, better conditioned. The ways to solve
it are a file each behind `cfll.solve.route.Solver`: ``primal``, ``dual``, ``qr``, ``cg``, and
``auto``, which takes primal or dual by shape and QR where the pivots of their Cholesky factor say
that it is not enough.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cfll import samples
from cfll.heads import LinearHead, as_plain, check_anchor, widest_dtype
from cfll.solve.auto import choose_solver
from cfll.solve.cg import CG
from cfll.solve.derivative import solve_correction
from cfll.solve.dual import Dual
from cfll.solve.primal import Primal
from cfll.solve.problem import Problem, add, as_penalty, bias_penalty_of, check_penalty
from cfll.solve.qr import QR
from cfll.solve.route import Route, SolveInfo, Solver

__all__ = ["CG", "Route", "SolveInfo", "penalized_solve", "prox_solve", "ridge_solve"]

_SOLVERS: dict[str, Any] = {"primal": Primal, "dual": Dual, "qr": QR, "cg": CG}


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
        row of weight zero is a row that is not there, even if it holds NaN (inputs of the backbone
        must be finite, or its gradient is not). Or of the targets'
        shape (..., o), where targets are missing: ``jnp.isfinite(targets)``. Each output is then
        solved by itself, which takes o factorizations.
      solver: "auto", "primal", "dual", "qr" or "cg"; see `cfll.solve`. Only "auto"
        guards against singular systems; the others answer NaN where they fail. `cfll.CG` is "cg"
        with options. With fewer samples than features float32 loses the small features beside one
        that is 1e5 times larger (with more than 4096 of them and traced penalties, beside one that
        is penalized 1e8 times less); `cfll.SolveInfo.rcond` is then zero: take "primal".

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
    options: Any = {"penalize_bias": penalize_bias, "solver": solver, "name": "beta"}
    options |= {"use_bias": use_bias, "sample_weight": sample_weight}
    return penalized_solve(features, targets, None, beta, **options)[0]


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
      features, targets, sample_weight, solver: as in `ridge_solve`.
      anchor: the head to stay near, kernel (d, o).
      lam: the proximal coefficient: scalar, (d,) or (d, d), as beta in `ridge_solve`.
      penalize_bias: whether the bias is kept near the anchor's; ``False`` refits it freely.

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
    options: Any = {"penalize_bias": penalize_bias, "solver": solver}
    return penalized_solve(features, targets, anchor, lam, sample_weight=sample_weight, **options)[
        0
    ]


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
    """`prox_solve`, or `ridge_solve`, with its diagnostics: what a rule calls.

    Args:
      features, targets, penalize_bias, sample_weight, solver: as in `ridge_solve`.
      anchor: the head to stay near; None for ridge: the same as zeros, but no product with them.
      penalty: scalar, (d,) or (d, d), multiplying a *sum* over samples.
      use_bias: without an anchor, whether to fit a bias; an anchor says so itself.
      name: what the caller calls the penalty, for messages.

    Returns:
      The head and the `SolveInfo`: the route taken and the condition estimate.

    Raises:
      ValueError, TypeError: while tracing, as in `ridge_solve`.

    Examples:
      >>> import jax.numpy as jnp
      >>> twins = jnp.ones((8, 2))  # two equal features and next to no penalty: singular
      >>> head, info = penalized_solve(twins, twins[:, :1], None, 1e-9, use_bias=False)
      >>> print(Route(info.route), head.kernel.round(3).ravel())
      qr [0.5 0.5]

    References:
      Closed-Form Last Layer Optimization, Eq. (2), (11), (12) and (13).
    """
    features, targets = samples.check_batch(features, targets, sample_weight, per_output=True)
    d, o = features.shape[-1], targets.shape[-1]
    if anchor is not None:
        anchor = check_anchor(anchor, d, o)
        use_bias = anchor.bias is not None
    rows, penalty = features.size // d, as_plain(penalty)
    check_penalty(name, penalty, d, rows, use_bias and not penalize_bias)
    chosen = _choose(solver, rows, d, penalty)
    options = (chosen, use_bias, penalize_bias)
    if samples.is_per_output(sample_weight, targets):
        return _solve_outputs(options, features, targets, sample_weight, anchor, penalty)
    return _solve(options, features, targets, sample_weight, anchor, penalty)


def _choose(solver: Any, rows: int, d: int, penalty: Any) -> Solver:
    """The solver by its name."""
    if isinstance(solver, CG):
        return solver
    if solver == "auto":
        return choose_solver(rows, d, penalty)
    if solver not in _SOLVERS:
        names = ", ".join(map(repr, ("auto", *_SOLVERS)))
        raise ValueError(
            f"unknown solver {solver!r}; write one of {names}, or "
            "cfll.CG(tolerance=1e-4, max_iterations=100)."
        )
    return _SOLVERS["primal" if rows == 0 and solver == "dual" else solver]()


# Compiled itself: outside of jit a call compiles once per shape; inside it is inlined.
@partial(jax.jit, static_argnums=0, inline=True)
def _solve(
    options: tuple[Solver, bool, bool],
    features: jax.Array,
    targets: jax.Array,
    sample_weight: jax.Array | None,
    anchor: LinearHead | None,
    penalty: jax.Array,
) -> tuple[LinearHead, SolveInfo]:
    solver, has_bias, penalize_bias = options
    dtype = widest_dtype(features, targets, None if anchor is None else anchor.kernel)
    rows = samples.flatten(features, targets, sample_weight, dtype)
    anchor = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), anchor)
    penalty = as_penalty(penalty, dtype)
    bias_penalty = bias_penalty_of(penalty, has_bias, penalize_bias)
    problem = Problem(rows.features, rows.weights, penalty, bias_penalty)

    def run(problem: Problem, targets: jax.Array, anchor: LinearHead | None) -> Any:
        residual = targets if anchor is None else targets - anchor(problem.features)
        correction, info = solve_correction(solver, problem, residual, anchor)
        return correction if anchor is None else add(anchor, correction), info

    info_specs = jax.tree.map(lambda _: jax.P(), SolveInfo(0, 0))
    if anchor is None:
        head_specs: Any = LinearHead(jax.P(), jax.P() if has_bias else None)  # type: ignore[arg-type]
    else:
        head_specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, anchor)
    run = samples.let_xla_shard(run, problem.features, (head_specs, info_specs))
    return run(problem, rows.targets, anchor)


@partial(jax.jit, static_argnums=0, inline=True)
def _solve_outputs(
    options: tuple[Solver, bool, bool],
    features: jax.Array,
    targets: jax.Array,
    sample_weight: Any,
    anchor: LinearHead | None,
    penalty: jax.Array,
) -> tuple[LinearHead, SolveInfo]:
    """One output after the other, each with its own weights; diagnostics of the worst."""

    def solve(output: Any) -> tuple[LinearHead, SolveInfo]:
        targets, weights, anchor = output
        anchor = jax.tree.map(lambda leaf: leaf[..., None], anchor)
        head, info = _solve(options, features, targets[..., None], weights, anchor, penalty)
        return jax.tree.map(lambda leaf: leaf[..., 0], head), info

    # Not vmap, which pays for both branches of every cond.
    outputs = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (targets, sample_weight, anchor))
    head, infos = jax.lax.map(solve, outputs)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), head), infos.worst()
