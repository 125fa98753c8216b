"""Moments with twice the digits of their dtype, around zero and around means.

For `cfll.stats`, one layer above. A head with an intercept is solved from sums around the means;
the sums that can be added are those around zero. In one float the digits of the means are lost on
the way from these to those.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pair(NamedTuple):
    """A rounded sum, whose derivative is the sum's, and what rounding lost."""

    total: jax.Array
    lost: jax.Array

    @classmethod
    def of(cls, total: jax.Array) -> "Pair":
        """A number that lost nothing."""
        return cls(total, jnp.zeros_like(total))

    def plus(self, *terms: jax.Array) -> "Pair":
        """The sum with all terms; by Knuth's two-sum."""
        total, lost = self
        for term in terms:
            before, total = total, total + term
            part = total - before
            lost = lost + jax.lax.stop_gradient((before - (total - part)) + (term - part))
        rounded = total + lost
        return Pair(rounded, jax.lax.stop_gradient(lost - (rounded - total)))

    def plus_product(self, left: jax.Array, right: "Pair") -> "Pair":
        """The sum with left * right; by products of halves, which are exact."""
        factors = (*_halves(right.total), right.lost)
        return self.plus(*(half * factor for half in _halves(left) for factor in factors))

    def each(self, function: Callable[[jax.Array], jax.Array]) -> "Pair":
        """A linear function of both."""
        return Pair(function(self.total), function(self.lost))


def _halves(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers of half the digits that add up to this one."""
    info = jnp.finfo(array.dtype)
    high = jax.lax.reduce_precision(array, info.nexp, (info.nmant - 1) // 2)
    return high, array - high


class Moments(NamedTuple):
    """Sums over samples of rows z = (x, y), of d features and o targets.

    Attributes:
      weight: (), of the weights.
      first: (1, d + o), of z.
      products: (d, d + o), of x z^T.
      squares: (o,), of y^2.
    """

    weight: Pair
    first: Pair
    products: Pair
    squares: Pair


class Centered(NamedTuple):
    """The same sums of z - means, rounded once.

    Attributes:
      means: (1, d + o).
      first, products, squares: as in `Moments`. Around the own means ``first`` is rounding.
    """

    means: jax.Array
    first: jax.Array
    products: jax.Array
    squares: jax.Array


# Of features x and targets y around m and c, exact for any m and c, with exact sums s = sum z:
#   sum (x - m) (z - c)^T = sum x z^T - m s_z^T - (s_x - w m) c^T.
def around(means: jax.Array, moments: Moments) -> Centered:
    """The moments around any means."""
    d = len(moments.products.total)
    weight, sums, products, squares = moments
    first = sums.plus_product(-means, weight)
    products = products.plus_product(-means[:, :d].T, sums)
    products = products.plus_product(-means, first.each(lambda part: part[:, :d].T))
    for part in (sums, first):
        squares = squares.plus_product(-means[0, d:], part.each(lambda part: part[0, d:]))
    return Centered(means, first.total, products.total, squares.total)


def around_zero(centered: Centered, weight: jax.Array) -> Moments:
    """The way back."""
    means, first, products, squares = centered
    d = len(products)
    sums = Pair.of(first).plus_product(means, Pair.of(weight))
    shifted = Pair.of(products).plus(first[:, :d].T * means)
    shifted = shifted.plus_product(means[:, :d].T, sums)
    square = Pair.of(squares).plus(first[0, d:] * means[0, d:])
    square = square.plus_product(means[0, d:], sums.each(lambda part: part[0, d:]))
    return Moments(Pair.of(weight), sums, shifted, square)
