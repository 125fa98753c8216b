"""Exact references.

A reference in float64 by QR has errors of about 2e-16 times the condition number, squared where
the residual is large: no digits at 1e8. It cannot judge solves in float64, and extended precision
is not there on every machine. But floats are integers over powers of two, and Python's integers
have all digits; a system of 25 unknowns takes a tenth of a second.
"""

import numpy as np

from benchmarks.experiments.numerics.problems import Problem, bordered


def exact_head(problem: Problem) -> np.ndarray:
    """Kernel over bias, each entry the float64 nearest to the exact solution; (d + 1, o) or (d, o).

    The penalty must be positive, or the features of full column rank.
    """
    features, anchor = bordered(problem)
    targets = problem.targets.astype(float)
    shift = max(map(_binary_places, (features, targets, anchor)))
    # All in units of 2^-shift, the residual and the Gram matrix of its square.
    phi, y, w = (_in_units(array, shift) for array in (features, targets, anchor))
    residual = y * 2**shift - phi.dot(w)
    above, below = float(problem.lam).as_integer_ratio()

    def penalized(gram: np.ndarray) -> np.ndarray:
        gram = gram * below
        gram[np.diag_indices(len(gram))] += above << (2 * shift)
        return gram

    n, unknowns = phi.shape
    if n < unknowns:
        solved, scale = _solve_exactly(penalized(phi.dot(phi.T)), residual * below)
        solved = phi.T.dot(solved)
    else:
        solved, scale = _solve_exactly(penalized(phi.T.dot(phi)), phi.T.dot(residual) * below)
    # Python divides integers of any length with one rounding.
    return ((w * scale + solved) / (scale << shift)).astype(float)


def _binary_places(values: np.ndarray) -> int:
    """The smallest k >= 0 that makes integers of values * 2^k, or a few more."""
    _, exponents = np.frexp(values)
    return 53 - int(exponents[values != 0].min(initial=0))


def _in_units(values: np.ndarray, shift: int) -> np.ndarray:
    """The integers values * 2^shift, of dtype object."""
    fractions, exponents = np.frexp(values)
    whole = (fractions * 2.0**53).astype(np.int64).astype(object)
    # Zeros have the exponent 0.
    return whole << np.maximum(exponents + shift - 53, 0).astype(object)


def _solve_exactly(matrix: np.ndarray, rhs: np.ndarray) -> tuple[np.ndarray, int]:
    """Integers x and s with matrix x = s rhs, by elimination without fractions (Bareiss)."""
    m, size, previous = np.hstack([matrix, rhs]), len(matrix), 1
    for k in range(size - 1):
        below = slice(k + 1, None)
        minors = m[below, below] * m[k, k] - np.outer(m[below, k], m[k, below])
        m[below, below] = minors // previous  # without remainder: they are determinants
        previous = m[k, k]
    determinant, x = m[size - 1, size - 1], m[:, size:].copy()
    for k in range(size - 2, -1, -1):
        x[k] = (x[k] * determinant - m[k, k + 1 : size].dot(x[k + 1 :])) // m[k, k]
    return x, determinant
