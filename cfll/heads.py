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

HeadPath = str | int | tuple[str | int, ...]

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
        """Predictions (..., o) for features (..., d), in the wider of the two dtypes."""
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
        """The head of d features and o outputs that predicts zero: the best start (F.2)."""
        return cls(jnp.zeros((d, o), dtype), jnp.zeros((o,), dtype) if use_bias else None)


def widest_dtype(*arrays: Any) -> jnp.dtype:
    """float64 if any of these arrays or dtypes (or None) is, otherwise float32."""
    # Under strict promotion result_type would refuse bfloat16 features beside a float32 anchor.
    with jax.numpy_dtype_promotion("standard"):
        dtypes = [jnp.result_type(array) for array in arrays if array is not None]
        return jnp.dtype(jnp.result_type(jnp.float32, *dtypes))


def get_head(params: Any, head: HeadPath) -> LinearHead:
    """Read the head out of a parameter tree.

    Args:
      params: a parameter tree (linen dictionary, ``nnx.State``, Equinox module, ...).
      head: path of the dense layer, ``"head"``, ``"decoder/head"`` or ``("decoder", "head")``.

    Returns:
      The head with a kernel of shape (d, o): a ``kernel`` or ``w`` is taken as it is, a ``weight``
      is (o, d), as Equinox has it.

    Raises:
      ValueError: if there is no dense layer at that path; the message lists those there are.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"decoder": {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}}
      >>> get_head(params, "decoder/head").kernel.shape
      (3, 2)
    """
    path, leaves = join_path(head), {}
    for keys, leaf in tree_flatten_with_path(params)[0]:
        name = _name_below(path, keys)
        if name is not None:
            leaves[name] = leaf
    kernels = [name for name in _KERNELS if name in leaves]
    biases = [name for name in _BIASES if name in leaves]
    if len(kernels) != 1 or len(biases) > 1 or {*kernels, *biases} != set(leaves):
        raise ValueError(_not_found(params, path, leaves))

    kernel, bias = leaves[kernels[0]], leaves[biases[0]] if biases else None
    transposed, shape = kernels[0] in _TRANSPOSED, kernel.shape
    # A pointwise convolution is a dense layer: (1, ..., d, o) in flax, (o, d, 1, ...) in equinox.
    inner, window = (shape[:2], shape[2:]) if transposed else (shape[-2:], shape[:-2])
    if len(shape) < 2 or any(size != 1 for size in window):
        raise ValueError(
            f"the head at {path!r} has a {kernels[0]} of shape {shape}; a closed form "
            "needs one of shape (d, o), as flax.linen.Dense or a pointwise convolution has. "
            "Flatten the features before the head, or vmap the transformation over stacked heads."
        )
    kernel = kernel.reshape(inner) if window else kernel
    kernel = kernel.T if transposed else kernel
    o = kernel.shape[1]
    if bias is not None and bias.shape != (o,):
        if bias.shape != (o, *window):
            raise ValueError(
                f"the head at {path!r} has a {biases[0]} of shape {bias.shape}, but its kernel has "
                f"{o} outputs: the bias must have shape ({o},)."
            )
        bias = bias.reshape(o)
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
    path = join_path(head)

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
    """A tree of booleans like ``params``: ``True`` on the backbone, ``False`` on the head."""
    path = join_path(head)
    return tree_map_with_path(lambda keys, _: _role(keys, path) is None, params)


def check_gradients(updates: Any, params: Any) -> None:
    """Refuse gradients of the backbone alone, which Optax does in words of trees."""
    expected: Any = jax.tree.structure(params)
    if params is not None and jax.tree.structure(updates) != expected:
        raise TypeError(
            "the gradients have another structure than the parameters: differentiate by all "
            "parameters, the head's among them, or put jnp.zeros_like of these in their place."
        )


def as_plain(value: Any) -> Any:
    """What stands for an array, an ``nnx.Variable``, as that array; all else as it is."""
    return jnp.asarray(value) if hasattr(value, "__jax_array__") else value


def check_anchor(anchor: Any, d: int, o: int) -> LinearHead:
    """A head of d features and o outputs, of plain arrays; all else is refused."""
    if not isinstance(anchor, LinearHead):
        raise TypeError(
            f"anchor is a {type(anchor).__name__}; write cfll.LinearHead(kernel, bias) with a "
            "kernel of shape (d, o), or cfll.get_head(params, 'head')."
        )
    anchor = LinearHead(*map(as_plain, anchor))
    if jnp.iscomplexobj(anchor.kernel) or jnp.iscomplexobj(anchor.bias):
        raise TypeError("anchor is complex, but heads are real: write anchor.kernel.real.")
    kernel, bias = jax.tree.map(jnp.shape, tuple(anchor))
    if kernel != (d, o) or (anchor.bias is not None and bias != (o,)):
        raise ValueError(
            f"anchor has a kernel of shape {kernel} and a bias of shape {bias}, but features and "
            f"targets ask for {(d, o)}: write cfll.LinearHead.zeros({d}, {o})."
        )
    return anchor


def check_same_head(expected: LinearHead, given: LinearHead, name: str) -> None:
    """Refuse a head of other shapes than expected; ``name`` is what to call it."""
    want, have = (jax.tree.map(jnp.shape, tuple(head)) for head in (expected, given))
    if want == have:
        return
    if (given.bias is None) != (expected.bias is None):
        words = ("no", "a") if given.bias is None else ("a", "no")
        raise ValueError(
            f"{name} has {words[0]} bias where {words[1]} bias is expected: build both with the "
            f"same `use_bias`, e.g. cfll.LinearHead.zeros(d, o, use_bias={given.bias is None})."
        )
    raise ValueError(f"{name} has shapes {have}, expected {want} = kernel (d, o) and bias (o,).")


def join_path(head: HeadPath) -> str:
    """The address of a head as one string; ``""`` is the root of the tree."""
    if isinstance(head, str):
        head = tuple(head.split("/"))
    parts = (head,) if isinstance(head, int) else head
    if not isinstance(parts, tuple | list):
        raise TypeError(
            f"head is a {type(head).__name__}: write the path of the dense layer in the parameters,"
            " 'head', 'decoder/head' or ('decoder', 'head')."
        )
    return "/".join(str(part) for part in parts if str(part))


def _names(keys: tuple[Any, ...]) -> list[str]:
    names = [keystr((key,), simple=True) for key in keys]
    # nnx.Variable and flax.linen.Partitioned box a leaf in an attribute of that name.
    return names[:-1] if names and names[-1] == "value" else names


def _name_below(path: str, keys: tuple[Any, ...]) -> str | None:
    """The rest of a leaf's path below another; None if it is not there. Names may hold slashes."""
    full = "/".join(_names(keys))
    if not path:
        return full
    return full[len(path) + 1 :] if full.startswith(path + "/") else None


def _role(keys: tuple[Any, ...], path: str) -> str | None:
    """The leaf's name if it belongs to the head at ``path``, else None."""
    name = _name_below(path, keys)
    return name if name in _KERNELS + _BIASES else None


def find_heads(params: Any, like: LinearHead) -> list[str]:
    """The paths of the dense layers that have the shapes of this head."""
    shapes, found = jax.tree.map(jnp.shape, like), []
    for path in _dense_layers(params):
        try:
            same = jax.tree.map(jnp.shape, get_head(params, path)) == shapes
        except ValueError:  # it looks like a dense layer and is none
            continue
        found += [path] if same else []
    return found


def _dense_layers(params: Any) -> list[str]:
    """Where a kernel is."""
    leaves = [(_names(keys), leaf) for keys, leaf in tree_flatten_with_path(params)[0]]
    return sorted(
        "/".join(names[:-1])
        for names, leaf in leaves
        if names and names[-1] in _KERNELS and getattr(leaf, "ndim", 0) >= 2
    )


def _not_found(params: Any, path: str, leaves: dict[str, Any]) -> str:
    dense = _dense_layers(params)
    message = (
        f"no dense layer at head={path!r}: expected a kernel and at most a bias directly below it, "
        f"found {sorted(leaves) or 'nothing'}. Dense-like layers in this tree: {dense or 'none'}."
    )
    if not path.startswith("params") and any(name.startswith("params/") for name in dense):
        message += " Pass variables['params'] rather than all variables."
    if hasattr(params, "shape"):
        message += " For optax.flatten write cfll.closed_form(optax.flatten(...), rule)."
    return message


def float_copy(leaf: Any) -> jax.Array:
    """A copy, at least float32: aliasing a parameter would break buffer donation."""
    dtype = widest_dtype(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, dtype)
    return jnp.array(leaf, dtype, copy=True)
