"""Many devices, many processes, micro-batches, half precision, and a run that is killed."""

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll
from tests import resumed, sharded, two_processes

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
}


def start(program, *arguments):
    """A program of this folder in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.{program}", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs_of(*processes, codes=None, seconds=180):
    """What they print; none is left behind, and one that hangs fails the test."""
    codes = codes or [0] * len(processes)
    deadline, outputs = time.monotonic() + seconds, []
    try:
        for process, code in zip(processes, codes, strict=True):
            stdout, stderr = process.communicate(timeout=max(0, deadline - time.monotonic()))
            assert process.returncode == code, stderr[-3000:]
            outputs.append(stdout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs


# Eight devices ------------------------------------------------------------------------------------

GRAM, CROSS = sharded.D**2 + sharded.D, (sharded.D + 1) * sharded.O
MEANS = sharded.D + sharded.O


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `tests/sharded.py` found, run once for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "sharded.json"
    with (folder / "sharded.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(outputs_of(start("sharded"))[0])
    report = json.loads(path.read_text())
    assert report["devices"] == sharded.DEVICES
    return report


@pytest.mark.parametrize("solve", ["jit, prox_solve", "jit, GramStats", "shard_map, GramStats"])
def test_the_head_of_eight_devices_is_that_of_one(report, solve):
    result = report["solves"][solve]
    assert result["error"] < 1e-5
    assert result["sharding"] == [[], []]


def test_a_solve_from_sums_reduces_the_means_and_the_sums_around_them(report):
    def collectives(solve):
        assert report["solves"][solve]["guarded"] == []  # whatever the data
        return report["solves"][solve]["collectives"]

    sums = ["all-reduce", GRAM + CROSS]
    assert collectives("jit, GramStats") == [["all-reduce", MEANS], sums]
    # By shard_map the number of samples is summed, too: the devices might have different weights.
    assert collectives("shard_map, GramStats") == [["all-reduce", MEANS + 1], sums]


def test_prox_solve_reduces_the_mean_and_the_sums_and_nothing_else(report):
    # Well-conditioned: the first branch of the guard, which the collectives below belong to.
    assert report["solves"]["rcond"] > 2e4 * np.finfo(np.float32).eps
    found = report["solves"]["jit, prox_solve"]["collectives"]
    # The means travel with the Gram matrix, which does not wait for them.
    assert found == [["all-reduce", GRAM + sharded.O], ["all-reduce", CROSS]]


def test_outputs_of_the_head_may_be_sharded(report):
    for result in report["outputs"].values():
        assert result["error"] < 1e-5
        assert result["sharding"] == [[None, "outputs"], ["outputs"]]
    # Each device solves for its own outputs.
    means, sums = sharded.D + sharded.O // 2 + 1, GRAM + CROSS // 2
    half = [["all-reduce", means], ["all-reduce", sums]]
    assert report["outputs"]["shard_map, GramStats"]["collectives"] == half
    # By jit XLA does not split LAPACK's triangular solve over its right-hand sides: it gathers
    # them, and every device solves for all outputs.
    found = report["outputs"]["jit, prox_solve"]["collectives"]
    assert [size for operation, size in found if operation == "all-gather"] == [CROSS]
    # The mean of the residual, and the size of the solution, for a step of refinement.
    reduced = sum(size for operation, size in found if operation == "all-reduce")
    assert reduced == GRAM + CROSS // 2 + sharded.O // 2 + 3


@pytest.mark.parametrize("by", ["jit", "shard_map"])
def test_training_on_eight_devices(report, by):
    training = report["training"]
    result = training[by]
    np.testing.assert_allclose(result["losses"], training["losses"], rtol=1e-5)
    assert result["params_error"] < 1e-5
    assert result["anchor_error"] < 1e-5
    assert all(result["stable"])
    assert result["programs"] == 1
    # The solve, the gradient of the backbone, and the loss.
    assert {operation for operation, _ in result["collectives"]} == {"all-reduce"}
    numbers = GRAM + CROSS + training["backbone"] + 1
    numbers += sharded.O if by == "jit" else MEANS + 1  # means; of sums, and how many samples
    assert sum(size for _, size in result["collectives"]) == numbers


# Two processes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(standard_promotion):
    losses = two_processes.train()  # here, on one device
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start("two_processes", process, 2, port) for process in (0, 1)]
    for printed in outputs_of(*processes, seconds=120):
        result = json.loads(printed.splitlines()[-1])
        assert result["devices"] == 4
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)


# Micro-batches ------------------------------------------------------------------------------------

MICRO, ROWS, INPUTS, WIDTH, OUTPUTS, LAM = 8, 512, 6, 24, 2, 100.0
RULE = cfll.prox(LAM, solver="primal")  # compiles fastest
TX = cfll.closed_form(optax.sgd(0.1), RULE)


def micro_problem():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(MICRO, ROWS, INPUTS)).astype(np.float32)
    inputs += np.linspace(-1, 1, MICRO, dtype=np.float32)[:, None, None]  # no two are alike
    targets = np.sin(inputs[..., :OUTPUTS])
    params = {
        "first": jnp.asarray(rng.normal(size=(INPUTS, 64)) / 3, jnp.float32),
        "second": jnp.asarray(rng.normal(size=(64, WIDTH)) / 8, jnp.float32),
        "head": cfll.LinearHead.zeros(WIDTH, OUTPUTS)._asdict(),
    }
    return params, inputs, targets


def features_of(params, inputs):
    return jnp.tanh(jnp.tanh(inputs @ params["first"]) @ params["second"])


@jax.jit
def batch_step(params, state, inputs, targets):
    """Eq. (17) on a batch."""

    def loss_fn(params):
        return RULE.loss(features_of(params, inputs), targets, cfll.get_state(state))

    grads, solution = jax.grad(loss_fn, has_aux=True)(params)
    updates, state = TX.update(grads, state, params, solution=solution)
    return optax.apply_updates(params, updates), state


@jax.jit
def micro_step(params, state, inputs, targets):
    """Eq. (17) on all micro-batches: their sums, the head, then their gradients at it."""

    def add(stats, batch):
        return stats.add(features_of(params, batch[0]), batch[1]), None

    zeros = cfll.GramStats.zeros(WIDTH, OUTPUTS)
    stats, _ = jax.lax.scan(add, zeros, (inputs, targets))
    head = stats.prox(cfll.get_state(state).anchor, LAM)

    def loss_fn(params, inputs, targets):
        squares = jnp.sum((targets - head(features_of(params, inputs))) ** 2)
        return squares / (targets.size * MICRO / OUTPUTS)

    def add_gradient(grads, batch):
        return jax.tree.map(jnp.add, grads, jax.grad(loss_fn)(params, *batch)), None

    grads, _ = jax.lax.scan(add_gradient, jax.tree.map(jnp.zeros_like, params), (inputs, targets))
    updates, state = TX.update(grads, state, params, solution=head)
    return optax.apply_updates(params, updates), state


def one_batch(inputs, targets):
    return inputs.reshape(-1, INPUTS), targets.reshape(-1, OUTPUTS)


def test_micro_batches_are_one_large_batch(standard_promotion):
    params, inputs, targets = micro_problem()
    micro = large = params, TX.init(params)
    for _ in range(3):
        large = batch_step(*large, *one_batch(inputs, targets))
        micro = micro_step(*micro, inputs, targets)
    assert sharded.relative_error(micro[0], large[0]) < 1e-5

    # optax.MultiSteps averages gradients, but its head is that of the last micro-batch.
    tx = optax.MultiSteps(TX, every_k_schedule=MICRO)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for x, y in zip(inputs, targets, strict=True):
        updates, state = update(zeros, state, params, targets=y, features=features_of(params, x))
    multi = cfll.get_head(optax.apply_updates(params, updates), "head")

    def head_of(x, y):
        stats = cfll.GramStats.zeros(WIDTH, OUTPUTS).add(features_of(params, x), y)
        return jax.jit(cfll.GramStats.prox)(stats, cfll.get_head(params, "head"), LAM)

    last = head_of(inputs[-1], targets[-1])
    whole = head_of(*one_batch(inputs, targets))
    assert sharded.relative_error(multi, last) < 1e-4
    assert sharded.relative_error(multi, whole) > 0.1


def test_micro_batches_take_the_memory_of_one():
    params, inputs, targets = micro_problem()

    def temporary_bytes(step, *batch):
        compiled = step.lower(params, TX.init(params), *batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = temporary_bytes(batch_step, inputs[0], targets[0])
    large = temporary_bytes(batch_step, *one_batch(inputs, targets))
    micro = temporary_bytes(micro_step, inputs, targets)
    assert micro < 1.1 * one
    assert micro < 1.5 * large / MICRO


# Half precision -----------------------------------------------------------------------------------


def test_a_bfloat16_backbone_trains_with_a_float32_head():
    params, inputs, targets = micro_problem()
    params = {**params, **{k: params[k].astype(jnp.bfloat16) for k in ("first", "second")}}
    inputs = jnp.asarray(inputs[0], jnp.bfloat16)
    first, state = batch_step(params, TX.init(params), inputs, targets[0])
    types = jax.tree.map(jax.typeof, (first, state))
    assert types == jax.tree.map(jax.typeof, (params, TX.init(params)))
    anchor = cfll.get_state(state).anchor
    assert anchor.kernel.dtype == anchor.bias.dtype == jnp.float32
    features = features_of(params, inputs)
    assert features.dtype == jnp.bfloat16
    exact = cfll.prox_solve(
        features, targets[0], cfll.get_head(params, "head"), LAM, solver="primal"
    )
    # Only as close as features are that XLA did and did not round between layers.
    assert sharded.relative_error(anchor, exact) < 2e-2


# A run that is killed -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise(tmp_path):
    # From the second save on, the first checkpoint is complete; the last may be half written.
    step = random.SystemRandom().randrange(2 * resumed.SAVE_EVERY, resumed.STEPS)
    undisturbed = start("resumed", tmp_path / "undisturbed", 0)
    killed = start("resumed", tmp_path / "killed", step)
    outputs_of(killed, undisturbed, codes=[-signal.SIGKILL, 0])
    (printed,) = outputs_of(start("resumed", tmp_path / "killed", 0))
    start_step = int(printed.split()[-1])
    assert 0 < start_step <= step, f"killed after step {step}"
    with (
        np.load(tmp_path / "undisturbed" / "last.npz") as expected,
        np.load(tmp_path / "killed" / "last.npz") as result,
    ):
        assert set(result) == set(expected)
        for name in expected:
            message = f"{name}, killed after step {step}, resumed from {start_step}"
            np.testing.assert_array_equal(result[name], expected[name], err_msg=message)
            assert result[name].dtype == expected[name].dtype, message
