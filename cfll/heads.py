"""LinearHead: what a head is, and where it sits in a parameter tree.

Bottom layer of the design: knows arrays and pytrees, neither solvers nor optimizers.

A head is addressed by its *path* in the tree (``"head"``, ``"decoder/head"`` or a tuple) and its
leaves are replaced by path. Containers are never rebuilt, so a linen dictionary, an ``nnx.State``,
an Equinox module and a Haiku dictionary all keep their own types.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

HeadPath = str | tuple[str | int, ...]

# What the leaves of a dense layer are called: flax, equinox (which stores (o, d)), haiku.
_KERNELS = ("kernel", "weight", "w")
_TRANSPOSED = ("weight",)
_BIASES = ("bias", "b")


class LinearHead(NamedTuple):
    r"""A linear last layer, :math:`\phi \mapsto \phi W + b`, as a pytree.

    The paper writes :math:`W \phi` with :math:`W` of shape (o, d); here samples come first and the
    kernel has the shape of a Flax ``Dense`` kernel.

    Attributes:
      kernel: array of shape (d, o).
      bias: array of shape (o,), or ``None`` for a head without intercept.

    Examples:
      >>> import jax.numpy as jnp
      >>> head = LinearHead(kernel=jnp.array([[1.0], [2.0]]), bias=jnp.array([0.5]))
      >>> print(head(jnp.array([[1.0, 1.0], [0.0, 2.0]])))
      [[3.5]
       [4.5]]
    """

    kernel: jax.Array
    bias: jax.Array | None = None

    def __call__(self, features: jax.Array) -> jax.Array:
        """Apply the head.

        Args:
          features: array of shape (..., d).

        Returns:
          Predictions of shape (..., o), in the wider of the two dtypes.
        """
        dtype = widest_dtype(features, self.kernel)
        outputs = jnp.matmul(
            jnp.asarray(features, dtype),
            jnp.asarray(self.kernel, dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.bias is None:
            return outputs
        bias = jnp.asarray(self.bias, dtype)
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + bias.shape)

    @classmethod
    def zeros(
        cls, d: int, o: int, use_bias: bool = True, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> "LinearHead":
        """The head that predicts zero: the initialization that works best in the paper (F.2).

        Args:
          d: number of features.
          o: number of outputs.
          use_bias: whether the head has an intercept.
          dtype: dtype of the leaves.

        Returns:
          A `LinearHead` of zeros.

        Examples:
          >>> LinearHead.zeros(3, 2).kernel.shape
          (3, 2)
        """
        return cls(jnp.zeros((d, o), dtype), jnp.zeros((o,), dtype) if use_bias else None)


def widest_dtype(*arrays: Any) -> jnp.dtype:
    """The dtype in which heads of these arrays are computed: at least float32.

    Args:
      *arrays: arrays, dtypes or ``None``.

    Returns:
      float64 if any of them is, otherwise float32. Raises nothing under strict promotion, where
      ``jnp.result_type`` would refuse to mix bfloat16 features with a float32 anchor.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtypes = [jnp.result_type(array) for array in arrays if array is not None]
        return jnp.dtype(jnp.result_type(jnp.float32, *dtypes))


def get_head(params: Any, head: HeadPath) -> LinearHead:
    """Read the head out of a parameter tree.

    Args:
      params: a parameter tree (linen dictionary, ``nnx.State``, Equinox module, ...).
      head: path of the dense layer, ``"head"``, ``"decoder/head"`` or ``("decoder", "head")``.

    Returns:
      The head with a kernel of shape (d, o), whatever the framework's own orientation.

    Raises:
      ValueError: if there is no dense layer at that path; the message lists those there are.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"decoder": {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}}
      >>> get_head(params, "decoder/head").kernel.shape
      (3, 2)
    """
    path = split_path(head)
    leaves = {}
    for keys, leaf in tree_flatten_with_path(params)[0]:
        names = _names(keys)
        if names[: len(path)] == path:
            leaves[names[len(path) :]] = leaf

    kernels = [name for name in _KERNELS if (name,) in leaves]
    biases = [name for name in _BIASES if (name,) in leaves]
    known = {(name,) for name in kernels + biases}
    if len(kernels) != 1 or len(biases) > 1 or known != set(leaves):
        raise ValueError(_not_found(params, path, leaves))

    kernel = leaves[(kernels[0],)]
    shape = kernel.shape
    if kernels[0] in _TRANSPOSED:
        kernel = kernel.T if len(shape) == 2 else kernel
    elif len(shape) > 2 and all(size == 1 for size in shape[:-2]):
        kernel = kernel.reshape(shape[-2:])  # a pointwise convolution is a dense layer
    if len(kernel.shape) != 2:
        raise ValueError(
            f"the head at {_show(path)} has a {kernels[0]} of shape {shape}; a closed-form head "
            "needs one of shape (d, o), as flax.linen.Dense or a pointwise convolution has. "
            "Flatten the features before the head, or vmap the transformation over stacked heads."
        )
    bias = leaves[(biases[0],)] if biases else None
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"the head at {_show(path)} has a {biases[0]} of shape {bias.shape}, but its kernel "
            f"has {kernel.shape[1]} outputs: the bias must have shape ({kernel.shape[1]},)."
        )
    return LinearHead(kernel, bias)


def set_head(params: Any, head: HeadPath, value: LinearHead) -> Any:
    """Write a head into a parameter tree, leaf by leaf, in the tree's own shapes and dtypes.

    Args:
      params: a parameter tree.
      head: path of the dense layer, as in `get_head`.
      value: the head to write; kernel of shape (d, o).

    Returns:
      A tree of the same type with only the head's leaves replaced.

    Raises:
      ValueError: if there is no dense layer at that path, or if its shapes are others.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> params = set_head(params, "head", LinearHead.zeros(3, 2))
      >>> float(params["head"]["kernel"].sum())
      0.0
    """
    check_same_head(get_head(params, head), value, f"the head to write at {head!r}")
    path = split_path(head)

    def replace(keys, leaf):
        role = _role(keys, path)
        if role is None:
            return leaf
        new = value.bias if role in _BIASES else value.kernel
        assert new is not None  # check_same_head
        new = new.T if role in _TRANSPOSED else new
        return jnp.asarray(new, leaf.dtype).reshape(leaf.shape)

    return tree_map_with_path(replace, params)


def backbone_mask(params: Any, head: HeadPath) -> Any:
    """A tree of booleans like ``params``: ``True`` on the backbone, ``False`` on the head.

    Args:
      params: a parameter tree.
      head: path of the dense layer, as in `get_head`.

    Returns:
      The mask, as ``optax.masked`` takes it.
    """
    path = split_path(head)
    return tree_map_with_path(lambda keys, _: _role(keys, path) is None, params)


def check_same_head(expected: LinearHead, given: LinearHead, name: str) -> None:
    """Refuse a head of another shape while tracing.

    Args:
      expected: the head that sets the shapes.
      given: the head to check.
      name: what to call it in the message.

    Returns:
      Nothing.

    Raises:
      ValueError: naming both shapes and the fix.
    """
    if tuple(given.kernel.shape) != tuple(expected.kernel.shape):
        raise ValueError(
            f"{name} has a kernel of shape {tuple(given.kernel.shape)}, expected "
            f"{tuple(expected.kernel.shape)} = (features, outputs)."
        )
    if (given.bias is None) != (expected.bias is None):
        have, want = ("no", "a") if given.bias is None else ("a", "no")
        raise ValueError(
            f"{name} has {have} bias where {want} bias is expected: build both with the same "
            "`use_bias`, e.g. cfll.LinearHead.zeros(d, o, use_bias="
            f"{expected.bias is not None})."
        )
    if expected.bias is None or given.bias is None:
        return
    if given.bias.shape != expected.bias.shape:
        raise ValueError(
            f"{name} has a bias of shape {given.bias.shape}, expected {expected.bias.shape}."
        )


def accept_finite(new: LinearHead, old: LinearHead) -> tuple[LinearHead, jax.Array]:
    """The new head if it is finite, else the old one.

    Args:
      new: the head just solved.
      old: the head before; sets the dtypes.

    Returns:
      The head to use, and whether it is the new one, a boolean scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> old = LinearHead.zeros(2, 1)
      >>> kept, accepted = accept_finite(LinearHead(jnp.full((2, 1), jnp.nan), jnp.ones(1)), old)
      >>> float(kept.bias[0]), bool(accepted)
      (0.0, False)
    """
    new = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), new, old)
    accepted = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
    return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old), accepted


def split_path(head: HeadPath) -> tuple[str, ...]:
    """Normalize a head's address to a tuple of names; ``""`` is the root of the tree.

    Args:
      head: ``"decoder/head"`` or ``("decoder", "head")``.

    Returns:
      The names on the way.

    Examples:
      >>> split_path("decoder/head")
      ('decoder', 'head')
    """
    parts = head.split("/") if isinstance(head, str) else head
    return tuple(str(part) for part in parts if str(part))


def _names(keys: tuple[Any, ...]) -> tuple[str, ...]:
    names = tuple(keystr((key,), simple=True) for key in keys)
    # nnx.Variable and flax.linen.Partitioned box a leaf in an attribute of that name.
    return names[:-1] if names and names[-1] == "value" else names


def _role(keys: tuple[Any, ...], path: tuple[str, ...]) -> str | None:
    """The leaf's name if it belongs to the head at ``path``, else None."""
    names = _names(keys)
    inside = names[:-1] == path and names[-1:] and names[-1] in _KERNELS + _BIASES
    return names[-1] if inside else None


def _show(path: tuple[str, ...]) -> str:
    return repr("/".join(path))


def _not_found(params: Any, path: tuple[str, ...], leaves: dict[tuple[str, ...], Any]) -> str:
    flat = tree_flatten_with_path(params)[0]
    dense = sorted(
        "/".join(names[:-1])
        for names, leaf in ((_names(keys), leaf) for keys, leaf in flat)
        if names and names[-1] in _KERNELS and getattr(leaf, "ndim", 0) >= 2
    )
    there = (
        f"what is there: {sorted('/'.join(name) for name in leaves)}"
        if leaves
        else "nothing is there"
    )
    message = (
        f"no dense layer at head={_show(path)}: expected a kernel and at most a bias directly "
        f"below it, {there}. Dense-like layers in this tree: {dense if dense else 'none'}."
    )
    if path[:1] != ("params",) and any(name.startswith("params/") for name in dense):
        message += " Pass variables['params'] rather than all variables."
    return message
