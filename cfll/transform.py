"""closed_form_head, closed_form: a rule as an Optax transformation.

The only layer that knows parameters, updates and optimizer states. It finds the head, hands the
batch to the rule, guards against heads that are not finite, and writes the new head as an update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cfll import heads, solve
from cfll.heads import HeadPath, LinearHead
from cfll.rules import Rule


class HeadInfo(NamedTuple):
    """What happened to the head in the last update.

    Attributes:
      route: int32, the route of the solve, an index into `cfll.solve.ROUTES`; "given" if the caller
        passed ``solution``.
      rcond: float32, condition estimate as in `cfll.solve.SolveInfo`; 1 if the caller passed
        ``solution``.
      iterations: int32, as in `cfll.solve.SolveInfo`.
      residual: float32, as in `cfll.solve.SolveInfo`.
      accepted: bool, whether the new head was finite; if not, the old one was kept.
      skipped: int32, how many updates so far kept the old head.
      drift: float32, largest difference between the head in the parameters and the anchor before
        this update. Beyond rounding, something else writes the head: a transformation after this
        one, or parameters replaced without ``tx.init``.
    """

    route: jax.Array
    rcond: jax.Array
    iterations: jax.Array
    residual: jax.Array
    accepted: jax.Array
    skipped: jax.Array
    drift: jax.Array


class ClosedFormState(NamedTuple):
    """State of `closed_form_head`; read it with ``optax.tree.get(opt_state, "anchor")``.

    Attributes:
      count: int32, number of updates, rejected ones included.
      anchor: the current head, W_t, in float32 or float64. The truth: bfloat16 parameters hold it
        rounded.
      rule_state: the rule's own state; for the rules of this library it holds ``lam``.
      info: a `HeadInfo`.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as Optax's states do
    anchor: LinearHead
    rule_state: Any
    info: HeadInfo

    @property
    def lam(self) -> jax.Array:
        """The penalty of the last solve."""
        return self.rule_state.lam


def closed_form_head(
    rule: Rule, head: HeadPath = "head", *, update_interval: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Set the last layer in closed form instead of descending on it.

    The update of the head's leaves is ``new head - parameters``, whatever gradient arrives for
    them; all other updates pass. Put it last in an ``optax.chain``: it sets the head and does not
    scale it. ``update`` takes keywords:

    * ``targets``: (..., o), required unless ``solution`` is given;
    * exactly one of

      - ``feature_fn``: a function of the parameters that returns features (..., d). It is called
        on the parameters *after* the backbone's update: Algorithm 1 with the current batch,
        Algorithm 2 with the next one;
      - ``features``: (..., d), computed by the caller;
      - ``solution``: a `LinearHead` that the caller has solved, e.g. with `cfll.prox_loss` in the
        forward pass: Eq. (17) in one forward pass, or with `cfll.GramStats` over micro-batches.
        The rule is not consulted;

    * ``sample_weight``: optional, as in `cfll.ridge_solve`.

    Others are ignored, as Optax requires.

    Args:
      rule: `cfll.prox`, `cfll.ridge`, `cfll.ema` or your own `cfll.Rule`.
      head: path of the dense layer in the parameters: ``"head"``, ``"decoder/head"``, a tuple.
      update_interval: solve at every k-th update, the first among them, under `jax.lax.cond`; keep
        the head in between. The features are computed in every update, outside the ``cond``.
        ``solution`` has then nothing to save, and is refused.

    Returns:
      A transformation whose state is a `ClosedFormState`. A head that is not finite (NaN in the
      batch, a singular system) is not used: the old one stays, the backbone's update passes, and
      ``state.info`` counts it.

    Raises:
      ValueError, TypeError: from ``init`` if there is no dense layer at ``head``; from ``update``,
        while tracing, if keywords are missing or do not fit. The messages contain the fix.

    Examples:
      >>> import cfll, jax, jax.numpy as jnp, optax
      >>> params = {"backbone": jnp.eye(2), "head": {"kernel": jnp.zeros((2, 1))}}
      >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0], [2.0]])
      >>> def loss(p):
      ...     return jnp.mean((y - x @ p["backbone"] @ p["head"]["kernel"]) ** 2)
      >>> tx = optax.chain(optax.sgd(0.1), closed_form_head(cfll.prox(lam=1e-3), head="head"))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params, targets=y,
      ...                            feature_fn=lambda p: x @ p["backbone"])
      >>> params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-4)
      True

    References:
      Closed-Form Last Layer Optimization, Algorithms 1 and 2, Eq. (17).
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule is a {type(rule).__name__}; write closed_form_head(cfll.prox(lam=10.0), "
            f"head={head!r})."
        )
    if isinstance(update_interval, bool) or not isinstance(update_interval, int):
        raise TypeError(
            f"update_interval is {update_interval!r}; write a whole number of updates, e.g. 4."
        )
    if update_interval < 1:
        raise ValueError(f"update_interval is {update_interval}; write 1 to solve at every update.")

    def init(params: Any) -> ClosedFormState:
        if _is_placeholder(params):  # optax.tree.map_params asks which fields are parameters: none
            anchor = LinearHead(jnp.zeros(()), jnp.zeros(()))
        else:
            anchor = jax.tree.map(_float_copy, _find_head(params, head))
        return ClosedFormState(
            count=jnp.zeros((), jnp.int32),
            anchor=anchor,
            rule_state=rule.init(anchor),
            info=HeadInfo(
                *solve.given(),
                accepted=jnp.ones((), jnp.bool_),
                skipped=jnp.zeros((), jnp.int32),
                drift=jnp.zeros((), jnp.float32),
            ),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        targets: Any = None,
        feature_fn: Callable[[Any], jax.Array] | None = None,
        features: Any = None,
        solution: LinearHead | None = None,
        sample_weight: jax.Array | None = None,
        **unused_extra_args: Any,
    ) -> tuple[Any, ClosedFormState]:
        del unused_extra_args
        _check_keywords(params, targets, feature_fn, features, solution)
        old = _find_head(params, head)
        heads.check_same_head(state.anchor, old, f"the head at {head!r} in params")
        mask = heads.backbone_mask(params, head)

        if solution is not None:
            if update_interval != 1:
                raise TypeError(
                    "solution is already solved, so update_interval saves nothing: pass features "
                    "or feature_fn, or leave update_interval out."
                )
            heads.check_same_head(state.anchor, solution, "solution")
            new, rule_state, info = solution, state.rule_state, solve.given()
        else:
            if feature_fn is not None:
                still = jax.tree.map(
                    lambda is_backbone, update: update if is_backbone else jnp.zeros_like(update),
                    mask,
                    updates,
                )
                features = feature_fn(optax.apply_updates(params, still))
            features = _check_features(features, state.anchor)

            def solved() -> tuple[LinearHead, Any, solve.SolveInfo]:
                new, rule_state, info = rule.solve(
                    features,
                    targets,
                    state.anchor,
                    state.rule_state,
                    count=state.count,
                    sample_weight=sample_weight,
                )
                heads.check_same_head(state.anchor, new, "the head that the rule returned")
                return new, rule_state, _as_arrays(info)

            if update_interval == 1:
                new, rule_state, info = solved()
            else:
                # A HeadInfo begins with the fields of a SolveInfo.
                kept = solve.SolveInfo(*state.info[: len(solve.SolveInfo._fields)])
                new, rule_state, info = jax.lax.cond(
                    state.count % update_interval == 0,
                    lambda: _like((state.anchor, state.rule_state, kept), solved()),
                    lambda: (state.anchor, state.rule_state, kept),
                )

        anchor, accepted = heads.accept_finite(new, state.anchor)
        rule_state = jax.tree.map(
            lambda a, b: jnp.where(accepted, a, b), rule_state, state.rule_state
        )
        old = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), old, anchor)
        step = heads.set_head(params, head, jax.tree.map(jnp.subtract, anchor, old))
        updates = jax.tree.map(
            lambda is_backbone, update, to_head: update if is_backbone else to_head,
            mask,
            updates,
            step,
        )
        distances = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), old, state.anchor)
        state = ClosedFormState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            anchor=anchor,
            rule_state=rule_state,
            info=HeadInfo(
                *_as_arrays(info),
                accepted=accepted,
                skipped=state.info.skipped + (~accepted).astype(jnp.int32),
                drift=jnp.max(jnp.array(jax.tree.leaves(distances))).astype(jnp.float32),
            ),
        )
        return updates, state

    # Optax annotates states as arrays, so no NamedTuple state fits.
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def closed_form(
    backbone: optax.GradientTransformation,
    rule: Rule,
    head: HeadPath = "head",
    *,
    update_interval: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the backbone and a rule for the head.

    ``optax.chain(optax.masked(backbone, all but the head), closed_form_head(rule, head))``: the
    backbone's optimizer neither sees nor stores anything for the head. It passes all keywords of
    ``update`` on; see `closed_form_head` for those the head needs.

    Args:
      backbone: any Optax optimizer.
      rule: `cfll.prox`, `cfll.ridge`, `cfll.ema` or your own `cfll.Rule`.
      head: path of the dense layer in the parameters.
      update_interval: as in `closed_form_head`.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: as `closed_form_head`.

    Examples:
      >>> import cfll, jax.numpy as jnp, optax
      >>> tx = closed_form(optax.adam(1e-3), cfll.prox(lam=10.0), head="decoder/head")
      >>> params = {"encoder": jnp.ones(3), "decoder": {"head": {"kernel": jnp.zeros((3, 2))}}}
      >>> optax.tree.get(tx.init(params), "anchor").kernel.shape
      (3, 2)

    References:
      Closed-Form Last Layer Optimization, Algorithm 1.
    """

    def mask(tree: Any) -> Any:
        return heads.backbone_mask(tree, head)

    return optax.chain(
        optax.masked(backbone, mask),
        closed_form_head(rule, head, update_interval=update_interval),
    )


def _as_arrays(info: solve.SolveInfo) -> solve.SolveInfo:
    dtypes = (jnp.int32, jnp.float32, jnp.int32, jnp.float32)
    return solve.SolveInfo(*(jnp.asarray(x, t) for x, t in zip(info, dtypes, strict=True)))


def _like(reference: Any, tree: Any) -> Any:
    """In the dtypes of the reference: both branches of a cond must have the same."""
    return jax.tree.map(lambda ref, leaf: jnp.asarray(leaf, ref.dtype), reference, tree)


_EXAMPLE = (
    "tx.update(grads, state, params, targets=y, feature_fn=lambda p: "
    'model.apply({"params": p}, x, method="features"))'
)


def _check_keywords(params, targets, feature_fn, features, solution) -> None:
    if params is None:
        raise ValueError(f"closed_form_head needs the parameters: {_EXAMPLE}.")
    ways = {"feature_fn": feature_fn, "features": features, "solution": solution}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise TypeError(
            "closed_form_head.update needs exactly one of the keywords feature_fn, features and "
            f"solution, got {' and '.join(given) if given else 'none'}. Write {_EXAMPLE}. If you "
            "did: flax.training.train_state.TrainState and optax.MultiSteps inside optax.chain "
            "drop keywords; use cfll.flax.TrainState, and MultiSteps outermost."
        )
    if targets is None and solution is None:
        raise TypeError(f"closed_form_head.update needs the keyword targets. Write {_EXAMPLE}.")
    if feature_fn is not None and not callable(feature_fn):
        raise TypeError(
            f"feature_fn is a {type(feature_fn).__name__}, not a function of the parameters. Pass "
            f"arrays as features=..., or write {_EXAMPLE}."
        )
    if feature_fn is not None and _has_masked_nodes(params):
        raise ValueError(
            "feature_fn needs all parameters, but this transformation sits inside optax.masked or "
            "optax.partition, which hides some. Chain it after them, optax.chain(optax.masked(...),"
            " cfll.closed_form_head(...)), use cfll.closed_form, or pass features=... ."
        )


def _check_features(features: Any, anchor: LinearHead) -> jax.Array:
    d = anchor.kernel.shape[0]
    if isinstance(features, tuple):
        raise TypeError(
            "feature_fn returned a tuple; with mutable collections model.apply returns (features, "
            "variables): return the first, or use cfll.flax.TrainState.feature_fn."
        )
    features = jnp.asarray(features)
    if features.ndim < 2 or features.shape[-1] != d:
        raise ValueError(
            f"the features have shape {features.shape}, but the head takes (..., {d}): they must "
            "be the input of the head, not its output. Check method= in feature_fn."
        )
    return features


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


def _float_copy(leaf: Any) -> jax.Array:
    """A copy, at least float32: aliasing a parameter would break buffer donation."""
    dtype = heads.widest_dtype(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, dtype)
    return jnp.array(leaf, dtype, copy=True)
