r"""Problem: the penalized least-squares problem of one batch, as arrays, and products with it.

With features :math:`\tilde\Phi = (\Phi, 1)`, weights S, penalties Lambda of the kernel and mu of
the bias, the normal equations have the matrix :math:`A = \tilde\Phi^\top S \tilde\Phi +
\mathrm{diag}(\Lambda, \mu)`. What multiplies with it is here; what solves is a file each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfll.heads import LinearHead
from cfll.samples import concrete, nan_where_negative
from cfll.solve.cholesky import dot, dot_over_rows


class Residual(NamedTuple):
    """What targets leave at the anchor: rows + mean, a first guess of the bias's correction.

    Where targets have a mean their products with the features would lose the digits of the rest.

    Attributes:
      rows: (n, o), of weighted mean zero if there is a free bias.
      mean: (1, o), less the share of a penalized bias; None without a bias.
    """

    rows: jax.Array
    mean: jax.Array | None


class Problem(NamedTuple):
    """Everything about a least-squares problem but its right-hand side.

    Attributes:
      features: (n, d).
      weights: (n,), or None.
      penalty: Lambda, (), (d,) or (d, d).
      bias_penalty: mu, (); None without a bias.
    """

    features: jax.Array
    weights: jax.Array | None
    penalty: jax.Array
    bias_penalty: jax.Array | None

    @property
    def has_bias(self) -> bool:
        """Whether the head has an intercept."""
        return self.bias_penalty is not None

    def weigh(self, rows: jax.Array) -> jax.Array:
        """S rows, for rows of shape (n, k)."""
        return rows if self.weights is None else rows * self.weights[:, None]

    def total(self) -> jax.Array:
        """The sum of the weights, ()."""
        if self.weights is None:
            return jnp.full((), self.features.shape[0], self.features.dtype)
        return jnp.sum(self.weights)

    def centered(self, rows: jax.Array) -> Residual:
        """Rows (n, o) as a `Residual`."""
        if self.bias_penalty is None:
            return Residual(rows, None)
        total = self.total() + self.bias_penalty  # as far as the bias will go there
        weights = jnp.ones((1,), rows.dtype) if self.weights is None else self.weights
        shares = weights / jnp.where(total == 0, jnp.ones_like(total), total)
        mean = jnp.sum(rows * shares[:, None], axis=0, keepdims=True)
        return Residual(rows - mean, mean)

    def adjoint(self, rows: jax.Array) -> LinearHead:
        """Phi~^T S rows, for rows of shape (n, o)."""
        return self.transposed(self.weigh(rows))

    def transposed(self, rows: jax.Array) -> LinearHead:
        """Phi~^T rows, for rows of shape (n, o)."""
        bias = jnp.sum(rows, axis=0) if self.has_bias else None
        return LinearHead(dot_over_rows(self.features, rows), bias)

    def penalize(self, head: LinearHead) -> LinearHead:
        """diag(Lambda, mu) head."""
        if self.penalty.ndim == 2:
            kernel = dot(self.penalty, head.kernel)
        else:
            kernel = as_column(self.penalty) * head.kernel
        if self.bias_penalty is None or head.bias is None:
            return LinearHead(kernel)
        return LinearHead(kernel, self.bias_penalty * head.bias)

    def multiply(self, head: LinearHead) -> LinearHead:
        """A head, by two products with the features."""
        return add(self.adjoint(head(self.features)), self.penalize(head))

    def right_hand_side(self, residual: Residual) -> LinearHead:
        """That of a correction beyond (0, mean): Phi~^T S rows - (0, mu mean)."""
        kernel, bias = self.adjoint(residual.rows)
        if bias is None or residual.mean is None or self.bias_penalty is None:
            return LinearHead(kernel)
        return LinearHead(kernel, bias - self.bias_penalty * residual.mean[0])

    def normal_residual(self, head: LinearHead, residual: Residual) -> LinearHead:
        """The right-hand side - A head, from what is left of the residual of the data."""
        left = residual._replace(rows=residual.rows - head(self.features))
        return jax.tree.map(jnp.subtract, self.right_hand_side(left), self.penalize(head))

    def left_of(self, rows: jax.Array | None, head: LinearHead) -> jax.Array:
        """S (rows - Phi~ head), (n, o)."""
        predicted = head(self.features)
        return self.weigh(-predicted if rows is None else rows - predicted)

    def root_weighted(self) -> tuple[jax.Array, jax.Array]:
        """Z = S^{1/2} Phi, (n, d), and s = S^{1/2} 1, (n, 1)."""
        if self.weights is None:
            return self.features, jnp.ones((self.features.shape[0], 1), self.features.dtype)
        root = jnp.sqrt(self.weights)[:, None]
        return self.features * root, root


def add(left: LinearHead, right: LinearHead) -> LinearHead:
    """The sum of two heads, both with or both without a bias."""
    return jax.tree.map(jnp.add, left, right)


def scale(head: LinearHead, units: jax.Array) -> LinearHead:
    """Each output times its unit, (1, o)."""
    return LinearHead(head.kernel * units, None if head.bias is None else head.bias * units[0])


def as_column(penalty: jax.Array) -> jax.Array:
    """A scalar or a penalty per feature, for products with (d, k)."""
    return penalty if penalty.ndim == 0 else penalty[:, None]


def stack_head(head: LinearHead) -> jax.Array:
    """Kernel over bias, (d + 1, o), or (d, o) without a bias: an unknown of the bordered system."""
    if head.bias is None:
        return head.kernel
    return jnp.concatenate([head.kernel, head.bias[None, :]])


def split_head(rows: jax.Array, has_bias: bool) -> LinearHead:
    """The inverse of `stack_head`."""
    return LinearHead(rows[:-1], rows[-1]) if has_bias else LinearHead(rows)


def bordered_gram(
    gram: jax.Array, feature_sum: Any, total: jax.Array, penalty: jax.Array, bias_penalty: Any
) -> jax.Array:
    """A = ((gram + Lambda, feature_sum), (feature_sum^T, total + mu)); no border without a bias."""
    d = gram.shape[0]
    gram = gram + (penalty if penalty.ndim == 2 else jnp.diag(jnp.broadcast_to(penalty, (d,))))
    if bias_penalty is None:
        return gram
    corner = (total + bias_penalty).reshape(1, 1)
    top = jnp.concatenate([gram, feature_sum[:, None]], axis=1)
    return jnp.concatenate([top, jnp.concatenate([feature_sum[None, :], corner], axis=1)])


def power_of_two_above(rows: jax.Array) -> jax.Array:
    """For each column the power of two above its largest entry, one where that is zero; (1, o)."""
    largest = jnp.max(jnp.abs(rows), axis=0, keepdims=True, initial=0)
    usable = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, jnp.ones_like(largest)))
    # A float has one exponent more below than above one: the unit must have a finite inverse.
    low, high = jnp.finfo(rows.dtype).minexp + 1, jnp.finfo(rows.dtype).maxexp - 2
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, low, high))


# Penalties ----------------------------------------------------------------------------------------


def check_penalty(name: str, penalty: Any, d: int, rows: int, free_bias: bool) -> None:
    """Refuse penalties of a wrong shape, negative ones, and those that leave the head undefined."""
    check_value(name, penalty)
    shape = jnp.shape(penalty)
    if shape not in ((), (d,), (d, d)):
        raise ValueError(
            f"{name} has shape {shape}, but features has {d} columns: write a scalar, a vector of "
            f"shape ({d},) or a matrix of shape ({d}, {d}). Over a grid of values use jax.vmap."
        )
    values = concrete(penalty)
    if values is None:
        return
    diagonal = np.diagonal(values) if values.ndim == 2 else np.broadcast_to(values, (d,))
    if values.ndim == 2 and not np.allclose(values, values.T, rtol=1e-5, atol=0):
        raise ValueError(f"{name} is not symmetric: write ({name} + {name}.T) / 2.")
    roots = np.sqrt(diagonal, dtype=float)
    if values.ndim == 2 and (abs(values) > np.outer(roots, roots) * (1 + 1e-5)).any():
        raise ValueError(f"{name} is not positive semi-definite: write {name} = root.T @ root.")
    free = int((diagonal == 0).sum())
    if free and free + free_bias > rows:
        raise ValueError(
            f"{name} is zero for {free} of {d} features, but there are only {rows} samples: the "
            f"least-squares problem has no unique solution. Write {name} > 0, e.g. 1e-3."
        )


def check_value(name: str, penalty: Any) -> None:
    """Refuse what is no real number, and one that is negative, NaN or infinite, if it is known."""
    if callable(penalty):
        raise TypeError(f"{name} is a function; here stands its value: write {name}(step).")
    if penalty is None or isinstance(penalty, str) or np.iscomplexobj(penalty):
        raise TypeError(f"{name} is {penalty!r}; write a real number > 0, e.g. {name}=10.0.")
    values = concrete(penalty)
    if values is None:
        return
    diagonal = np.diagonal(values) if values.ndim == 2 else values
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is NaN or infinite: write a finite {name} > 0, e.g. 10.0.")
    if (diagonal < 0).any():
        raise ValueError(f"{name} is negative (smallest {diagonal.min():g}): write {name} > 0.")


def as_penalty(penalty: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
    """The penalty as an array, symmetric if it is a matrix; NaN where it is negative."""
    array = jnp.asarray(penalty, dtype)
    if array.ndim < 2:
        return nan_where_negative(array)
    negative = jnp.any(jnp.diagonal(array) < 0)
    return jnp.where(negative, jnp.full((), jnp.nan, dtype), (array + array.T) / 2)


def bias_penalty_of(penalty: jax.Array, has_bias: bool, penalize_bias: bool) -> jax.Array | None:
    """mu: the penalty of an average feature, which for a scalar is the scalar; None: no bias."""
    if not has_bias:
        return None
    if not penalize_bias:
        return jnp.zeros((), penalty.dtype)
    return jnp.mean(jnp.diagonal(penalty) if penalty.ndim == 2 else penalty)
