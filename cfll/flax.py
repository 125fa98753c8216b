"""What Flax needs beyond Optax's interface: the same functions for linen and for NNX.

``feature_fn(state or model, x)`` for Algorithms 1 and 2, ``backbone(module, ...)`` for `cfll.iv`,
``TrainState`` for linen and ``Optimizer`` for NNX, whose keywords reach the optimizer and are never
lost; `cfll.get_state` takes both. The only module that imports Flax.

Second forward passes. Algorithms 1 and 2 evaluate the features again, on updated parameters.
Running statistics of batch norm must not be updated twice for one batch. So the feature functions
here run in the mode you ask for by keyword (usually that of training, in which the loss was
computed: the head then fits the features that the gradient saw), use the statistics as they are,
and *discard* what the forward pass would write. The statistics move once per step, by the pass of
your loss.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

try:
    from flax import nnx
    from flax.training import train_state
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'cfll.flax needs Flax: python -m pip install "cfll[flax]"', name=error.name
    ) from error

from cfll.keywords import parameters_of
from cfll.networks import Backbone
from cfll.rules.rule import known
from cfll.transform import unbox


class TrainState(train_state.TrainState):
    """Flax's linen ``TrainState`` whose ``apply_gradients`` hands keywords to the optimizer.

    Flax's own passes none on, so that `cfll.closed_form_head` never sees its solution.

    Attributes:
      batch_stats: the running statistics of batch norm, or ``None``. With them, as with dropout,
        the head fits features that are not those of evaluation: after training solve it once
        more, on evaluated features (the guide "diagnostics" shows it: `cfll.GramStats` for the
        squared loss, the rule itself for others).

    Examples:
      >>> import cfll, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> class Net(nn.Module):
      ...     def setup(self):
      ...         self.hidden, self.head = nn.Dense(8), nn.Dense(1)
      ...     def features(self, x):
      ...         return nn.tanh(self.hidden(x))
      ...     def __call__(self, x):
      ...         return self.head(self.features(x))
      >>> x, y, net, rule = jnp.ones((4, 3)), jnp.ones((4, 1)), Net(), cfll.prox(lam=1.0)
      >>> state = TrainState.create(
      ...     apply_fn=net.apply, params=net.init(jax.random.key(0), x)["params"],
      ...     tx=cfll.closed_form(optax.sgd(0.1), rule, head="head"))
      >>> @jax.jit
      ... def train_step(state, x, y):
      ...     def loss_fn(params):
      ...         features = state.apply_fn({"params": params}, x, method="features")
      ...         return rule.loss(features, y, cfll.get_state(state))
      ...     (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
      ...     return state.apply_gradients(grads=grads, solution=solution), loss
      >>> state, loss = train_step(state, x, y)
    """

    batch_stats: Any = None

    @classmethod
    def create(cls, *, apply_fn: Callable[..., Any], params: Any, tx: Any, **kwargs: Any) -> Any:
        """A new state at step 0, an array: Flax's integer costs ``jit`` a second compilation."""
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(step=jnp.zeros((), jnp.int32))

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step of the optimizer.

        Args:
          grads: gradients, a tree like ``params``.
          **kwargs: keywords that name a field of this class (``batch_stats``, fields of a
            subclass) replace it; all others go to ``tx.update``: ``solution``, or ``targets`` and
            ``feature_fn``, and what the rest of the chain takes.

        Returns:
          The next state.

        Raises:
          TypeError: for a keyword that is neither a field nor taken by any transformation.
          ValueError, TypeError: as `cfll.closed_form_head`.
        """
        names = {field.name for field in fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in names}
        passed_on = {name: value for name, value in kwargs.items() if name not in names}
        step = partial(self.tx.update, grads, self.opt_state, self.params)
        _check_taken(self.tx, step, passed_on, f"a field of {type(self).__name__} {sorted(names)}")
        # Flax's own method with a transformation that has the keywords already.
        update = partial(self.tx.update, **known(self.tx.update, passed_on))
        bound = optax.GradientTransformation(self.tx.init, update)
        stepped = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=self.tx)


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` whose ``update`` refuses keywords that no transformation takes.

    The plain one works as well, but loses a misspelled keyword without a word. A train step is in
    the README: ``optimizer.update(model, grads, solution=solution)``.
    """

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> None:  # type: ignore[override]
        """One step of the optimizer, with the keywords of its transformations.

        Args:
          model: the module to update.
          grads: gradients, as ``nnx.grad`` makes them.
          **kwargs: of ``tx.update``, as for ``TrainState.apply_gradients``.

        Raises:
          TypeError: for a keyword that no transformation takes.
        """
        arrays = unbox((grads, self.opt_state, nnx.state(model, self.wrt)))
        step = partial(self.tx.update, *arrays)
        _check_taken(self.tx, step, kwargs, "an argument of update")
        super().update(model, grads, **kwargs)


def feature_fn(
    source: Any,
    *args: Any,
    method: str | Callable[..., Any] | None = "features",
    wrt: Any = nnx.Param,
    **kwargs: Any,
) -> Callable[[Any], jax.Array]:
    """The features as a function of the parameters, for the keyword ``feature_fn``.

    ``state.apply_gradients(grads=grads, targets=y, feature_fn=feature_fn(state, x))`` in linen,
    ``optimizer.update(model, grads, targets=y, feature_fn=feature_fn(model, x))`` in NNX.

    Args:
      source: a linen ``TrainState`` (``batch_stats`` is used if it has one) or an NNX module, whose
        other state (running statistics, random streams) is copied as it is now. What the forward
        pass would write is discarded, see the module's docstring.
      *args: inputs of the method.
      method: the method that returns features (..., d), the input of the head.
      wrt: for NNX, the filter of the ``nnx.Optimizer``.
      **kwargs: keywords of the method, like ``train=True``; in linen those of ``apply``, too:
        ``rngs={"dropout": key}``. Pass the keys of the loss to see the same dropout mask.

    Returns:
      A function ``params -> features``.

    Examples:
      >>> params = nnx.state(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.Param)
      >>> model, x = nnx.Linear(3, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
      >>> feature_fn(model, x, method="__call__")(params).shape
      (4, 8)
    """
    if isinstance(source, nnx.Module):
        graph, *states = nnx.split(source, wrt, ...)

        def nnx_features(params: Any) -> jax.Array:
            copy = nnx.merge(graph, params, *states[1:], copy=True)
            return _method_of(copy, method)(*args, **kwargs)

        return nnx_features
    stats = getattr(source, "batch_stats", None)

    def linen_features(params: Any) -> jax.Array:
        variables = {"params": params}
        if stats is None:
            return source.apply_fn(variables, *args, method=method, **kwargs)
        variables["batch_stats"] = stats
        options = {"method": method, "mutable": ["batch_stats"], **kwargs}
        return source.apply_fn(variables, *args, **options)[0]

    return linen_features


def backbone(
    module: Any, variables: Any = None, *, method: str | Callable[..., Any] | None = None
) -> Backbone:
    """A Flax module without head as a `cfll.networks.Backbone`, for `cfll.iv`.

    Args:
      module: a linen or NNX module that maps inputs to features (n, d). Its layers are told the
        mode by the keyword ``train``, if the method has it, in NNX by ``train()`` and ``eval()``,
        too. It is not changed. Dropout: in NNX, whose random streams are state.
      variables: for linen what ``module.init`` returned. "params" is trained; all other collections
        (running statistics of batch norm and spectral norm) are updated by the passes that train.
      method: the method that returns features; ``None`` for ``__call__``.

    Returns:
      The backbone, with the variables or the model's present values as initial values.

    Raises:
      TypeError: without the variables of linen, or if the method has another keyword for the mode.

    Examples:
      >>> import flax.linen as nn
      >>> x = jnp.ones((4, 3))
      >>> linen = nn.Dense(8)
      >>> net = backbone(linen, linen.init(jax.random.key(0), x))
      >>> net.apply(net.params, net.stats, x, train=True)[0].shape
      (4, 8)
      >>> net = backbone(nnx.Linear(3, 8, rngs=nnx.Rngs(0)))
      >>> net.apply(net.params, net.stats, x, train=True)[0].shape
      (4, 8)
    """
    is_nnx = isinstance(module, nnx.Module)
    function = _method_of(module if is_nnx else type(module), method)
    fixed = getattr(method, "keywords", {})  # of a functools.partial
    taken = {k: v for k, v in inspect.signature(function).parameters.items() if k not in fixed}
    for name in ("training", "is_training", "deterministic", "use_running_average"):
        # None leaves it to the layers.
        if name in taken and taken[name].default is not None and "train" not in taken:
            raise TypeError(
                f"the method's keyword for the mode is {name}, which nobody would set: give the "
                "module a method with the keyword train, and write backbone(..., method=...)."
            )

    def keywords_of(train: bool) -> dict[str, Any]:
        return {"train": train} if "train" in taken else {}

    if is_nnx:
        return _nnx_backbone(module, method, keywords_of)
    collections = {"params", "batch_stats"}
    if not isinstance(variables, Mapping) or (variables and not collections & set(variables)):
        raise TypeError(
            "a linen module needs its variables, a dictionary with params in it: write "
            "cfll.flax.backbone(module, module.init(key, inputs))."
        )
    stats = dict(variables)
    params = stats.pop("params", {})

    def apply(params: Any, stats: Any, inputs: Any, *, train: bool) -> tuple[jax.Array, Any]:
        keywords = keywords_of(train)
        both = {"params": params, **stats}
        if not train:
            return module.apply(both, inputs, method=method, **keywords), stats
        features, updated = module.apply(
            both, inputs, method=method, mutable=list(stats), **keywords
        )
        return features, {**stats, **updated}

    return Backbone(apply, params, stats)


def _method_of(module: Any, method: str | Callable[..., Any] | None) -> Callable[..., Any]:
    """A method of a module or of its class, by name or as a function, bound or not."""
    if callable(method):
        return partial(getattr(method, "__func__", method), module)
    return getattr(module, method or "__call__")


def _nnx_backbone(model: nnx.Module, method: Any, keywords_of: Callable[..., Any]) -> Backbone:
    def split(module: nnx.Module) -> Any:
        return nnx.split(module, nnx.Param, ...)

    graph, params, stats = split(nnx.clone(model))

    def apply(params: Any, stats: Any, inputs: Any, *, train: bool) -> tuple[jax.Array, Any]:
        copy = nnx.merge(graph, params, stats, copy=True)
        if train:
            copy.train()
        else:
            copy.eval()
        return _method_of(copy, method)(inputs, **keywords_of(train)), split(copy)[2]

    return Backbone(apply, params, stats)


# Keywords that would be lost ----------------------------------------------------------------------


class _Touched(Exception):
    """Somebody used the probe."""


class _Probe:
    """Stands for a keyword's value and raises at any use."""

    def __getattribute__(self, name: str) -> Any:
        raise _Touched(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Touched


def _check_taken(tx: Any, step: Callable[..., Any], keywords: dict[str, Any], place: str) -> None:
    """Refuse keywords that nobody in the chain names as a parameter, nor uses if given."""
    named = parameters_of([tx.update, *filter(callable, keywords.values())])
    for name in sorted(set(keywords) - named):
        try:  # inject_hyperparams makes its transformation in the update: ask by doing
            probed = known(tx.update, {**keywords, name: _Probe()})
            jax.eval_shape(lambda: step(**probed))  # noqa: B023
        except Exception:
            continue
        raise TypeError(
            f"the keyword {name} is neither {place} nor taken by any transformation of the "
            "optimizer: it would be lost."
        )
