# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Large heads, large data, several devices
#
# What to do when the head has many features or outputs, when the data do not fit into memory, and when a
# batch is spread over devices. It runs in under a minute on a CPU, which plays eight devices.

# %%
# In Colab, or wherever cfll is not installed yet. (In a clone: python -m pip install -e ".[notebooks]")
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cfll") is None:
    packages = ["cfll[flax]", "matplotlib"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # on a CPU only

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import cfll

# %% [markdown]
# ## What a solve costs
#
# With n samples (all leading axes of the features: for a neural operator every grid point is one), d features
# and o outputs, `solver="auto"` takes the system of the smaller size: a d × d matrix, 2 n d² operations, when
# there are more samples than features, and an n × n matrix, 2 n² d, when there are fewer. Then no matrix of
# features times features is made, not even in its fallback. The outputs share one factorization.
#
# `auto` factorizes by Cholesky, estimates its error from the pivots and refines; where the features are
# singular to working precision, a second route takes over under `lax.cond`. That fallback holds an
# eigendecomposition (with fewer samples than features, QR and SVD), which is slow on GPU and TPU, so it is
# paid for only when it is taken; but `vmap` turns a `cond` into both branches: write `solver="primal"` or
# `"dual"` there, which have Cholesky alone, and watch `rcond`.


# %%
def seconds(function, *args):
    jax.block_until_ready(function(*args))  # compiles
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(function(*args))
    return (time.perf_counter() - start) / 5


@jax.jit
def matmul(features):
    return features.T @ features


sizes, samples, times = (64, 128, 256, 512, 1024), 2048, {"solve": [], "features' @ features": []}
for d in sizes:
    features = jax.random.normal(jax.random.key(d), (samples, d))
    targets, anchor = jnp.ones((samples, 10)), cfll.LinearHead.zeros(d, 10)
    times["solve"].append(seconds(jax.jit(cfll.prox_solve), features, targets, anchor, 10.0))
    times["features' @ features"].append(seconds(matmul, features))

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for (name, values), dash in zip(times.items(), ("-o", "--s"), strict=True):
    axes.loglog(sizes, [1e3 * value for value in values], dash, label=name)
axes.set(xlabel="features d", ylabel="milliseconds", title=f"{samples} samples, 10 outputs")
axes.legend()
plt.show()

# %% [markdown]
# ## Many features *and* many samples: conjugate gradients
#
# `cfll.CG` solves without a matrix of d × d or n × n. `info.iterations` and `info.residual` say how far it came: a
# residual above the tolerance is a solve that is not finished.

# %%
rule = cfll.prox(10.0, solver=cfll.CG(tolerance=1e-3))
features, targets = jax.random.normal(jax.random.key(0), (4096, 2048)), jnp.ones((4096, 3))
head, info = cfll.penalized_solve(
    features, targets, cfll.LinearHead.zeros(2048, 3), 10.0, solver=cfll.CG(tolerance=1e-3)
)
print(info.iterations, info.residual)

# %% [markdown]
# ## Fewer solves
#
# `cfll.every(4, rule)` solves at every fourth update and keeps the head in between, in which the backbone
# descends at the head that is kept. What `every` and `CG` save and cost: `python -m benchmarks speed`.

# %%
sometimes = cfll.every(4, cfll.prox(10.0))

# %% [markdown]
# ## Data of any size: sums
#
# `GramStats` over chunks, at the memory of one chunk: a head of all data, or of a batch larger than memory. It
# keeps what rounding loses of each sum, so that long streams in float32 err as short ones do. As the
# solution of a step it goes to the optimizer like any other: `solution=stats.prox(anchor, lam)`.

# %%
stats = cfll.GramStats.zeros(8, 1)
add = jax.jit(cfll.GramStats.add)
for chunk in range(20):
    x = jax.random.normal(jax.random.key(chunk), (1000, 8))
    stats = add(stats, x, jnp.sin(x.sum(axis=1, keepdims=True)))
print(stats.ridge(beta=1e-3).kernel.ravel())

# %% [markdown]
# ## Several devices
#
# Shard the batch over a mesh and jit as usual: nothing else changes. In all ways the devices exchange the means
# and the sums, d² + d o + 2 d + 2 o numbers at most, in two all-reduces per solve (each step of refinement, on
# ill-conditioned features, d o + o more), and every device factorizes the same matrix. (`python -m pytest tests/test_scale.py` shows it on
# eight virtual devices and on two processes.)

# %%
mesh = jax.make_mesh((jax.device_count(),), ("data",))
over_devices = jax.NamedSharding(mesh, jax.P("data"))
x = jax.random.normal(jax.random.key(0), (128, 8))
features, targets = jax.device_put((x, jnp.sin(x[:, :2])), over_devices)

head = jax.jit(cfll.ridge_solve)(features, targets, 1.0)
print(jax.device_count(), "devices; the head is on", len(head.kernel.sharding.device_set))

# %% [markdown]
# In `shard_map` and `pmap` each device sees its own samples. Either sum first, or give the rule the name of the
# axis and average losses and gradients over it as always. Without the name a rule is refused there, since every
# device would solve for its own samples and replicas part unseen; `rule._replace(axis_name=())` is for devices with
# networks of their own. (Not seen: `jax.vmap` with a named axis.)


# %%
def head_of_all(features, targets):
    return cfll.GramStats.zeros(8, 2).add(features, targets).psum("data").ridge(1.0)


by_sums = jax.jit(jax.shard_map(head_of_all, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()))(
    features, targets
)
print(jnp.abs(by_sums.kernel - head.kernel).max())

rule = cfll.prox(10.0, axis_name="data")
tx = cfll.closed_form(optax.sgd(0.1), rule, head="head")
params = {"w": jnp.eye(8), "head": {"kernel": jnp.zeros((8, 2))}}
opt_state = tx.init(params)


def train_step(params, opt_state, features, targets):
    def loss_fn(params):
        return rule.loss(jnp.tanh(features @ params["w"]), targets, cfll.get_state(opt_state))

    # Of a copy that varies over the devices: the sum of its gradients is ours to take.
    local = jax.lax.pcast(params, "data", to="varying")
    (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(local)
    loss, grads = jax.lax.pmean((loss, grads), "data")
    updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
    return optax.apply_updates(params, updates), opt_state, loss


parallel = jax.jit(
    jax.shard_map(
        train_step,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), jax.P("data"), jax.P("data")),
        out_specs=jax.P(),
    )
)
for _ in range(3):
    params, opt_state, loss = parallel(params, opt_state, features, targets)
    print(loss)
