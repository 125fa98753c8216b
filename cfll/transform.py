"""closed_form_head, closed_form, get_state: a rule as an Optax transformation.

The only layer that knows parameters, updates and optimizer states. It finds the head, takes the
solution or asks the rule for one, and writes the new head as an update.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cfll import heads, keywords
from cfll.heads import HeadPath, LinearHead
from cfll.rules.rule import (
    ClosedFormState,
    Rule,
    Solution,
    advance,
    check_features,
    check_solution,
    initial_state,
    known,
)
from cfll.solve import Route, SolveInfo


def closed_form_head(rule: Rule, head: HeadPath = "head") -> optax.GradientTransformationExtraArgs:
    r"""Set the last layer in closed form instead of descending on it.

    The update of the head's leaves is ``new head - parameters``, whatever gradient arrives for
    them; all other updates pass. Put it last in an ``optax.chain``: it sets the head and does not
    scale it. ``update`` takes exactly one of the keywords

    * ``solution``: what ``rule.loss`` returned in the forward pass, Eq. (17): head, next rule state
      and diagnostics. Or a `cfll.LinearHead` from elsewhere, e.g. of `cfll.GramStats` over
      micro-batches; a schedule then advances, a rule that learns stays as it is;
    * ``feature_fn``: a function of the parameters that returns features (..., d). It is called on
      the parameters *after* the backbone's update: Algorithm 1 with the current batch, Algorithm 2
      with the next one;
    * ``features``: (..., d), computed by the caller;

    with the last two ``targets``, (..., o), and, if you like, ``sample_weight`` as in
    `cfll.ridge_solve`. With several heads in one optimizer each of these may be a dictionary from
    paths to values, ``solution={"a": ..., "b": ...}``. Other keywords reach the rule if it takes
    them, and are ignored otherwise, as Optax requires.

    Args:
      rule: `cfll.prox`, `cfll.ridge`, `cfll.averaged_ridge` or your own `cfll.Rule`.
      head: path of the dense layer in the parameters: ``"head"``, ``"decoder/head"``, a tuple. Its
        leaves must serve it alone, as ``features @ kernel + bias``: weight norm is not seen.

    Returns:
      A transformation whose state is a `cfll.ClosedFormState`. A head that is not finite (NaN in
      the batch, a singular system) is not used: the old one stays with the old state of the rule,
      the backbone's update passes, and ``state.info`` counts it.

    Raises:
      ValueError, TypeError: from ``init`` if there is no dense layer at ``head``; from ``update``,
        while tracing, if keywords are missing or do not fit. The messages contain the fix.

    Examples:
      >>> import cfll, jax, jax.numpy as jnp, optax
      >>> params = {"backbone": jnp.eye(2), "head": {"kernel": jnp.zeros((2, 1))}}
      >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0], [2.0]])
      >>> rule = cfll.prox(lam=1e-3)
      >>> tx = optax.chain(optax.sgd(0.01), closed_form_head(rule, head="head"))
      >>> opt_state = tx.init(params)
      >>> def loss_fn(params):
      ...     return rule.loss(x @ params["backbone"], y, cfll.get_state(opt_state))
      >>> (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      >>> updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(loss < 1e-3), cfll.Route(cfll.get_state(opt_state).info.route).name
      (True, 'PRIMAL')

    References:
      Closed-Form Last Layer Optimization, Algorithms 1 and 2, Eq. (17).
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule is a {type(rule).__name__}; write closed_form_head(cfll.prox(lam=10.0), "
            f"head={head!r})."
        )
    path = heads.join_path(head)

    def init(params: Any) -> ClosedFormState:
        if _is_placeholder(params):  # optax.tree.map_params asks which fields are parameters: none
            anchor = LinearHead(jnp.zeros(()), jnp.zeros(()))
        else:
            anchor = jax.tree.map(heads.float_copy, _find_head(params, head))
        return initial_state(rule, anchor, path)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        targets: Any = None,
        feature_fn: Any = None,
        features: Any = None,
        solution: Any = None,
        sample_weight: Any = None,
        **extra: Any,
    ) -> tuple[Any, ClosedFormState]:
        _check_state(state, ClosedFormState)
        if params is None:
            raise ValueError(f"closed_form_head needs the parameters: {keywords.EXAMPLE}.")
        heads.check_gradients(updates, params)
        old = _find_head(params, head)
        heads.check_same_head(state.anchor, old, f"the head at {head!r} in params")
        mask = heads.backbone_mask(params, head)

        by_head = {
            "targets": targets,
            "feature_fn": feature_fn,
            "features": features,
            "sample_weight": sample_weight,
            "solution": solution,
        }
        targets, feature_fn, features, sample_weight, given = (
            keywords.of_head(value, path) for value in by_head.values()
        )
        addressed = list(solution) if isinstance(solution, Mapping) else []
        keywords.check(path, targets, feature_fn, features, given, sample_weight, addressed)
        if not _has_masked_nodes(params):
            keywords.check_addresses(params, by_head)
        if given is not None:
            new = _as_solution(given, rule, state, path, None if addressed else params)
        else:
            if feature_fn is not None:
                backbone_updates = jax.tree.map(
                    lambda is_backbone, update: update if is_backbone else jnp.zeros_like(update),
                    mask,
                    updates,
                )
                moved = optax.apply_updates(params, backbone_updates)
                try:
                    features = feature_fn(moved)
                except Exception as error:
                    if not _has_masked_nodes(params):
                        raise
                    raise ValueError(
                        "feature_fn needs parameters that optax.masked or optax.partition hides "
                        "from this transformation. Chain it after them, optax.chain(optax.masked("
                        "...), cfll.closed_form_head(...)), use cfll.closed_form, or pass "
                        "solution=... or features=... ."
                    ) from error
            features = check_features(features, state, rule)
            extra = known(rule.solve, {**extra, "sample_weight": sample_weight})
            new = rule.solve(features, targets, state, **extra)
        check_solution(new, state)

        arrived = zip(jax.tree.leaves(mask), jax.tree.leaves(updates), strict=True)
        of_head = [update for is_backbone, update in arrived if not is_backbone]
        state = advance(state, new, old, None if given is None else of_head)
        old = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), old, state.anchor)
        step = heads.set_head(params, head, jax.tree.map(jnp.subtract, state.anchor, old))
        updates = jax.tree.map(
            lambda is_backbone, update, to_head: update if is_backbone else to_head,
            mask,
            updates,
            step,
        )
        return updates, state

    # Optax annotates states as arrays, so no NamedTuple state fits.
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def closed_form(
    backbone: optax.GradientTransformation, rule: Rule, head: HeadPath = "head"
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the backbone and a rule for the head.

    ``optax.chain(optax.masked(backbone, all but the head), closed_form_head(rule, head))``: the
    backbone's optimizer neither sees nor stores anything for the head. The keywords of ``update``
    reach it, too, but those of the head (see `closed_form_head`) only if it names them; functions
    among them, ``value_fn`` of a line search or ``grad_fn`` of SAM, are functions of *all*
    parameters. For a second head write ``closed_form(closed_form(backbone, rule_a, "a"), rule_b,
    "b")``.

    Args:
      backbone: an Optax optimizer, ``optax.lbfgs()`` and ``optax.contrib.sam`` among them; not
        ``optax.lookahead``, whose parameters are pairs.
      rule: `cfll.prox`, `cfll.ridge`, `cfll.averaged_ridge` or your own `cfll.Rule`.
      head: path of the dense layer in the parameters.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: as `closed_form_head`.

    Examples:
      >>> import cfll, jax.numpy as jnp, optax
      >>> tx = closed_form(optax.adam(1e-3), cfll.prox(lam=10.0), head="decoder/head")
      >>> params = {"encoder": jnp.ones(3), "decoder": {"head": {"kernel": jnp.zeros((3, 2))}}}
      >>> cfll.get_state(tx.init(params)).anchor.kernel.shape
      (3, 2)

    References:
      Closed-Form Last Layer Optimization, Algorithm 1.
    """

    def mask(tree: Any) -> Any:
        return heads.backbone_mask(tree, head)

    masked = optax.masked(backbone, mask, mask_compatible_extra_args=True)
    solve = closed_form_head(rule, head)
    named = keywords.parameters_of([backbone.update])
    own = {*signature(solve.update).parameters, *signature(rule.solve).parameters}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _check_state(state, optax.MaskedState)
        heads.check_gradients(updates, params)
        taken = keywords.taken(extra, named, own, params, mask)
        return masked.update(updates, state, params, **taken)

    return optax.chain(optax.GradientTransformationExtraArgs(masked.init, update), solve)


def get_state(opt_state: Any, head: HeadPath | None = None) -> ClosedFormState:
    """The state of a closed-form head, wherever it is in the state of an optimizer.

    Through ``optax.chain``, ``masked``, ``MultiSteps``, ``inject_hyperparams``, ``nnx.Optimizer``.

    Args:
      opt_state: of the optimizer; or what has one, a ``TrainState`` or an ``nnx.Optimizer``.
      head: path of the head, as in `closed_form_head`; ``None`` if there is only one.

    Returns:
      The state, of plain arrays: what ``rule.loss`` takes, and ``info`` about the last update.

    Raises:
      ValueError: if there is none, or several and ``head`` does not say which.

    Examples:
      >>> import cfll, jax.numpy as jnp, optax
      >>> params = {"head": {"kernel": jnp.zeros((3, 2))}}
      >>> tx = optax.MultiSteps(closed_form(optax.adam(1e-3), cfll.prox(lam=10.0)), 2)
      >>> get_state(tx.init(params)).lam
      Array(10., dtype=float32)
    """
    tree = getattr(opt_state, "opt_state", opt_state)
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, ClosedFormState))
    states = [(next(iter(x.path)), x) for x in leaves if isinstance(x, ClosedFormState)]
    path = None if head is None else heads.join_path(head)
    found = [(at, state) for at, state in states if path in (None, at)]
    if len(found) > 1 and len(dict(found)) == 1:
        raise ValueError(
            f"{len(found)} closed-form heads at {found[0][0]!r}: hand get_state the part of the "
            "state that holds the one, as in cfll.get_state(opt_state['generator'])."
        )
    if len(found) != 1:
        which = f"at {path!r}" if head is not None else "to be told apart without head="
        names = sorted(at for at, _ in states) or "none"
        raise ValueError(
            f"no closed-form head {which}; this optimizer state has {names}. "
            "Write cfll.get_state(opt_state, head='decoder/head') for an optimizer that was made "
            f"by cfll.closed_form or holds a cfll.closed_form_head. {_RESTORED}"
        )
    return unbox(found[0][1])


def unbox(tree: Any) -> Any:
    """What is in the ``nnx.Variable`` nodes with which an ``nnx.Optimizer`` boxes its state."""

    def is_variable(node: Any) -> bool:
        return hasattr(type(node), "raw_value")

    def value(node: Any) -> Any:
        if not is_variable(node):
            return node
        boxed = node.get_raw_value() if hasattr(node, "get_raw_value") else node.raw_value
        return node[...] if hasattr(boxed, "shape") else boxed  # an optax.MaskedNode, e.g.

    return jax.tree.map(value, tree, is_leaf=is_variable)


def _as_solution(
    given: Any, rule: Rule, state: ClosedFormState, path: str, params: Any
) -> Solution:
    """What came as ``solution``, if it is for this head; params: it came without a path."""
    if isinstance(given, Solution):
        if given.path is not None and given.path != state.path:
            raise TypeError(
                f"the solution is for the head at {next(iter(given.path))!r}, not {path!r}: with "
                f"several heads write solution={{{path!r}: ..., ...}}."
            )
        return given
    if not isinstance(given, LinearHead):
        check_solution(given, state)
    heads.check_same_head(state.anchor, given, "the solution")
    same = [] if params is None else heads.find_heads(params, like=state.anchor)
    if len(same) > 1:
        raise TypeError(
            f"a bare LinearHead may belong to any of {sorted(same)}, which have the same shapes: "
            f"write solution={{{path!r}: head}}."
        )
    return Solution(given, rule.unsolved(state), SolveInfo(Route.GIVEN, 1), state.path)


_RESTORED = (
    "If it was restored without its types, restore into tx.init(params): checkpointer.restore(path,"
    " tx.init(params)) in Orbax, flax.serialization.from_state_dict(tx.init(params), restored)."
)


def _check_state(state: Any, kind: type) -> None:
    if not isinstance(state, kind):
        raise TypeError(
            f"the optimizer's state has a {type(state).__name__} where tx.init(params) has a "
            f"{kind.__name__}. {_RESTORED}"
        )


def _find_head(params: Any, head: HeadPath) -> LinearHead:
    try:
        return heads.get_head(params, head)
    except ValueError as error:
        if _has_masked_nodes(params):
            raise ValueError(
                f"the head at {head!r} is hidden by optax.masked or optax.partition. Chain "
                "cfll.closed_form_head after them, optax.chain(optax.masked(...), "
                "cfll.closed_form_head(...)), or use cfll.closed_form."
            ) from error
        raise


def _has_masked_nodes(tree: Any) -> bool:
    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(is_masked(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_masked))


def _is_placeholder(params: Any) -> bool:
    """Whether this is the empty stand-in of optax.tree.map_params rather than a parameter tree."""
    return not isinstance(params, (dict, list, tuple)) and type(params).__name__.endswith(
        "Placeholder"
    )
