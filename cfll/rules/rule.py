"""Rule, ClosedFormState, Solution: what a head carries from step to step, and what moves it.

A head's state is `ClosedFormState`. A `Rule` makes of it and a batch a `Solution`, in the forward
pass (``rule.loss``, Eq. (17)) or in the optimizer (Algorithms 1 and 2); `advance` makes of a
solution the next state, unless the solution is not finite. A new rule is one file with one function
that returns a `Rule`; nothing else changes.
"""

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cfll.heads import LinearHead, check_same_head
from cfll.losses import constant_at_first_order, penalized_loss
from cfll.solve import Route, SolveInfo

Penalty = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
AxisName = str | tuple[str, ...]


class HeadInfo(NamedTuple):
    """What happened to the head in the last update.

    Attributes:
      solve: a `cfll.SolveInfo`, how the head was solved; also when it was not accepted.
      accepted: bool, whether the new head was finite; if not, the old one was kept.
      skipped: int32, how many updates so far kept the old head.
      drift: float32, largest difference between the head in the parameters and the anchor before
        this update. Beyond rounding, something else writes the head: a transformation after this
        one, or parameters replaced without ``tx.init``.
      overruled: float32, largest update of the head that arrived with a ``solution`` and was
        replaced by it. Zero in the order of Eq. (17), unless a backbone uses leaves of the head as
        well (tied weights, which are not supported), the loss has another term with the head, or a
        transformation before this one decays it. Zero in the other orders, which replace gradients.
      stale: bool, whether the solution was made from the state of another update: ``rule.loss`` got
        a ``cfll.get_state(opt_state)`` of before, and keeps the head near an old one.
    """

    solve: SolveInfo
    accepted: jax.Array
    skipped: jax.Array
    drift: jax.Array
    overruled: jax.Array
    stale: jax.Array

    @property
    def route(self) -> jax.Array:
        """``solve.route``."""
        return self.solve.route

    @property
    def rcond(self) -> jax.Array:
        """``solve.rcond``."""
        return self.solve.rcond


class ClosedFormState(NamedTuple):
    """One head during training; `cfll.get_state` finds it in the state of an optimizer.

    Attributes:
      count: int32, number of updates, rejected ones included.
      anchor: the current head, W_t, in float32 or float64. The truth: bfloat16 parameters hold it
        rounded, and the step that wrote them is rounded, too.
      rule_state: the rule's own state; where there is a penalty it holds ``lam``.
      info: a `HeadInfo`.
      path: ``{path of the head: None}``. A key, since keys are no arrays and survive every
        checkpoint.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as Optax's states do
    anchor: LinearHead
    rule_state: Any
    info: HeadInfo
    path: dict[str, None]

    @property
    def lam(self) -> jax.Array:
        """The penalty of the last update: of its solve, or a schedule's value for a given head."""
        return self.rule_state.lam


class Solution(NamedTuple):
    """What a rule makes of a batch: pass it to the optimizer as ``solution``.

    Attributes:
      head: the next head.
      rule_state: the rule's next state.
      info: a `cfll.SolveInfo`.
      path: of the head that it is for; filled in by ``rule.loss``, as
      count: of the state that it was made from.
    """

    head: LinearHead
    rule_state: Any
    info: SolveInfo
    path: dict[str, None] | None = None
    count: jax.Array | None = None  # type: ignore[assignment]  # as in ClosedFormState


def _squared_loss(solution, features, targets, state, *, sample_weight=None):
    """L_B at the new head: mean over samples, sum over outputs."""
    del state
    return penalized_loss(solution.head, features, targets, sample_weight=sample_weight)


class Rule(NamedTuple):
    """How the next head follows from a batch and the head's state.

    Attributes:
      init: ``init(anchor) -> rule_state``, a pytree of arrays.
      solve: ``solve(features, targets, state, *, sample_weight) -> Solution`` for a
        `ClosedFormState`. It may have more keywords, or ``**extra``: those of ``loss`` and of
        ``tx.update`` reach it. A head that is not finite is rejected by the transformation, and
        with it the rule's new state.
      objective: ``objective(solution, features, targets, state, *, sample_weight) -> loss``, what
        the backbone descends on, at the fixed new head; by default the squared loss, a mean over
        samples and sum over outputs.
      unsolved: ``unsolved(state) -> rule_state``, the next one where the head came from elsewhere,
        a `LinearHead` as ``solution``; by default the old one.
      axis_name: the mapped axes whose devices ``solve`` sums over. With None, ``loss`` and
        ``tx.update`` refuse to solve inside ``pmap`` and ``shard_map``, where replicas would part
        unseen; ``rule._replace(axis_name=())`` lets every device solve for itself.

    Examples:
      A rule that solves only the first head and keeps it:

      >>> import jax.numpy as jnp, cfll
      >>> first = cfll.ridge(beta=1.0)
      >>> def solve_once(features, targets, state, *, sample_weight=None):
      ...     new = first.solve(features, targets, state, sample_weight=sample_weight)
      ...     keep = lambda new, old: jnp.where(state.count == 0, new, old)
      ...     return new._replace(head=jax.tree.map(keep, new.head, state.anchor))
      >>> once = Rule(first.init, solve_once)
    """

    init: Callable[[LinearHead], Any]
    solve: Callable[..., Solution]
    objective: Callable[..., jax.Array] = _squared_loss
    unsolved: Callable[[ClosedFormState], Any] = attrgetter("rule_state")
    axis_name: AxisName | None = None

    def loss(
        self,
        features: jax.Array,
        targets: jax.Array,
        state: ClosedFormState,
        *,
        sample_weight: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[jax.Array, Solution]:
        r"""Solve the head and take the loss at it: the forward pass of Eq. (17).

        .. math:: \mathcal L^\star(\phi) = \mathcal L(W^\star(\phi), \phi), \qquad
            \nabla \mathcal L^\star = \nabla_\phi \mathcal L(W, \phi)|_{W = W^\star}

        By the envelope theorem the gradient contains no solve (Theorems 1 and 2).

        Args:
          features: (..., d), the input of the head; all leading axes are samples.
          targets: (..., o), floats.
          state: of the head, ``cfll.get_state(opt_state)``.
          sample_weight: as in `cfll.ridge_solve`. Given here, not to the optimizer.
          **extra: keywords of the rule's own.

        Returns:
          The loss, a scalar, mean over samples and sum over outputs; and the `Solution` for
          ``tx.update(..., solution=solution)``, a constant to (first) differentiation.

        Raises:
          ValueError, TypeError: while tracing, for what does not fit.

        Examples:
          >>> import jax.numpy as jnp, cfll
          >>> rule, x, y = cfll.prox(lam=1.0), jnp.eye(2), jnp.array([[1.0], [3.0]])
          >>> state = initial_state(rule, LinearHead.zeros(2, 1, use_bias=False))
          >>> loss, solution = rule.loss(x, y, state)
          >>> print(f"{loss:.2f} {solution.head.kernel[1, 0]:.2f} {solution.rule_state.lam}")
          2.50 1.50 1.0

        References:
          Closed-Form Last Layer Optimization, Eq. (5), (14) and (17), Theorems 1 and 2.
        """
        features = check_features(features, state, self)
        unknown = set(extra) - set(known(self.solve, extra)) - set(known(self.objective, extra))
        if unknown:
            raise TypeError(f"this rule takes no keyword {', '.join(sorted(unknown))}.")
        batch = (features, targets, state)
        keywords = {**extra, "sample_weight": sample_weight}
        fixed, fixed_keywords = constant_at_first_order((batch, keywords))
        solution = self.solve(*fixed, **known(self.solve, fixed_keywords))
        check_solution(solution, state)
        loss = self.objective(solution, *batch, **known(self.objective, keywords))
        return loss, solution._replace(path=state.path, count=state.count)


def known(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that a function takes; weights that it does not take are an error."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    if keywords.get("sample_weight") is not None and "sample_weight" not in parameters:
        raise TypeError(
            "this rule knows no sample_weight: write solve(..., *, sample_weight=None)."
        )
    return {name: value for name, value in keywords.items() if name in parameters}


def initial_state(rule: Rule, anchor: LinearHead, path: str = "head") -> ClosedFormState:
    """The state of a head before its first update."""
    info = HeadInfo(
        SolveInfo(Route.GIVEN, 1).as_arrays(),
        accepted=jnp.ones((), jnp.bool_),
        skipped=jnp.zeros((), jnp.int32),
        drift=jnp.zeros((), jnp.float32),
        overruled=jnp.zeros((), jnp.float32),
        stale=jnp.zeros((), jnp.bool_),
    )
    return ClosedFormState(jnp.zeros((), jnp.int32), anchor, rule.init(anchor), info, {path: None})


def advance(
    state: ClosedFormState,
    solution: Solution,
    parameters: LinearHead | None = None,
    overruled: list[jax.Array] | None = None,
) -> ClosedFormState:
    """The next state: the solution's head and rule state if that head is finite, else the old ones.

    With the head in the parameters given, the new one must be finite in their dtypes, too, and so
    must be the way there.
    """
    drift, written = jnp.zeros((), jnp.float32), (state.anchor, state.anchor)
    new = jax.tree.map(_like, solution.head, state.anchor)
    if parameters is not None:
        steps = jax.tree.map(lambda new, old: new - _like(old, new), new, parameters)
        written = jax.tree.map(_like, (new, steps), (parameters, parameters))
        drift = _largest(
            jax.tree.map(lambda old, anchor: _like(old, anchor) - anchor, parameters, state.anchor)
        )
    finite = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), (new, written))
    accepted = jnp.all(jnp.array(jax.tree.leaves(finite)))
    anchor, rule_state = jax.tree.map(
        lambda new, old: jnp.where(accepted, _like(new, old), old),
        (new, solution.rule_state),
        (state.anchor, state.rule_state),
    )
    skipped = state.info.skipped + (~accepted).astype(jnp.int32)
    info = HeadInfo(
        solution.info.as_arrays(),
        accepted,
        skipped,
        drift,
        _largest(overruled or []),
        jnp.asarray(solution.count is not None and solution.count != state.count),
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return state._replace(count=count, anchor=anchor, rule_state=rule_state, info=info)


def _largest(tree: Any) -> jax.Array:
    """The largest entry, in absolute value; zero if there are none."""
    largest = [jnp.max(jnp.abs(leaf)).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.array(largest)) if largest else jnp.zeros((), jnp.float32)


def _like(leaf: Any, reference: jax.Array) -> jax.Array:
    same = getattr(leaf, "dtype", None) == reference.dtype  # keys of jax.random are not converted
    return leaf if same else jnp.asarray(leaf, reference.dtype)


def check_features(features: Any, state: ClosedFormState, rule: Rule) -> jax.Array:
    """Refuse what is not the input of the head, or of one device where the rule needs all."""
    if not isinstance(state, ClosedFormState):
        raise TypeError(
            f"state is a {type(state).__name__}; a rule needs the state of the head: write "
            "rule.loss(features, targets, cfll.get_state(opt_state))."
        )
    if isinstance(features, tuple):
        raise TypeError(
            "the features are a tuple; with mutable collections model.apply returns (features, "
            "variables): take the first, or use cfll.flax.feature_fn."
        )
    features, d = jnp.asarray(features), state.anchor.kernel.shape[0]
    if features.ndim < 2 or features.shape[-1] != d:
        raise ValueError(
            f"the features have shape {features.shape}, but the head takes (..., {d}): they must "
            "be the input of the head, not its output. Check the method that makes them."
        )
    mesh = jax.sharding.get_abstract_mesh()
    mapped = [name for name in mesh.manual_axes if mesh.shape[name] > 1]
    if mapped and rule.axis_name is None:
        raise ValueError(
            f"each device of the mapped axis {mapped[0]!r} would solve for its own samples, and the"
            f" replicas of a network part. Write cfll.prox(lam, axis_name={mapped[0]!r}), alike for"
            " the ridge rules and adaptive_prox; for other rules jit over a sharded batch instead "
            "of pmap and shard_map. If devices have networks of their own, or all samples: "
            "rule._replace(axis_name=())."
        )
    return features


def check_solution(solution: Any, state: ClosedFormState) -> None:
    """Refuse what is not a solution for this head."""
    if not isinstance(solution, Solution):
        raise TypeError(
            f"the solution is a {type(solution).__name__}; write loss, solution = rule.loss("
            "features, targets, cfll.get_state(opt_state)), or pass a cfll.LinearHead(kernel, bias)"
            "; a rule of your own returns cfll.Solution(head, rule_state, info)."
        )
    check_same_head(state.anchor, solution.head, "the solution")
    old, new = (jax.tree.structure(x.rule_state) for x in (state, solution))
    if str(old) != str(new):
        raise TypeError(
            f"the solution has a rule state of the form {new}, but the state of the head has {old}:"
            " use one rule for loss and optimizer, rule = cfll.prox(lam=10.0)."
        )


class PenaltyState(NamedTuple):
    """The state of `cfll.prox`, `cfll.ridge` and `cfll.averaged_ridge`.

    Attributes:
      lam: the penalty of the last update (beta for the ridge rules), float32 or float64. A
        record: change it through a schedule or ``optax.inject_hyperparams``, not here.
    """

    lam: jax.Array


def penalty_state(penalty: Penalty, count: jax.Array, anchor: LinearHead) -> PenaltyState:
    """The penalty, or a schedule's value after ``count`` updates, as a rule's state."""
    value = penalty(count) if callable(penalty) else penalty
    return PenaltyState(jnp.array(value, anchor.kernel.dtype))
