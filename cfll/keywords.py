"""Keywords of ``update``: checked for the head, and those that the backbone's optimizer takes.

Optax hands all keywords to everybody; line searches and SAM refuse those of a closed-form head.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any

import jax
import optax

from cfll import heads

# What optax.inject_hyperparams closes over: it makes its transformation in the update, and nobody
# can know what that names.
_MADE_LATER = "inner_factory"


EXAMPLE = (
    "loss, solution = rule.loss(features, targets, cfll.get_state(opt_state)) and "
    "tx.update(grads, opt_state, params, solution=solution), or tx.update(grads, opt_state, params,"
    ' targets=y, feature_fn=lambda p: model.apply({"params": p}, x, method="features"))'
)


def check(path, targets, feature_fn, features, solution, sample_weight, addressed=()) -> None:
    """Refuse what is not exactly one way to a head; solutions came for those addressed."""
    ways = {"feature_fn": feature_fn, "features": features, "solution": solution}
    given = [name for name, value in ways.items() if value is not None]
    if not given and addressed:
        raise TypeError(
            f"solution is a dictionary with the keys {addressed}, none of which is the path of the "
            f"head, {path!r}: write solution={{{path!r}: ...}}. The head in a dictionary of "
            f"parameters is cfll.get_head(params, {path!r})."
        )
    if len(given) != 1:
        raise TypeError(
            "closed_form_head.update needs exactly one of the keywords feature_fn, features and "
            f"solution, got {' and '.join(given) if given else 'none'} for the head at {path!r}. "
            f"Write {EXAMPLE}. If you did: flax.training.train_state.TrainState, optax.lookahead, "
            "optax.contrib.sam, and optax.MultiSteps inside optax.chain pass none on; use "
            "cfll.flax.TrainState, cfll.closed_form(optax.contrib.sam(...), rule), and MultiSteps "
            "outermost."
        )
    if solution is not None and sample_weight is not None:
        raise TypeError(
            "sample_weight has no effect beside solution, which is solved already: write "
            "rule.loss(features, targets, state, sample_weight=sample_weight)."
        )
    if targets is None and solution is None:
        raise TypeError(f"closed_form_head.update needs the keyword targets. Write {EXAMPLE}.")
    if feature_fn is not None and not callable(feature_fn):
        raise TypeError(
            f"feature_fn is a {type(feature_fn).__name__}, not a function of the parameters. Pass "
            f"arrays as features=..., or write {EXAMPLE}."
        )


def of_head(value: Any, path: str) -> Any:
    """A keyword's value for the head at a path; dictionaries have one for each of several heads."""
    if not isinstance(value, Mapping):
        return value
    return {heads.join_path(key): one for key, one in value.items()}.get(path)


def check_addresses(params: Any, by_head: Mapping[str, Any]) -> None:
    """Refuse dictionaries over heads with an address where there is none: nobody would take it."""
    for name, value in by_head.items():
        for key in value if isinstance(value, Mapping) else ():
            try:
                heads.get_head(params, key)
            except ValueError as error:
                raise TypeError(
                    f"{name} is a dictionary with the key {key!r}, but there is no head in the "
                    "parameters at that path. Its keys are the paths that cfll.closed_form got."
                ) from error


def parameters_of(start: Iterable[Any]) -> set[str]:
    """The names of the parameters of these functions and of all that they close over."""
    names, seen, waiting = set(), set(), list(start)
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, tuple | list):  # a GradientTransformation is a tuple of functions
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, partial):
            waiting += [node.func, *node.args]
        elif inspect.ismethod(node):
            waiting += [node.__func__, getattr(node.__self__, "__dict__", {})]
        elif inspect.isfunction(node):
            closed_over = inspect.getclosurevars(node).nonlocals
            names |= set(inspect.signature(node, follow_wrapped=False).parameters)
            names |= {_MADE_LATER} & set(closed_over)
            waiting += closed_over.values()
    return names


def taken(
    keywords: dict[str, Any], named: set[str], own: set[str], params: Any, mask: Callable[..., Any]
) -> dict[str, Any]:
    """All keywords but those of a head (``own``) that a backbone's optimizer does not name.

    Named are its `parameters_of`, and those of functions among its keywords: a line search passes
    keywords on to its ``value_fn``. These functions get all parameters, as the user wrote them.
    """
    functions = {key: value for key, value in keywords.items() if key in named and callable(value)}
    unknown = own - named.union(*(inspect.signature(f).parameters for f in functions.values()))
    if _MADE_LATER in named:
        unknown = set()
    completed = {key: _on_backbone(f, params, mask) for key, f in functions.items()}
    return {k: value for k, value in (keywords | completed).items() if k not in unknown}


def _on_backbone(
    function: Callable[..., Any], params: Any, mask: Callable[..., Any]
) -> Callable[..., Any]:
    """A function of all parameters as one of the backbone's, beside the head that params have."""
    whole: Any = jax.tree.structure(params)
    seen = mask(params)

    def hide(tree: Any) -> Any:
        return jax.tree.map(lambda seen, leaf: leaf if seen else optax.MaskedNode(), seen, tree)

    def complete(tree: Any) -> Any:
        return jax.tree.map(lambda seen, leaf, head: leaf if seen else head, seen, tree, params)

    hidden: Any = jax.tree.structure(hide(params))

    @wraps(function)  # a line search asks for its signature
    def of_backbone(*args: Any, **keywords: Any) -> Any:
        args = tuple(complete(x) if jax.tree.structure(x) == hidden else x for x in args)
        result = function(*args, **keywords)
        return hide(result) if jax.tree.structure(result) == whole else result

    return of_backbone
