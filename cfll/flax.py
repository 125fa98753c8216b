"""What Flax needs beyond Optax's interface, for linen and for NNX.

``TrainState`` (linen), ``feature_fn`` and ``anchor`` (NNX); ``linen_backbone`` and ``nnx_backbone``
for the two-stage heads of `cfll.iv`.

The only module that imports Flax.

Second forward passes. Algorithms 1 and 2 evaluate the features again, on updated parameters.
Running statistics of batch norm must not be updated twice for one batch. So the feature functions
here run in the mode you ask for by keyword (usually that of training, in which the loss was
computed: the head then fits the features that the gradient saw), use the statistics as they are,
and *discard* what the forward pass would write. The statistics move once per step, by the pass of
your loss.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

from cfll.heads import LinearHead
from cfll.iv import Backbone


class TrainState(train_state.TrainState):
    """Flax's linen ``TrainState`` whose ``apply_gradients`` hands keywords to the optimizer.

    Flax's own passes none on, so that `cfll.closed_form_head` never sees its targets.

    Attributes:
      batch_stats: the running statistics of batch norm, or ``None``.

    Examples:
      >>> import cfll, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> class Net(nn.Module):
      ...     def setup(self):
      ...         self.hidden, self.head = nn.Dense(8), nn.Dense(1)
      ...     def features(self, x):
      ...         return nn.tanh(self.hidden(x))
      ...     def __call__(self, x):
      ...         return self.head(self.features(x))
      >>> x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
      >>> net = Net()
      >>> state = TrainState.create(
      ...     apply_fn=net.apply, params=net.init(jax.random.key(0), x)["params"],
      ...     tx=cfll.closed_form(optax.sgd(0.1), cfll.prox(lam=1.0), head="head"))
      >>> @jax.jit
      ... def train_step(state, x, y):
      ...     def loss_fn(params):
      ...         return jnp.mean((y - state.apply_fn({"params": params}, x)) ** 2)
      ...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
      ...     return state.apply_gradients(
      ...         grads=grads, targets=y, feature_fn=state.feature_fn(x)), loss
      >>> state, loss = train_step(state, x, y)
    """

    batch_stats: Any = None

    @classmethod
    def create(cls, *, apply_fn: Callable[..., Any], params: Any, tx: Any, **kwargs: Any) -> Any:
        """A new state at step 0.

        Args:
          apply_fn: usually ``model.apply``.
          params: the parameters.
          tx: the optimizer.
          **kwargs: other fields, like ``batch_stats``.

        Returns:
          The state. Its ``step`` is an array from the start: Flax's is a Python integer, which
          costs ``jit`` a second entry in its cache.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(step=jnp.zeros((), jnp.int32))

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step of the optimizer.

        Args:
          grads: gradients, a tree like ``params``.
          **kwargs: keywords that name a field of this class (``batch_stats``, fields of a
            subclass) replace it; all others go to ``tx.update``: ``targets``, ``feature_fn``,
            ``features``, ``solution``, ``sample_weight``, and what the rest of the chain takes.

        Returns:
          The next state.

        Raises:
          ValueError, TypeError: as `cfll.closed_form_head`.
        """
        names = {field.name for field in fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in names}
        passed_on = {name: value for name, value in kwargs.items() if name not in names}
        # Flax's own method with a transformation that has the keywords already.
        tx = optax.with_extra_args_support(self.tx)
        bound = optax.GradientTransformation(tx.init, partial(tx.update, **passed_on))
        stepped = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=self.tx)

    def feature_fn(
        self, *args: Any, method: str | Callable[..., Any] | None = "features", **kwargs: Any
    ) -> Callable[[Any], jax.Array]:
        """The features as a function of the parameters, for the keyword ``feature_fn``.

        Args:
          *args: inputs of the model's method.
          method: the method that returns features (..., d), the input of the head.
          **kwargs: keywords of ``model.apply``: the method's own, like ``train=True``, and
            ``rngs={"dropout": key}``. Pass the keys of the loss to see the same dropout mask.

        Returns:
          A function ``params -> features``. What a forward pass writes (running statistics) is
          discarded; see the module's docstring.
        """

        def features(params: Any) -> jax.Array:
            variables = {"params": params}
            if self.batch_stats is None:
                return self.apply_fn(variables, *args, method=method, **kwargs)
            variables["batch_stats"] = self.batch_stats
            outputs, _ = self.apply_fn(
                variables, *args, method=method, mutable=["batch_stats"], **kwargs
            )
            return outputs

        return features

    @property
    def anchor(self) -> LinearHead:
        """The current head in float32, what `cfll.prox_loss` stays near."""
        return optax.tree.get(self.opt_state, "anchor")


def feature_fn(
    model: nnx.Module,
    *args: Any,
    method: str = "features",
    wrt: Any = nnx.Param,
    **kwargs: Any,
) -> Callable[[Any], jax.Array]:
    """The features of an NNX module as a function of its parameters.

    For ``optimizer.update(model, grads, targets=y, feature_fn=feature_fn(model, x))``.

    Args:
      model: the module. Its other state (running statistics, random streams) is copied as it is
        now; what the forward pass would write to it is discarded, see the module's docstring.
      *args: inputs of the method.
      method: the method that returns features (..., d), the input of the head.
      wrt: the filter of the ``nnx.Optimizer``.
      **kwargs: keywords of the method.

    Returns:
      A function ``params -> features``.

    Examples:
      >>> import cfll, jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = nnx.Linear(3, 8, rngs=rngs)
      ...         self.head = nnx.Linear(8, 1, rngs=rngs)
      ...     def features(self, x):
      ...         return nnx.tanh(self.hidden(x))
      ...     def __call__(self, x):
      ...         return self.head(self.features(x))
      >>> x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
      >>> net = Net(nnx.Rngs(0))
      >>> tx = cfll.closed_form(optax.sgd(0.1), cfll.prox(lam=1.0), head="head")
      >>> optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(net, optimizer, x, y):
      ...     loss, grads = nnx.value_and_grad(lambda net: jnp.mean((y - net(x)) ** 2))(net)
      ...     optimizer.update(net, grads, targets=y, feature_fn=feature_fn(net, x))
      ...     return loss
      >>> loss = train_step(net, optimizer, x, y)
    """
    graph, *states = nnx.split(model, wrt, ...)

    def features(params: Any) -> jax.Array:
        copy = nnx.merge(graph, params, *states[1:], copy=True)
        return getattr(copy, method)(*args, **kwargs)

    return features


def anchor(optimizer: nnx.Optimizer) -> LinearHead:
    """The current head of an ``nnx.Optimizer`` in float32, what `cfll.prox_loss` stays near.

    Args:
      optimizer: one whose ``tx`` contains a `cfll.closed_form_head`.

    Returns:
      The head, of plain arrays.
    """
    head = optax.tree.get(optimizer.opt_state, "anchor")
    return jax.tree.map(lambda leaf: leaf[...], head, is_leaf=lambda x: isinstance(x, nnx.Variable))


def linen_backbone(
    module: Any, variables: Any, *, method: str | Callable[..., Any] | None = None
) -> Backbone:
    """A linen module as a `cfll.iv.Backbone`.

    Args:
      module: a linen module that maps inputs to features (n, d). If its method takes ``train``, it
        is told the mode.
      variables: what ``module.init`` returned. "params" is trained; all other collections (running
        statistics of batch norm and spectral norm) are updated by the passes that train.
      method: the method that returns features; ``None`` for ``__call__``.

    Returns:
      The backbone, with these variables as initial values.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> module = nn.Dense(8)
      >>> backbone = linen_backbone(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
      >>> x = jnp.ones((4, 3))
      >>> features, stats = backbone.apply(backbone.params, backbone.stats, x, train=True)
      >>> features.shape
      (4, 8)
    """
    variables = dict(variables)
    params = variables.pop("params")
    function = method if callable(method) else getattr(type(module), method or "__call__")
    takes_train = "train" in inspect.signature(function).parameters

    def apply(params: Any, stats: Any, inputs: Any, *, train: bool) -> tuple[jax.Array, Any]:
        keywords: dict[str, Any] = {"train": train} if takes_train else {}
        both = {"params": params, **stats}
        if not train:
            return module.apply(both, inputs, method=method, **keywords), stats
        features, updated = module.apply(
            both, inputs, method=method, mutable=list(stats), **keywords
        )
        return features, {**stats, **updated}

    return Backbone(apply, params, variables)


def nnx_backbone(model: nnx.Module, *, method: str = "__call__") -> Backbone:
    """An NNX module as a `cfll.iv.Backbone`.

    Args:
      model: a module that maps inputs to features (n, d); it is not changed. Layers with two modes
        (batch norm, dropout) are switched as ``model.train()`` and ``model.eval()`` do.
      method: the method that returns features.

    Returns:
      The backbone, with the model's present values as initial values.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> backbone = nnx_backbone(nnx.Linear(3, 8, rngs=nnx.Rngs(0)))
      >>> x = jnp.ones((4, 3))
      >>> features, stats = backbone.apply(backbone.params, backbone.stats, x, train=True)
      >>> features.shape
      (4, 8)
    """

    def split(module: nnx.Module) -> Any:
        return nnx.split(module, nnx.Param, ...)

    graph, params, stats = split(nnx.clone(model))

    def apply(params: Any, stats: Any, inputs: Any, *, train: bool) -> tuple[jax.Array, Any]:
        copy = nnx.merge(graph, params, stats, copy=True)
        if train:
            copy.train()
        else:
            copy.eval()
        features = getattr(copy, method)(inputs)
        return features, split(copy)[2]

    return Backbone(apply, params, stats)
