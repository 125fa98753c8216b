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
# # Orders of a step, several heads, rules of your own
#
# The head is solved before the backbone moves (Eq. 17 of the paper), after it (Algorithm 1) or on the next
# batch (Algorithm 2). This guide writes all three in linen, the first in NNX, plain Optax and Equinox, and
# then goes on to two heads and to a rule of your own. It runs in about a minute on a CPU.

# %%
# In Colab, or wherever cfll is not installed yet. (In a clone: python -m pip install -e ".[notebooks]")
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cfll") is None:
    packages = ["cfll[flax]", "matplotlib"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

import cfll

# %% [markdown]
# ## Linen, in three orders
#
# The model says what its *features* are (the input of the head) and where its head is.


# %%
class Net(nn.Module):
    def setup(self):
        self.hidden, self.head = nn.Dense(64), nn.Dense(1)

    def features(self, x):
        return nn.gelu(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


def sample(step, size=128):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (size, 3))
    return x, jnp.sin(2 * x.sum(axis=1, keepdims=True))


net, rule = Net(), cfll.prox(lam=10.0)
x, y = sample(0)


def new_state(rate=1e-2):
    tx = cfll.closed_form(optax.adam(rate), rule, head="head")
    params = net.init(jax.random.key(1), x)["params"]
    return cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)


# %% [markdown]
# **Eq. (17)**: the loss solves the head in the forward pass and the backbone descends at the solved head. One
# forward pass; the solution goes to the optimizer, which writes the head and keeps its state. Take this one
# unless you know why not.


# %%
@jax.jit
def equation_17(state, batch, following):
    x, y = batch

    def loss_fn(params):
        features = state.apply_fn({"params": params}, x, method="features")
        return rule.loss(features, y, cfll.get_state(state))

    (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, solution=solution), loss


# %% [markdown]
# **Algorithm 1**: your own loss at the head as it is; the transformation solves the head on the features
# *after* the backbone's update, in a second forward pass. **Algorithm 2** is the same with the next batch in
# `targets` and `feature_fn`: the head then never sees the samples that the backbone has just learned from.


# %%
def at_the_old_head(state, batch):
    def loss_fn(params):
        return jnp.mean(jnp.sum((batch[1] - state.apply_fn({"params": params}, batch[0])) ** 2, -1))

    return jax.value_and_grad(loss_fn)(state.params)


@jax.jit
def algorithm_1(state, batch, following):
    loss, grads = at_the_old_head(state, batch)
    features = cfll.flax.feature_fn(state, batch[0])
    return state.apply_gradients(grads=grads, targets=batch[1], feature_fn=features), loss


@jax.jit
def algorithm_2(state, batch, following):
    loss, grads = at_the_old_head(state, batch)
    features = cfll.flax.feature_fn(state, following[0])
    return state.apply_gradients(grads=grads, targets=following[1], feature_fn=features), loss


# %%
test = sample(10_000, 2000)


@jax.jit
def test_error(params):
    return jnp.mean((net.apply({"params": params}, test[0]) - test[1]) ** 2)


errors = {}
for step in (equation_17, algorithm_1, algorithm_2):
    state, errors[step.__name__] = new_state(), []
    for count in range(200):
        state, loss = step(state, sample(count), sample(count + 1))
        if count % 5 == 4:
            errors[step.__name__].append((count + 1, float(test_error(state.params))))

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for (name, curve), dash in zip(errors.items(), ("-", "--", ":"), strict=True):
    axes.plot(*zip(*curve, strict=True), dash, label=name.replace("_", " "))
axes.set(xlabel="training steps", ylabel="test MSE", yscale="log")
axes.legend()
plt.show()

# %%
head = cfll.get_state(state)  # anchor (the head, in float32), lam, info
print(cfll.Route(head.info.route), head.info.rcond, head.info.skipped)

# %% [markdown]
# ## NNX
#
# Algorithm 1 there: `optimizer.update(model, grads, targets=y, feature_fn=cfll.flax.feature_fn(model, x))`. A
# misspelled keyword is an error in both frameworks (with `nnx.Optimizer` it would be lost).


# %%
class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 64, rngs=rngs)
        self.head = nnx.Linear(64, 1, rngs=rngs)

    def features(self, x):
        return nnx.gelu(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


model = NnxNet(nnx.Rngs(0))
tx = cfll.closed_form(optax.adam(1e-3), rule, head="head")
optimizer = cfll.flax.Optimizer(model, tx, wrt=nnx.Param)  # or nnx.Optimizer


@nnx.jit
def train_step(model, optimizer, x, y):
    head = cfll.get_state(optimizer)

    def loss_fn(model):
        return rule.loss(model.features(x), y, head)

    (loss, solution), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, solution=solution)
    return loss


print(train_step(model, optimizer, x, y))

# %% [markdown]
# ## Without Flax
#
# `tx` is an ordinary Optax transformation with keywords. It finds the head by path and replaces leaves, so
# dictionaries, `nnx.State`, Equinox modules (`weight` of shape (o, d)) and pointwise convolutions work. In
# a chain of your own `cfll.closed_form_head` comes last: it sets the head.
#
# Equinox: `eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)`, then `tx.update(grads, opt_state,
# eqx.filter(model, eqx.is_array), solution=solution)` and `eqx.apply_updates`.

# %%
params = {"w": jnp.ones((3, 8)) / 3, "head": {"kernel": jnp.zeros((8, 1)), "bias": jnp.zeros(1)}}
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.sgd(0.1, momentum=0.9, nesterov=True),
    cfll.closed_form_head(rule, head="head"),
)
opt_state = tx.init(params)


def loss_fn(params):
    return rule.loss(jnp.tanh(x @ params["w"]), y, cfll.get_state(opt_state))


(loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
params = optax.apply_updates(params, updates)
print(params["head"]["bias"])

# %% [markdown]
# ## Several heads
#
# Each head has its rule, its state and its solution, addressed by its path. They share a backbone, whose
# loss is the sum.

# %%
params = {
    "w": jnp.ones((3, 8)) / 3,
    "a": {"kernel": jnp.zeros((8, 1))},
    "b": {"kernel": jnp.zeros((8, 2))},
}
targets = {"a": y, "b": jnp.concatenate([y**2, y**3], axis=1)}
rules = {"a": cfll.prox(lam=10.0), "b": cfll.prox(lam=1.0)}
tx = optax.adam(1e-3)
for name, head_rule in rules.items():
    tx = cfll.closed_form(tx, head_rule, head=name)
opt_state = tx.init(params)


def loss_fn(params):
    features = jnp.tanh(x @ params["w"])
    both = {
        name: head_rule.loss(features, targets[name], cfll.get_state(opt_state, name))
        for name, head_rule in rules.items()
    }
    return sum(loss for loss, _ in both.values()), {
        name: solution for name, (_, solution) in both.items()
    }


(loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
print(cfll.get_state(opt_state, "b").info.rcond)

# %% [markdown]
# ## A rule of your own
#
# A rule is two functions, `init(anchor)` and `solve(features, targets, state, *, sample_weight)`, and what the
# backbone descends on, by default the squared loss at the new head; its state is kept, checkpointed and, with
# a head that is not finite, rejected by the transformation. This one halves `lam` whenever the loss of the
# batch has fallen.


# %%
def halving(lam):
    def init(anchor):
        return {"lam": jnp.float32(lam), "loss": jnp.float32(jnp.inf)}

    def solve(features, targets, state, *, sample_weight=None):
        old = state.rule_state
        loss = jnp.mean((targets - state.anchor(features)) ** 2)
        lam = jnp.where(loss < old["loss"], old["lam"] / 2, old["lam"])
        head, info = cfll.penalized_solve(
            features, targets, state.anchor, lam, sample_weight=sample_weight
        )
        return cfll.Solution(head, {"lam": lam, "loss": loss}, info)

    return cfll.Rule(init, solve)


rule = halving(64.0)
tx = cfll.closed_form(optax.adam(1e-2), rule, head="head")
state = cfll.flax.TrainState.create(
    apply_fn=net.apply, params=net.init(jax.random.key(1), x)["params"], tx=tx
)
equation_17.clear_cache()  # it reads the global `rule`
for count in range(5):
    state, loss = equation_17(state, sample(count), None)
    print(f"{loss:.3f}", cfll.get_state(state).rule_state["lam"])

# %% [markdown]
# ## The paper's names
#
# | paper | here | note |
# |---|---|---|
# | φ(X), d × n | `features`, (..., d) | samples first; all leading axes are samples |
# | Y, o × n | `targets`, (..., o) | floats; one-hot for classification |
# | W, o × d, and b | `LinearHead(kernel, bias)`, (d, o) and (o,) | as Flax `Dense`; `bias=None` for none |
# | W_t | `anchor` | in the optimizer's state, float32; bfloat16 parameters hold it rounded, and the step that wrote them is rounded, too |
# | β, λ | `beta`, `lam` | scalar, (d,) or (d, d); both multiply a *sum* over samples |
# | L_B | `rule.loss`, `prox_loss` | *mean* over samples, sum over outputs, so rates do not depend on the batch size |
#
# The bias is penalized as in the paper, with the mean of the diagonal of `lam`; `penalize_bias=False` leaves it
# free, as scikit-learn does. `sample_weight` of zero is a row that is not there, even if features or
# targets hold NaN there. (A NaN in the network's *inputs* makes the backbone's gradient NaN all the same: pad
# inputs with zeros.) bfloat16 and float16 features are accumulated and solved in float32.
