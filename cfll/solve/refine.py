"""Iterative refinement of Cholesky's answer, as far as the head has digits.

The relative error of that answer is at most about eps / rcond, for the worst targets. What the next
step of refinement would change says what *these* targets got. So `step_limit` says how many steps
may be needed, and `refine` stops when a step changes nothing beside the head, which is anchor plus
correction: as a network converges its corrections become small, and their last digits are of no
use. Of many outputs a few random combinations are asked first, since a step for all of them costs
as much as the solve.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfll.samples import varying_like
from cfll.solve.cholesky import dot
from cfll.solve.problem import power_of_two_above

# rcond, in multiples of the machine epsilon, below which at most one step of refinement is needed,
# and at most three. In float32: 2e-3 and 1.2e-4. A step multiplies the error by about eps / rcond.
_ONE_STEP, _THREE_STEPS = 2e4, 1e3
# Below this ("auto" takes QR, in float32 from 6e-6 on) refinement does not help.
HOPELESS = 5e1
# A step that changes no more of the head than this, in multiples of the machine epsilon and the
# root mean square over outputs, is not needed.
_SETTLED = 300
# How many combinations of the outputs are refined to see that. Errors may all point one way, and
# then their square has a chi-squared distribution with as many degrees of freedom: with 8 it is
# taken for less than 1 / 25 of itself once in 40,000 times.
_PROBES = 8


def is_hopeless(rcond: jax.Array) -> jax.Array:
    """Whether Cholesky's answer is beyond repair; NaN is."""
    return ~(rcond >= HOPELESS * jnp.finfo(rcond.dtype).eps)


def step_limit(rcond: jax.Array, x: jax.Array, anchor: jax.Array | None) -> jax.Array:
    """How many steps the solution x (m, o), to be added to the anchor's rows, may need; int32."""
    eps = jnp.finfo(x.dtype).eps
    few = jnp.where(rcond >= _ONE_STEP * eps, 0, 1)  # NaN: three
    limit = jnp.where(rcond >= _THREE_STEPS * eps, few, 3).astype(jnp.int32)
    if anchor is None:
        return limit
    # The error is relative to the correction; what counts is the head. An anchor far away is
    # canceled by the correction; from one that is near, the correction is small.
    units, head = _in_units(x, anchor)
    enlarged = jnp.linalg.norm(x / units) / jnp.linalg.norm(head)  # not a number: refine
    exact = rcond >= _ONE_STEP * eps * enlarged
    return jnp.where(exact, 0, jnp.maximum(limit, 1))


def refine(
    solve: Callable[[jax.Array], jax.Array],
    residual_of: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    targets: Any,
    limit: jax.Array,
    anchor: jax.Array | None,
    num_auxiliary: int = 0,
) -> jax.Array:
    """Solve again for what is left of x, (m, o), until that changes nothing or ``limit`` times.

    Both functions work column by column; ``targets`` is an array with the columns of x, or a tree
    of them. ``residual_of(x, targets)`` is taken from the data, not from the Gram matrix, whose
    rounding is what to undo. The rows of the anchor are added to those
    of x, without the first ``num_auxiliary``, to make the head.
    """
    outputs = x.shape[1]
    probed = outputs >= 8 * _PROBES
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (outputs, _PROBES))
    units, head = _in_units(x[num_auxiliary:], anchor)
    size = jnp.linalg.norm(head)
    tolerance = _SETTLED * jnp.finfo(x.dtype).eps

    def settled(change: jax.Array, combinations: float) -> jax.Array:
        allowed = tolerance * size * math.sqrt(combinations)
        return jnp.linalg.norm(change[num_auxiliary:]) <= allowed  # NaN is not settled

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        change = solve(residual_of(x, targets))
        return x + change, settled(change / units, 1)

    def step_if_needed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        combined = jnp.asarray(signs, x.dtype) / units.T
        change = solve(
            residual_of(dot(x, combined), jax.tree.map(lambda rows: dot(rows, combined), targets))
        )
        done = settled(change, _PROBES)
        return jax.lax.cond(done, lambda x: (x, done), step, x)

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        count, x, _ = state
        x, done = step_if_needed(x) if probed else step(x)
        return count + 1, x, done

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, _, done = state
        return (count < limit) & ~done

    start = jnp.zeros((), jnp.int32), x, jnp.zeros((), bool)
    start = varying_like(start, x, *jax.tree.leaves(targets))
    return jax.lax.while_loop(unfinished, body, start)[1]


def _in_units(x: jax.Array, anchor: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A unit for each output, (1, o), and the head x + anchor in it: outputs may differ a lot."""
    head = x if anchor is None else x + anchor
    units = power_of_two_above(head)
    return units, head / units
