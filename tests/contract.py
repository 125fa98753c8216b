"""Every solver by every way of calling: cases, ways and the one oracle of `test_contract.py`.

As a program it runs the ways that need several devices, and prints what failed as one JSON object:
the number of devices is fixed when JAX starts.
"""

import contextlib
import itertools
import json
from collections import Counter
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding

import cfll
from tests.oracles import make_problem

# The one place that lists the solvers: what to write, samples, features. None: from sums.
SOLVERS = {
    "auto, tall": ("auto", 12, 4),
    "auto, wide": ("auto", 4, 8),
    "primal": ("primal", 12, 4),
    "dual": ("dual", 4, 8),
    "qr": ("qr", 12, 4),
    "cg": (cfll.CG(tolerance=1e-7, max_iterations=200), 12, 4),
    "sums": (None, 12, 4),
}
OUTPUTS, DEVICES = 2, 4
# dtype of features, targets and anchor; error of the head, and of its derivative, which comes in
# the dtype of the features.
DTYPES = {
    "float32": (np.float32, 1e-5, 1e-4),
    "float64": (np.float64, 1e-10, 1e-9),
    "bfloat16": (ml_dtypes.bfloat16, 1e-5, 3e-2),
    "float16": (np.float16, 1e-5, 3e-3),
}


# Ways of calling: a function of one batch on several of them --------------------------------------


jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster


def stacked(batches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def unstacked(tree):
    return [jax.tree.map(lambda leaf: leaf[k], tree) for k in range(len(jax.tree.leaves(tree)[0]))]  # noqa: B023


def by_vmap_over_penalties(run, batches):
    features, targets, anchor, _, weights = batches[0]
    penalties = jnp.stack([batch[3] for batch in batches])
    one = (features, targets, anchor)
    return unstacked(jit(jax.vmap(lambda penalty: run(*one, penalty, weights)))(penalties))


def by_scan(run, batches):
    def body(count, batch):
        return count + 1, run(*batch)

    return unstacked(jit(lambda rows: jax.lax.scan(body, 0, rows)[1])(stacked(batches)))


def by_export(run, batches):
    # A head is no type of jax.export's: leaves go in and out.
    leaves, structure = jax.tree.flatten(batches[0])
    flat = jit(lambda *leaves: jax.tree.leaves(run(*jax.tree.unflatten(structure, leaves))))
    exported = jax.export.export(flat)(*leaves)
    if find_spec("flatbuffers"):  # which jax does not require
        exported = jax.export.deserialize(exported.serialize())
    outputs = jax.tree.structure(jax.eval_shape(run, *batches[0]))
    return [
        jax.tree.unflatten(outputs, exported.call(*jax.tree.leaves(batch))) for batch in batches
    ]


def by_checkify(run, batches):
    checked = jit(checkify.checkify(run, errors=checkify.all_checks))
    results = []
    for batch in batches:
        error, result = checked(*batch)
        error.throw()
        results.append(result)
    return results


def by_jit(run, batches):
    run = jit(run)
    return [run(*batch) for batch in batches]


def by_debug_nans(run, batches):
    with jax.debug_nans(True):
        return by_jit(run, batches)


def by_debug_infs(run, batches):
    with jax.debug_infs(True):
        return by_jit(run, batches)


def by_shard_map(run, batches):
    """Samples of its own for each device, the anchor and the penalty the same on all."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))

    def on_device(samples, anchor, penalty):
        features, targets, weights = jax.tree.map(lambda leaf: leaf[0], samples)
        result = run(features, targets, anchor, penalty, weights)
        return jax.tree.map(lambda leaf: leaf[None], result)

    specs, spec = (jax.P("x"), jax.P(), jax.P()), jax.P("x")
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=spec)
    samples = stacked([(features, targets, weights) for features, targets, *_, weights in batches])
    return unstacked(jit(mapped)(samples, *batches[0][2:4]))


def by_explicit_mesh(run, batches):
    """The samples over the devices, in the types of the arrays."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = (jax.P("x"), jax.P("x"), jax.P(), jax.P(), jax.P("x"))
        put = [NamedSharding(mesh, part) for part in spec]
        batches = [
            tuple(None if part is None else jax.device_put(part, to) for part, to in zip(b, put))  # noqa: B905
            for b in batches
        ]
        return by_jit(run, batches)


WAYS = {
    "eager": lambda run, batches: [run(*batch) for batch in batches],
    "jit": by_jit,
    "vmap": lambda run, batches: unstacked(jit(jax.vmap(run))(*stacked(batches))),
    "vmap over lam": by_vmap_over_penalties,
    "scan": by_scan,
    "export": by_export,
    "debug_nans": by_debug_nans,
    "debug_infs": by_debug_infs,
    "checkify": by_checkify,
}
WAYS_OF_DEVICES = {"shard_map": by_shard_map, "explicit mesh": by_explicit_mesh}


# Cases --------------------------------------------------------------------------------------------


class Case(NamedTuple):
    solver: str
    way: str
    bias: str
    penalty: str
    weighted: bool
    dtype: str
    anchored: bool
    derivative: bool

    def __str__(self):
        weights, order = "weighted" * self.weighted, "derivative" * self.derivative
        start = "prox" if self.anchored else "ridge"
        parts = (self.solver, self.way, self.bias, self.penalty, self.dtype, start, weights, order)
        return "; ".join(filter(None, parts))


# What all batches of a way have in common.
SHARED = {
    "vmap over lam": ("features", "targets", "kernel", "bias", "weights"),
    "shard_map": ("kernel", "bias", "lam"),
}
OPTIONS = list(
    itertools.product(
        ["no bias", "bias", "free bias"],
        ["scalar", "vector", "matrix"],
        [False, True],
        DTYPES,
        [True, False],
        [True, False],
    )
)


def pairs(case):
    return set(itertools.combinations(enumerate(case), 2))


def covering_cases(ways):
    """Every solver by every way, with options of which any two meet, as evenly as can be."""
    cases, met = [], Counter()
    for start in itertools.product(SOLVERS, ways):
        # Derivatives by these compile for seconds.
        options = [row for row in OPTIONS if not (start[1] in ("eager", "checkify") and row[-1])]
        news = [sum(0.5 ** met[pair] for pair in pairs(start + option)) for option in options]
        case = start + options[np.argmax(news)]
        met.update(pairs(case))
        cases.append(Case(*case))
    return cases


def batches_of(case):
    """Problems whose numbers are those that the dtype holds."""
    _, n, d = SOLVERS[case.solver]
    problems = []
    for seed in range(DEVICES if case.way == "shard_map" else 2):
        problem = make_problem(
            n,
            d,
            OUTPUTS,
            condition=100.0,
            penalty=case.penalty,
            bias=case.bias != "no bias",
            penalize_bias=case.bias != "free bias",
            weighted=case.weighted,
            seed=seed,
        )
        dtype = DTYPES[case.dtype][0]
        for name in ("features", "targets", "kernel", "bias"):
            value = getattr(problem, name)
            if value is not None:
                value = value * (case.anchored or name not in ("kernel", "bias"))
                setattr(problem, name, value.astype(dtype).astype(float))
        for name in SHARED.get(case.way, ()) if problems else ():
            setattr(problem, name, getattr(problems[0], name))
        problems.append(problem)
    return problems


def directions(case, problem):
    """A direction for features, targets, kernel, penalty and weights, and a cotangent.

    None: not differentiated by that. Inside shard_map the derivative by what is the same on all
    devices is a sum over them.
    """
    rng = np.random.default_rng(7)
    lam = rng.uniform(0.05, 0.1, np.shape(problem.lam))
    lam = (lam + lam.T) / 2
    arrays = problem.features, problem.targets, problem.kernel
    out = np.vstack([problem.kernel, np.zeros((int(problem.bias is not None), OUTPUTS))])
    normal = [rng.normal(size=np.shape(array)) for array in (*arrays, out)]
    along = [*normal[:3], lam, rng.normal(size=len(problem.features))]
    if not case.anchored or case.way == "shard_map":
        along[2] = None
    if case.way == "shard_map":
        along[3] = None
    if problem.weights is None:
        along[4] = None
    return along, normal[3]


def oracle(case, problem):
    """The head, kernel over bias, and the derivative of its sum with a cotangent along directions.

    By a complex step through the normal equations in float64, which has no cancellation.
    """
    along, cotangent = directions(case, problem)
    n, d = problem.features.shape
    weights = np.ones(n) if problem.weights is None else problem.weights
    values = problem.features, problem.targets, problem.kernel, problem.lam, weights
    step = 1e-30
    features, targets, anchor, lam, weights = (
        np.asarray(value) + 1j * step * (0 if part is None else part)
        for value, part in zip(values, along, strict=True)
    )
    penalty = lam if lam.ndim == 2 else np.diag(np.broadcast_to(lam, (d,)))
    if problem.bias is not None:
        features = np.hstack([features, np.ones((n, 1))])
        corner = np.trace(penalty) / d * problem.penalize_bias
        penalty = np.block([[penalty, np.zeros((d, 1))], [np.zeros((1, d)), corner]])
        anchor = np.vstack([anchor, problem.bias])
    rows = features.T * weights
    right = rows @ (targets - features @ anchor)
    head = anchor + np.linalg.solve(rows @ features + penalty, right)
    return head.real, np.sum(cotangent * head).imag / step


def run_of(case, problem):
    """The solver as a function of one batch: head, and derivative as the oracle has it."""
    solver, _, d = SOLVERS[case.solver]
    penalize_bias, use_bias = case.bias != "free bias", case.bias != "no bias"
    along, cotangent = directions(case, problem)
    solved_in = np.float64 if case.dtype == "float64" else np.float32

    def head_of(features, targets, anchor, penalty, weights):
        if solver is None:
            stats = cfll.GramStats.zeros(d, OUTPUTS, use_bias, solved_in)
            stats = stats.add(features, targets, weights)
            if case.anchored:
                return stats.prox(anchor, penalty, penalize_bias=penalize_bias)
            return stats.ridge(penalty, penalize_bias=penalize_bias)
        keywords = {"penalize_bias": penalize_bias, "sample_weight": weights, "solver": solver}
        if case.anchored:
            return cfll.prox_solve(features, targets, anchor, penalty, **keywords)
        return cfll.ridge_solve(features, targets, penalty, use_bias=use_bias, **keywords)

    def rows_of(head):
        return head.kernel if head.bias is None else jnp.vstack([head.kernel, head.bias[None]])

    def run(features, targets, anchor, penalty, weights):
        if not case.derivative:
            return rows_of(head_of(features, targets, anchor, penalty, weights)), None

        def total(features, targets, kernel, penalty, weights):
            head = head_of(features, targets, anchor._replace(kernel=kernel), penalty, weights)
            rows = rows_of(head)
            return jnp.sum(rows * jnp.asarray(cotangent, rows.dtype)), rows

        given = (features, targets, anchor.kernel, penalty, weights)
        by = tuple(k for k, part in enumerate(along) if part is not None)
        grads, rows = jax.grad(total, argnums=by, has_aux=True)(*given)
        parts = [
            jnp.sum(grad.astype(rows.dtype) * jnp.asarray(along[k], rows.dtype))
            for k, grad in zip(by, grads, strict=True)
        ]
        return rows, sum(parts)

    return run


def arrays_of(case, problem):
    """What the solver is given."""
    dtype = DTYPES[case.dtype][0]
    wide = np.float64 if dtype == np.float64 else np.float32

    def array(value, dtype):
        return None if value is None else jnp.asarray(np.asarray(value, dtype))

    anchor = cfll.LinearHead(array(problem.kernel, dtype), array(problem.bias, dtype))
    features, targets = array(problem.features, dtype), array(problem.targets, dtype)
    return features, targets, anchor, array(problem.lam, wide), array(problem.weights, wide)


@contextlib.contextmanager
def enough_bits(dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def check(case):
    """Fail unless the solver does by this way what the oracle does."""
    problems = batches_of(case)
    with enough_bits(case.dtype):
        run = run_of(case, problems[0])
        way = {**WAYS, **WAYS_OF_DEVICES}[case.way]
        found = way(run, [arrays_of(case, problem) for problem in problems])
        found = jax.tree.map(np.asarray, found)
    _, tolerance, tolerance_of_derivative = DTYPES[case.dtype]
    if case.solver == "cg":  # as far as it iterates
        tolerance, tolerance_of_derivative = (
            max(tolerance, 1e-5),
            max(tolerance_of_derivative, 1e-4),
        )
    assert len(found) == len(problems)
    for (rows, slope), problem in zip(found, problems, strict=True):
        expected, expected_slope = oracle(case, problem)
        np.testing.assert_allclose(problem.solution(), expected, rtol=1e-9, atol=1e-12)
        assert rows.dtype == (np.float64 if case.dtype == "float64" else np.float32)
        size = np.linalg.norm(np.vstack([expected, problem.kernel]))
        assert np.linalg.norm(rows - expected) <= tolerance * size
        if case.derivative:
            # A sum of parts of either sign, the largest about as large as the head.
            allowed = tolerance_of_derivative * max(abs(expected_slope), 10 * size)
            assert abs(slope - expected_slope) <= allowed, f"{slope} is not {expected_slope}"


# Several devices ----------------------------------------------------------------------------------

CASES_OF_DEVICES = [case._replace(derivative=True) for case in covering_cases(WAYS_OF_DEVICES)]


def main():
    """Print the cases that fail, and how."""
    for name, value in (
        ("jax_platforms", "cpu"),
        ("jax_num_cpu_devices", DEVICES),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
    ):
        jax.config.update(name, value)
    failed = {}
    for case in CASES_OF_DEVICES:
        try:
            check(case)
        except Exception as error:
            failed[str(case)] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"devices": jax.device_count(), "failed": failed}))


if __name__ == "__main__":
    main()
