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
# # A closed-form last layer in five minutes
#
# Under a squared loss the best last layer is known in closed form. `cfll` solves it at every step and
# leaves the backbone to your optimizer. This notebook trains a small regression network with Adam,
# with and without it, and shows the three things to know: the training step, how to choose `lam`,
# and what the diagnostics say. It runs in well under two minutes on a CPU.

# %%
# In Colab, or wherever cfll is not installed yet. (In a clone: python -m pip install -e ".[notebooks]")
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cfll") is None:
    packages = ["cfll[flax]", "matplotlib"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import cfll
import cfll.flax

# %% [markdown]
# ## Data and model
#
# Five inputs, two outputs, no noise. The model says what its *features* are and what its *head* is.


# %%
def target(x):
    wave = jnp.sin(3 * x[:, 0] * x[:, 1]) + x[:, 2] ** 2
    bump = jnp.exp(-4 * (x[:, 3] - x[:, 4]) ** 2)
    return jnp.stack([wave, bump], axis=1)


keys = jax.random.split(jax.random.key(0), 3)
x_train = jax.random.uniform(keys[0], (4096, 5), minval=-1, maxval=1)
x_test = jax.random.uniform(keys[1], (2048, 5), minval=-1, maxval=1)
y_train, y_test = target(x_train), target(x_test)


class Net(nn.Module):
    def setup(self):
        self.hidden = [nn.Dense(128), nn.Dense(128)]
        self.head = nn.Dense(2)

    def features(self, x):
        for layer in self.hidden:
            x = nn.gelu(layer(x))
        return x

    def __call__(self, x):
        return self.head(self.features(x))


net = Net()
params = net.init(keys[2], x_train[:1])["params"]

# %% [markdown]
# ## Two training steps
#
# The first is the one you know. In the second, `rule.loss` solves the head of the batch in the forward
# pass, near the previous head, which `cfll.get_state` finds in the optimizer's state. Its gradient needs
# no backpropagation through the solve. The solution goes to the optimizer, which sets the head to it.


# %%
@jax.jit
def gradient_step(state, x, y):
    def loss_fn(params):
        return jnp.mean(jnp.sum((y - state.apply_fn({"params": params}, x)) ** 2, axis=-1))

    grads = jax.grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads)


@partial(jax.jit, static_argnums=3)
def closed_form_step(state, x, y, rule):
    def loss_fn(params):
        features = state.apply_fn({"params": params}, x, method="features")
        return rule.loss(features, y, cfll.get_state(state))

    grads, solution = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, solution=solution)


@jax.jit
def test_error(state):
    return jnp.mean(jnp.sum((y_test - net.apply({"params": state.params}, x_test)) ** 2, axis=-1))


EPOCHS, BATCH = 15, 128
STEPS = EPOCHS * len(x_train) // BATCH


def train(step, tx, *args):
    state = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    errors = []
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), len(x_train)).reshape(-1, BATCH)
        for rows in order:
            state = step(state, x_train[rows], y_train[rows], *args)
        errors.append(float(test_error(state)))
    return state, errors


adam = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
_, gradient_errors = train(gradient_step, adam)
rule = cfll.prox(lam=10.0)
tx = cfll.closed_form(adam, rule, head="head")
state, closed_form_errors = train(closed_form_step, tx, rule)
print(f"Adam, gradient head:    {gradient_errors[-1]:.2e}")
print(f"Adam, closed-form head: {closed_form_errors[-1]:.2e}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.semilogy(range(1, EPOCHS + 1), gradient_errors, "o--", color="0.5", label="gradient head")
axes.semilogy(range(1, EPOCHS + 1), closed_form_errors, "s-", color="C0", label="closed-form head")
axes.set(xlabel="epoch", ylabel="test squared error", title="Adam, the same rate and schedule")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## Choosing `lam`
#
# `lam` multiplies a squared distance to the previous head and is weighed against a *sum* over the
# batch. Small values follow the batch, large values average over many. Here, without noise, small
# values win; from 0.01 to 100 all of them beat the gradient head; far too large and the head cannot
# move.

# %%
lams = [1e-2, 1.0, 1e2, 1e4]
final = []
for lam in lams:
    other = cfll.prox(lam=lam)
    tx = cfll.closed_form(adam, other, head="head")
    final.append(train(closed_form_step, tx, other)[1][-1])

figure, axes = plt.subplots(figsize=(6, 3.5))
axes.loglog(lams, final, "s-", label="closed-form head")
axes.axhline(gradient_errors[-1], color="0.5", linestyle="--", label="gradient head")
axes.set(xlabel="lam (penalty on a sum over the batch)", ylabel="final test squared error")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## What the state tells you
#
# The state of the head holds the head itself (`anchor`) and what happened to it (`info`). A batch with
# NaN keeps the old head and is counted, it does not destroy the run. (Optax's `apply_if_finite`
# protects the backbone.)

# %%
info = cfll.get_state(state).info
print("solved by:", cfll.Route(info.route), " rcond:", float(info.rcond))
print("skipped:", int(info.skipped), " drift:", float(info.drift))

safe = optax.apply_if_finite(adam, max_consecutive_errors=5)
tx = cfll.closed_form(safe, rule, head="head")
careful = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
careful = closed_form_step(careful, x_train[:BATCH], y_train[:BATCH] * jnp.nan, rule)
info = cfll.get_state(careful).info
print("after a NaN batch: skipped", int(info.skipped), "accepted", bool(info.accepted))
print(
    "parameters finite:", all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(careful.params))
)

# %% [markdown]
# ## Algorithm 1
#
# The paper's main variant updates the backbone first and solves the head on the *updated* features, at
# the price of a second forward pass: hand the features over as a function.


# %%
@jax.jit
def algorithm_1_step(state, x, y):
    def loss_fn(params):
        return jnp.mean(jnp.sum((y - state.apply_fn({"params": params}, x)) ** 2, axis=-1))

    grads = jax.grad(loss_fn)(state.params)
    feature_fn = cfll.flax.feature_fn(state, x)
    return state.apply_gradients(grads=grads, targets=y, feature_fn=feature_fn)


tx = cfll.closed_form(adam, rule, head="head")
_, errors = train(algorithm_1_step, tx)
print(f"Adam, closed-form head, Algorithm 1: {errors[-1]:.2e}")

# %% [markdown]
# Next: the README for NNX, and what to take for what you have (batch norm, sample weights, classes);
# `python -m benchmarks quickstart` for a Fourier neural operator with SGD, Adam and Muon.
