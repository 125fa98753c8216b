"""Right, flagged or NaN, whatever the scale: the kernels and the transformation on wild numbers.

And the command that measures their accuracy, at a tiny size.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cfll
from benchmarks.core.records import Records
from benchmarks.experiments import numerics
from benchmarks.experiments.numerics import measure, problems
from benchmarks.experiments.numerics.exact import exact_head
from cfll.heads import widest_dtype
from tests.interrupted import stop_and_resume
from tests.oracles import TIMES as EXAMPLES
from tests.oracles import make_problem, spoil_columns

SOLVERS = ("auto", "primal", "dual", "qr", "sums")
DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
# dtype, (n, d, whether the bias is penalized), examples: few shapes, since each is compiled. An
# example is five problems of the same scales, each solved five ways: 10,000 problems.
# Half precision is solved in float32.
CASES = [
    ("float32", (0, 3, True), 20),
    ("float32", (1, 3, True), 500),
    ("float32", (6, 3, True), 500),
    ("float32", (6, 3, False), 200),
    ("float32", (3, 8, True), 500),
    ("float64", (6, 3, True), 100),
    ("float64", (3, 8, False), 100),
    ("bfloat16", (3, 8, True), 50),
    ("float16", (6, 3, True), 50),
]
REPEATS = 5
OUTPUTS = 2
# Relative to the largest target, or product of a feature and a weight that makes a prediction: that
# many times eps / rcond, what `rcond` promises, and at least this.
TIMES, FLOOR = 30, 1e-2
COLUMNS = ("as it is", "as it is", "zero", "repeated", "constant")


class Wild(NamedTuple):
    """Scales of problems; hypothesis looks for bad ones."""

    seed: int
    scale: int
    target_scale: int
    lam: float
    spread: bool
    weighted: bool
    anchored: bool


def wild(dtype):
    """Every number within the range of the dtype, but not its square or product."""
    largest = 4 if dtype == np.float16 else 20
    return st.builds(
        Wild,
        seed=st.integers(0, 2**32 - 1),
        scale=st.integers(-largest, largest),
        target_scale=st.sampled_from([0, 0, 0, -largest, -largest // 2, largest // 2, largest]),
        lam=st.one_of(st.just(0.0), st.integers(-30, 30).map(lambda power: 10.0**power)),
        spread=st.booleans(),
        weighted=st.booleans(),
        anchored=st.booleans(),
    )


def make(drawn, shape, dtype, repeat=0):
    """Features, targets, anchor, penalty and weights."""
    n, d, _ = shape
    rng = np.random.default_rng([drawn.seed, repeat])
    features = rng.normal(size=(n, d)) * 10.0**drawn.scale
    if drawn.spread:
        features *= 10.0 ** rng.integers(-3, 4, size=d)
    spoil_columns(features, rng.choice(COLUMNS, size=d))
    targets = rng.normal(size=(n, OUTPUTS)) * 10.0**drawn.target_scale
    weights = rng.choice([0.0, 1.0, 4.0], size=n) if drawn.weighted else np.ones(n)
    anchor = rng.normal(size=(d + 1, OUTPUTS)) * drawn.anchored
    limit = float(ml_dtypes.finfo(dtype).max)
    solved_in = np.dtype(widest_dtype(dtype))
    return (
        np.clip(features, -limit, limit).astype(dtype),
        np.clip(targets, -limit, limit).astype(dtype),
        cfll.LinearHead(anchor[:-1].astype(solved_in), anchor[-1].astype(solved_in)),
        solved_in.type(drawn.lam),
        weights.astype(solved_in),
    )


@jax.jit(static_argnames="penalize_bias")
def solve_all(features, targets, anchor, lam, weights, penalize_bias):
    """Head and diagnostics by every solver, in the order of SOLVERS, and from sums."""
    d, o = anchor.kernel.shape
    stats = cfll.GramStats.zeros(d, o, dtype=anchor.kernel.dtype)
    stats = stats.add(features, targets, weights)
    return [
        cfll.penalized_solve(
            features,
            targets,
            anchor,
            lam,
            penalize_bias=penalize_bias,
            sample_weight=weights,
            solver=solver,
        )
        for solver in SOLVERS[:-1]
    ] + [stats.solve(anchor, lam, penalize_bias=penalize_bias)]


def reference(problem, penalize_bias):
    """Rows that count, with the ones column; their targets; anchor and solution in float64.

    Columns are scaled to one and directions that float64 cannot see are left out: predictions are
    unique where the head is not.
    """
    features, targets, anchor, lam, weights = problem
    present = weights > 0
    rows = np.hstack([np.asarray(features, float)[present], np.ones((present.sum(), 1))])
    targets = np.asarray(targets, float)[present]
    start = np.vstack([anchor.kernel, anchor.bias]).astype(float)
    root = np.sqrt(np.full(len(start), float(lam)))
    root[-1] *= penalize_bias
    root_weights = np.sqrt(weights[present].astype(float))[:, None]
    stacked = np.vstack([root_weights * rows, np.diag(root)])
    residual = np.vstack([root_weights * (targets - rows @ start), np.zeros_like(start)])
    scale = np.abs(stacked).max(axis=0)
    scale[scale == 0] = 1
    correction = np.linalg.lstsq(stacked / scale, residual, rcond=1e-15)[0] / scale[:, None]
    return rows, targets, start, start + correction


def check(problem, known, solver, head, info):
    """Fail for a wrong answer, or no answer, of which nothing warns."""
    rows, targets, start, expected = known
    dtype = np.finfo(head.kernel.dtype)
    answered = all(np.isfinite(leaf).all() for leaf in head)
    size = np.abs(rows) @ np.abs(start)
    if max(np.abs(expected).max(), size.max(initial=0)) > dtype.max / 10:
        return  # no head, or no residual, in this dtype: infinite, which is seen
    if not answered:
        # Infinite products of features and residuals, before anything was solved: seen.
        largest = np.abs(problem[0].astype(float)).max(initial=0) * max(
            np.abs(problem[1].astype(float)).max(initial=0), size.max(initial=0)
        )
        if 8 * len(problem[0]) * largest > dtype.max:
            return
        assert solver not in ("auto", "qr"), "NaN, and there is a solution"
    if not info.rcond >= measure.SINGULAR * dtype.eps:
        return  # flagged
    assert answered, "NaN, and rcond is healthy"
    size = max(
        np.abs(targets).max(initial=0),
        size.max(initial=0),
        (np.abs(rows) @ np.abs(expected)).max(initial=0),
    )
    found = np.vstack([head.kernel, head.bias]).astype(float)
    # Weights below the smallest normal number are zero to XLA.
    vanished = 10 * float(dtype.tiny) * np.abs(rows).sum(axis=1).max(initial=0)
    error = np.abs(rows @ (found - expected)).max(initial=0)
    tolerance = max(FLOOR, TIMES * float(dtype.eps) / float(info.rcond))
    assert error <= tolerance * size + vanished, "wrong, and rcond is healthy"
    if not len(rows):
        np.testing.assert_allclose(found, start)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "examples"), CASES)
def test_right_or_flagged(name, shape, examples):
    dtype = DTYPES[name]

    @settings(max_examples=examples * EXAMPLES, deadline=None, database=None)
    @given(wild(dtype))
    def run(drawn):
        for repeat in range(REPEATS):
            problem = make(drawn, shape, dtype, repeat)
            known = reference(problem, shape[2])
            solved = jax.tree.map(np.asarray, solve_all(*problem, penalize_bias=shape[2]))
            for solver, (head, info) in zip(SOLVERS, solved, strict=True):
                check(problem, known, solver, head, info)

    with jax.enable_x64(name == "float64"):
        run()


@jax.jit
def transformed(params, features, targets, lam):
    tx = cfll.closed_form_head(cfll.prox(lam))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, targets=targets, features=features)
    return jax.tree.map(jnp.add, params, updates), state.info


@settings(max_examples=500 * EXAMPLES, deadline=None, database=None)
@given(
    wild(np.float32),
    st.sampled_from([None, None, np.nan, np.inf, -np.inf]),
    st.integers(0, 5),
)
def test_a_head_that_is_not_finite_is_never_accepted(drawn, broken, row):
    features, targets, anchor, lam, _ = make(drawn, (6, 3, True), np.float32)
    if broken is not None:
        features[row, 0] = broken
    params = {"head": {"kernel": anchor.kernel, "bias": anchor.bias}}
    new, info = jax.tree.map(np.asarray, transformed(params, features, targets, lam))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert bool(info.accepted) == (int(info.skipped) == 0)
    if broken is not None:
        assert not info.accepted
    if not info.accepted:
        chex.assert_trees_all_equal(new, params)


@settings(max_examples=500 * EXAMPLES, deadline=None, database=None)
@given(
    st.tuples(*[st.integers(0, 3)] * 2),
    st.tuples(*[st.integers(0, 3)] * 2),
    st.sampled_from([(), (2,), (2, 2), (3,)]),
    st.sampled_from([1.0, 0.0, -1.0, 1e-30, 1e30]),
    st.sampled_from(["float32", "float16", "int32", "bool", "complex64"]),
    st.sampled_from([*SOLVERS, None]),
)
def test_arguments_are_solved_or_refused_in_our_words(rows, targets, penalty, lam, dtype, solver):
    features = np.ones(rows, np.float32)
    targets = np.ones(targets, dtype)
    penalty = np.eye(2) * lam if penalty == (2, 2) else np.full(penalty, lam)

    def run():
        return cfll.ridge_solve(features, targets, penalty, solver=solver)

    message = ""
    try:
        assert jax.eval_shape(run).kernel.shape == (rows[1], targets.shape[1])
    except (ValueError, TypeError) as error:
        message = str(error)
    ours = ("features ", "targets ", "beta ", "unknown solver")
    assert not message or message.startswith(ours)


# What the above has found: smallest examples ------------------------------------------------------


def predictions_and_info(features, targets, lam, solver="auto", **kwargs):
    features, targets = np.asarray(features, np.float32), np.asarray(targets, np.float32)
    anchor = cfll.LinearHead.zeros(features.shape[1], targets.shape[1])
    head, info = cfll.penalized_solve(
        features, targets, anchor, np.float32(lam), solver=solver, **kwargs
    )
    return np.asarray(head(features)), info


def test_a_tiny_penalty_does_not_make_the_dual_vanish():
    # alpha is lam / |features|^2 of the residual: 1e-40, which float32 does not have.
    got, _ = predictions_and_info(np.full((1, 3), 1e5), [[1.0]], 1e-30)
    np.testing.assert_allclose(got, [[1.0]], rtol=1e-3)


@pytest.mark.parametrize("lam", [0.0, 1e-45, 1e-38])
def test_a_wide_batch_whose_squares_vanish_has_a_solution(lam):
    # The square of the unit of the fallback is zero in float32.
    features = np.full((1, 3), 4.7e-20, np.float32)
    head = jax.jit(lambda lam: cfll.ridge_solve(features, np.ones((1, 1)), lam, use_bias=False))(
        lam
    )
    np.testing.assert_allclose(head(features), [[1.0]], rtol=1e-3)


def test_products_of_large_features_and_targets_are_right_or_not_finite():
    rng = np.random.default_rng(0)
    features = np.asarray(rng.normal(size=(6, 3)), np.float32) * np.float32(3e18)
    targets = 30 * features[:, :1]  # 1e20; the products are 1e39
    # Scaling the residual would save this, at the price of one more message between devices.
    got, _ = predictions_and_info(features, targets, 1.0)
    assert not np.isfinite(got).all() or np.allclose(got, targets, rtol=1e-3)


def test_refinement_of_a_dual_on_a_tall_batch_does_not_diverge():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(6, 3)), rng.normal(size=(6, 1))
    features[1] = features[0] + 0.03 * features[1]
    weights = np.asarray([1, 1, 0, 0, 0, 0], np.float32)
    got, info = predictions_and_info(features, targets, 1e-12, "dual", sample_weight=weights)
    wrong = np.abs(got - targets)[:2].max() > 1e-2
    assert not (wrong and info.rcond >= measure.SINGULAR * np.finfo(np.float32).eps)


@pytest.mark.parametrize("wide", [False, True])
def test_a_chain_of_small_pivots_is_as_singular_as_their_product(wide):
    # No column is explained by the ones before it to more than 1 - 1e-4, as pivots see; but all
    # three together have a smallest eigenvalue of 2.5e-9 of the largest.
    columns = np.array([[1, 1, 0], [0, 1e-2, 1], [0, 0, 1e-2]])
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 3)))[0]
    features = basis @ columns if not wide else columns.T @ basis.T
    features = np.asarray(features, np.float32)
    targets = np.asarray(rng.normal(size=(len(features), 1)), np.float32)
    lam = 1e-12
    penalty_root = np.sqrt(lam) * np.eye(features.shape[1])
    stacked = np.vstack([features.astype(float), penalty_root])
    rhs = np.vstack([targets.astype(float), np.zeros((features.shape[1], 1))])
    expected = features @ np.linalg.lstsq(stacked, rhs, rcond=None)[0]
    anchor = cfll.LinearHead.zeros(features.shape[1], 1, use_bias=False)
    head, info = cfll.penalized_solve(features, targets, anchor, lam)
    assert cfll.Route(info.route) == cfll.Route.QR
    np.testing.assert_allclose(head(features), expected, atol=3e-3)


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(20, 5), (5, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_exact_reference_is_that_of_qr(n, d, bias):
    problem = make_problem(n, d, 2, bias=bias)
    exact = exact_head(
        problems.Problem(
            problem.features, problem.targets, problem.kernel, problem.bias, np.float64(problem.lam)
        )
    )
    np.testing.assert_allclose(exact, problem.solution(), rtol=1e-9)


def test_the_exact_reference_has_all_digits():
    # x = 1e12 / (1 + 1e24 lam) for one feature of 1e12: in float64 lam would be lost.
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    problem = problems.Problem(1e12 * one, one, zero, None, np.float64(2.0**-20))
    np.testing.assert_array_equal(exact_head(problem), 1 / (1e12 + 2.0**-20 / 1e12) * one)
    twins = np.array([[1, 1], [1, 1 + 2.0**-50]])
    two = problems.Problem(twins, np.array([[0.0], [1.0]]), np.zeros((2, 1)), None, np.float64(0))
    np.testing.assert_array_equal(exact_head(two), [[-(2.0**50)], [2.0**50]])


@pytest.mark.parametrize("condition", [1, 1e3, 1e9])
@pytest.mark.parametrize("size", [(20, 5, True), (20, 5, False), (5, 20, True)])
def test_features_have_the_spectrum_that_was_asked_for(size, condition):
    size = problems.Size(*size)
    rng = np.random.default_rng(0)
    features, largest = problems.with_prescribed_spectrum(rng, size, condition)
    matrix = np.hstack([features, np.ones((size.n, int(size.bias)))])
    values = np.linalg.svd(matrix, compute_uv=False)[: min(matrix.shape)]
    np.testing.assert_allclose(values[0] / values[-1], condition, rtol=1e-5)
    np.testing.assert_allclose(values[0], largest)


@pytest.mark.slow
def test_the_command_measures_stops_and_resumes(tmp_path, monkeypatch, capsys):
    tiny = problems.Settings(
        num_seeds=1,
        num_outputs=1,
        sizes=(("tall", problems.Size(8, 4, True)), ("wide", problems.Size(3, 6, True))),
        conditions=(1, 1e6),
        penalties=(0, 1e-4),
        paper_penalties=(1e-2,),
        dtypes=("float32",),
    )
    monkeypatch.setattr(numerics, "SETTINGS", tiny)
    path = tmp_path / "numerics.jsonl"
    lines = stop_and_resume(lambda: numerics.numerics(out=tmp_path), path, monkeypatch)
    assert len(lines) == len(numerics.cases(tiny)) * len(numerics.SOLVERS)
    assert "rcond" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "numerics.png").stat().st_size > 10_000

    # Half of the records, as an interrupted run leaves them: what is there is shown.
    path.write_text("\n".join(lines[:7]) + "\n")
    summary = numerics.summarize(Records(path), tmp_path, "cpu")
    assert summary.tables[0].rows
    none = Records(tmp_path / "elsewhere" / "none.jsonl")
    assert numerics.summarize(none, tmp_path, "cpu").claims[0].holds is None


def test_solvers_err_as_they_should():
    settings = problems.Settings(num_seeds=1)
    case = problems.Case("float32", problems.SPECTRUM, problems.Size(20, 6, True), 1e-4, 1e2)
    problem = problems.make_problem(case, settings.num_outputs, 0)
    exact = exact_head(problem)
    for solver in ("auto", "primal", "dual", "qr"):
        assert measure.measure(problem, exact, solver)["head"] < 1e-4
    wrong = measure.measure(problem, exact * 1.1, "qr")
    np.testing.assert_allclose(wrong["head"], 1 / 11, rtol=1e-2)
