"""Solves against a floor and against peers.

The *floor* is what nobody who forms the normal equations can avoid: the same products by BLAS and
one `potrf` and `potrs` by LAPACK, called from SciPy, without checks, guard or refinement.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

import cfll
from benchmarks.core.records import Record
from benchmarks.core.timing import interleaved
from benchmarks.experiments.speed.ratios import BETA, ROUNDS, Cell, Rows, make_batch, ratio
from benchmarks.reporting.summary import Claim, Table, tabulate

FLOOR, OURS, DISPATCH = "floor", "cfll", "an empty jitted call"
PEERS = ("scikit-learn", "lineax")

SHAPES = (
    (32, 512, 10),
    (128, 512, 100),
    (1024, 512, 100),
    (4096, 512, 100),
    (4096, 3072, 1000),
    (128, 3072, 1000),
    (8192, 129, 1),
    (65536, 64, 1),
)


def floor(features: np.ndarray, targets: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The ridge head by BLAS and LAPACK alone: primal or dual by shape, bias by bordering."""
    n, d = features.shape
    potrf, potrs = scipy.linalg.get_lapack_funcs(("potrf", "potrs"), (features,))
    if n < d:
        matrix = features @ features.T
        matrix[np.diag_indices(n)] += beta
        matrix += 1.0  # the bias's column
        factor, _ = potrf(matrix, lower=1, overwrite_a=1)
        alpha, _ = potrs(factor, targets, lower=1)
        return features.T @ alpha, alpha.sum(axis=0)
    matrix = np.empty((d + 1, d + 1), np.float32)
    matrix[:d, :d] = features.T @ features
    matrix[d, :d] = features.sum(axis=0)
    matrix[d, d] = n
    matrix[np.diag_indices(d + 1)] += beta
    rhs = np.concatenate([features.T @ targets, targets.sum(axis=0)[None]])
    factor, _ = potrf(matrix, lower=1, overwrite_a=1)
    solution, _ = potrs(factor, rhs, lower=1)
    return solution[:d], solution[d]


def kernels(features: np.ndarray, targets: np.ndarray) -> dict[str, Callable[[], Any]]:
    """All that solve the same ridge problem, intercept included."""
    import lineax
    from sklearn.linear_model import Ridge

    on_device = jnp.asarray(features), jnp.asarray(targets)
    # As ours: GPUs multiply float32 in TF32 by default.
    dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    @jax.jit
    def by_lineax(features, targets):
        ones = jnp.ones((len(features), 1), features.dtype)
        features = jnp.concatenate([features, ones], axis=1)
        gram = dot(features.T, features) + BETA * jnp.eye(features.shape[1])
        tag = lineax.positive_semidefinite_tag
        operator = lineax.MatrixLinearOperator(gram, tag)
        return jax.vmap(
            lambda rhs: lineax.linear_solve(operator, rhs, lineax.Cholesky()).value,
            in_axes=1,
            out_axes=1,
        )(dot(features.T, targets))

    ours = partial(cfll.ridge_solve, beta=BETA)  # as users call it: outside of jit
    empty = jax.jit(lambda features, targets: cfll.LinearHead(targets[:1], targets[0]))
    found: dict[str, Callable[[], Any]] = {
        FLOOR: lambda: floor(features, targets, BETA),
        OURS: lambda: ours(*on_device),
        DISPATCH: lambda: empty(*on_device),
        "scikit-learn": lambda: Ridge(alpha=BETA).fit(features, targets).coef_,
        "lineax": lambda: by_lineax(*on_device),
    }
    return found


def kernel_case(shape: tuple[int, int, int]) -> Record:
    """One row of the kernels' table."""
    features, targets = make_batch(*shape)
    with threadpool_limits(limits=1):
        return {"seconds": interleaved(kernels(features, targets), ROUNDS)}


def kernel_table(rows: Rows) -> Table:
    """Shapes against floor and peers."""
    others = [p for p in PEERS if any(p in record["seconds"] for _, record in rows)]

    def quotient(other: str) -> Cell:
        return lambda row: str(ratio(row[1], OURS, other) or "")

    return tabulate(
        "Time of `ridge_solve` divided by that of each of the others (below one: ours is faster).",
        rows,
        {
            "(n, d, o)": lambda row: str(tuple(row[0]["shape"])),
            "floor, ms": lambda row: f"{1e3 * np.median(row[1]['seconds'][FLOOR]):.2f}",
            **{f"to {other}": quotient(other) for other in (FLOOR, *others)},
            "empty call, ms": lambda row: f"{1e3 * np.median(row[1]['seconds'][DISPATCH]):.2f}",
        },
    )


def kernel_claims(rows: Rows) -> list[Claim]:
    """At most 1.3 times the floor, no slower than a peer."""

    def slow(other: str, limit: float) -> tuple[bool, str]:
        over = []
        for key, record in rows:
            quotient = ratio(record, OURS, other)
            if quotient is not None and quotient.median > limit:
                over.append(f"{tuple(key['shape'])}: {quotient}")
        return not over, "; ".join(over) or "at every shape"

    claims = []
    for other, limit in ((FLOOR, 1.3), *((peer, 1.0) for peer in PEERS)):
        if any(other in record["seconds"] for _, record in rows):
            sentence = (
                f"A solve takes at most {limit} times the {other}."
                if other == FLOOR
                else f"A solve is no slower than {other} (BLAS on one thread)."
            )
            claims.append(Claim(sentence, *slow(other, limit)))
    return claims
