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
# # Classification: which head?
#
# Two rules of `cfll` classify. `cfll.prox` solves the squared loss on one-hot targets; `cfll.softmax`
# takes a step on the cross entropy, by least squares on working targets. This guide trains a small
# convolutional network on handwritten digits with both, and with the gradient head that they have to
# beat, at small and at large batches. It runs in about a minute on a CPU.

# %%
# In Colab, or wherever cfll is not installed yet. (In a clone: python -m pip install -e ".[notebooks]")
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cfll") is None:
    packages = ["cfll[flax]", "matplotlib", "scikit-learn"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import cfll
import cfll.flax

# %% [markdown]
# ## Data and model
#
# 1,797 images of 8 × 8 pixels, a third for testing. Targets are one-hot for every rule. The head starts
# at zeros: heads of random numbers were worse in everything that we tried.

# %%
images, labels = load_digits(return_X_y=True)
order = jax.random.permutation(jax.random.key(0), len(images))
images = jnp.asarray(images, jnp.float32)[order].reshape(-1, 8, 8, 1) / 16
labels = jnp.asarray(labels)[order]
x_train, x_test = images[:1198], images[1198:]
y_train, y_test = jax.nn.one_hot(labels[:1198], 10), labels[1198:]


class Net(nn.Module):
    def setup(self):
        self.convolutions = [nn.Conv(16, (3, 3)), nn.Conv(32, (3, 3))]
        self.hidden = nn.Dense(64)
        self.head = nn.Dense(10, kernel_init=nn.initializers.zeros)

    def features(self, x):
        for convolution in self.convolutions:
            x = nn.max_pool(nn.relu(convolution(x)), (2, 2), (2, 2))
        return nn.relu(self.hidden(x.reshape(len(x), -1)))

    def __call__(self, x):
        return self.head(self.features(x))


net = Net()
params = net.init(jax.random.key(1), x_train[:1])["params"]

# %% [markdown]
# ## The training steps
#
# One step for both rules: `rule.loss` knows which loss the backbone descends on. Below it the gradient
# head with cross entropy.


# %%
def closed_form(rule, rate):
    tx = cfll.closed_form(optax.adam(rate), rule, head="head")

    @jax.jit
    def step(state, x, y):
        def loss_fn(params):
            features = net.apply({"params": params}, x, method="features")
            return rule.loss(features, y, cfll.get_state(state))

        grads, solution = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, solution=solution)

    return tx, step


def gradient_head(rate):
    @jax.jit
    def step(state, x, y):
        def loss_fn(params):
            return optax.softmax_cross_entropy(net.apply({"params": params}, x), y).mean()

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    return optax.adam(rate), step


@jax.jit
def accuracy(state):
    return jnp.mean(net.apply({"params": state.params}, x_test).argmax(-1) == y_test)


def train(method, batch, steps, every):
    tx, step = method
    state = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    key, curve = jax.random.key(2), []
    for k in range(steps):
        rows = jax.random.choice(jax.random.fold_in(key, k), len(x_train), (batch,), replace=False)
        state = step(state, x_train[rows], y_train[rows])
        if (k + 1) % every == 0:
            curve.append(float(accuracy(state)))
    return curve


# %% [markdown]
# ## Few steps on large batches, many on small ones
#
# Each method at the best of three rates, in the eyes of its mean accuracy over the run; `lam` is a round
# number, not a tuned one.

# %%
METHODS = {
    "gradient head, cross entropy": gradient_head,
    "prox, squared loss": lambda rate: closed_form(cfll.prox(lam=10.0), rate),
    "softmax, cross entropy": lambda rate: closed_form(cfll.softmax(lam=1.0), rate),
}
RATES = [3e-3, 1e-2, 3e-2]
BUDGETS = {32: (160, 10), 512: (40, 2)}  # batch: steps, steps between two measurements

curves = {
    (batch, name): max(
        (train(make(rate), batch, steps, every) for rate in RATES), key=lambda curve: sum(curve)
    )
    for batch, (steps, every) in BUDGETS.items()
    for name, make in METHODS.items()
}
for (batch, name), curve in curves.items():
    print(
        f"B = {batch:3}  {name:30} after a quarter {curve[len(curve) // 4]:.3f}  at the end {curve[-1]:.3f}"
    )

# %%
styles = dict(zip(METHODS, [("0.5", "o--"), ("C0", "s-"), ("C1", "^-")], strict=True))
figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for axes, (batch, (steps, every)) in zip(panels, BUDGETS.items(), strict=True):
    for name, (color, style) in styles.items():
        at = range(every, steps + 1, every)
        axes.plot(at, curves[batch, name], style, color=color, markersize=4, label=name)
    axes.set(xlabel="steps", title=f"batches of {batch}", ylim=(0.0, 1.0))
panels[0].set_ylabel("test accuracy")
panels[0].legend(frameon=False, loc="lower right")
figure.tight_layout()

# %% [markdown]
# The closed form needs fewer steps; what remains of that at the end depends on the data. On larger
# problems (`python -m benchmarks cifar10`, `cifar100`) it is ahead where batches are large and steps few,
# and level or behind where there are many small steps: try the gradient head, too, also with a head
# that learns at a hundredth of the backbone's rate.
#
# `softmax` gives probabilities; the outputs of `prox` are none. Both take `sample_weight`, and `cfll.logistic` is for labels that do not exclude
# each other.

# %%
method = closed_form(cfll.softmax(lam=1.0), 1e-2)
tx, step = method
state = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
for k in range(40):
    state = step(state, x_train[k * 25 : k * 25 + 200], y_train[k * 25 : k * 25 + 200])
info = cfll.get_state(state).info
print(
    "solved by:",
    cfll.Route(info.route),
    " rcond:",
    float(info.rcond),
    " skipped:",
    int(info.skipped),
)
probabilities = jax.nn.softmax(net.apply({"params": state.params}, x_test))
print(f"mean confidence {probabilities.max(-1).mean():.2f}, accuracy {accuracy(state):.2f}")
