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
# # Choosing `lam`, or letting it choose itself
#
# `lam` says how near the new head stays to the old one. This guide shows what it does where there is no
# noise and where there is much, and `cfll.adaptive_prox`, which finds it while training. It runs in about
# a minute on a CPU.

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

import cfll
import cfll.flax

# %% [markdown]
# ## One function, with and without noise
#
# Six inputs, one output; every batch is new. The error is measured without the noise.

# %%
STEPS, BATCH, RATE = 400, 128, 3e-3


def signal(x):
    return (
        jnp.sin(3 * x[:, :1] * x[:, 1:2])
        + x[:, 2:3] ** 2
        - jnp.exp(-4 * (x[:, 3:4] - x[:, 4:5]) ** 2)
    )


class Net(nn.Module):
    def setup(self):
        self.hidden = [nn.Dense(128), nn.Dense(128)]
        self.head = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def features(self, x):
        for layer in self.hidden:
            x = nn.gelu(layer(x))
        return x

    def __call__(self, x):
        return self.head(self.features(x))


net = Net()
x_test = jax.random.uniform(jax.random.key(0), (4096, 6), minval=-1, maxval=1)
params = net.init(jax.random.key(1), x_test[:1])["params"]


def train(rule, noise):
    """The test error at the end, and lam at every step; rule=None: a gradient head."""
    adam = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    tx = adam if rule is None else cfll.closed_form(adam, rule, head="head")

    @jax.jit
    def step(state, key):
        keys = jax.random.split(key)
        x = jax.random.uniform(keys[0], (BATCH, 6), minval=-1, maxval=1)
        y = signal(x) + noise * jax.random.normal(keys[1], (BATCH, 1))

        def loss_fn(params):
            if rule is None:
                return jnp.mean((y - net.apply({"params": params}, x)) ** 2), None
            features = net.apply({"params": params}, x, method="features")
            return rule.loss(features, y, cfll.get_state(state))

        grads, solution = jax.grad(loss_fn, has_aux=True)(state.params)
        if rule is None:
            return state.apply_gradients(grads=grads)
        return state.apply_gradients(grads=grads, solution=solution)

    state, lams = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx), []
    for key in jax.random.split(jax.random.key(2), STEPS):
        state = step(state, key)
        lams.append(None if rule is None else cfll.get_state(state).lam)
    left = net.apply({"params": state.params}, x_test) - signal(x_test)
    return float(jnp.mean(left**2)), lams


# %% [markdown]
# ## The best `lam` depends on the noise
#
# Small values follow the batch, and its noise; large ones average over many batches, and lag behind the
# features. Every run below has the same rate: search it and `lam` together if you search.

# %%
NOISES = {"no noise": 0.0, "noise 0.5": 0.5}
LAMS = [1e-2, 1.0, 1e2, 1e4]
fixed = {name: [train(cfll.prox(lam), noise)[0] for lam in LAMS] for name, noise in NOISES.items()}
gradient = {name: train(None, noise)[0] for name, noise in NOISES.items()}
tuned = {name: train(cfll.adaptive_prox(), noise) for name, noise in NOISES.items()}
for name in NOISES:
    print(
        f"{name:10} best fixed lam {LAMS[fixed[name].index(min(fixed[name]))]:g}: {min(fixed[name]):.2e}"
        f"   adaptive: {tuned[name][0]:.2e}   gradient head: {gradient[name]:.2e}"
    )

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.5))
for axes, name in zip(panels, NOISES, strict=True):
    axes.loglog(LAMS, fixed[name], "s-", color="C0", label="prox, lam fixed")
    axes.axhline(tuned[name][0], color="C1", label="adaptive_prox")
    axes.axhline(gradient[name], color="0.5", linestyle="--", label="gradient head")
    axes.set(xlabel="lam (penalty on a sum over the batch)", title=name)
panels[0].set_ylabel("test squared error, without noise")
panels[0].legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## Letting it choose
#
# `cfll.adaptive_prox()` takes no argument. At each step it solves one half of the batch's first axis and
# asks, on the other half, in which direction `lam` should go. `cfll.get_state(state).lam` shows where it
# is: the first batch says where it starts; small while the features move fast, it rises as the rate
# decays, and where targets are noisy.

# %%
figure, axes = plt.subplots(figsize=(6, 3.5))
for name, style in zip(NOISES, ["-", "--"], strict=True):
    axes.semilogy(tuned[name][1], style, label=name)
axes.set(xlabel="steps", ylabel="lam")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# Choose yourself where few data are seen many times, as in most classification: held-out halves of a
# batch are not held out there. And where the first axis of a batch is not independent samples: put
# functions, patients or sequences there, not their points. A schedule is a fixed choice, too:
# `cfll.prox(optax.exponential_decay(...))`.

# %% [markdown]
# ## Rules of thumb for a fixed `lam`
#
# * `lam` multiplies a squared distance between heads and competes with a *sum* over the samples of the batch
#   (all leading axes of the features: for a neural operator every grid point is a sample). If you double the
#   batch, double `lam` to keep the same balance.
# * Start at 10 and try a factor of 100 either way; search it together with the learning rate, they trade off.
# * Too small: the head follows each batch; with few samples per feature the training error falls and the test
#   error does not. Too large: the head cannot follow the backbone. The smaller the batch against the number of
#   features, the larger `lam` has to be. For classification the paper finds the method robust to `lam`
#   "provided it is large enough", with some sensitivity at small batches; on ImageNet it used 10,000.
# * Ridge (`cfll.ridge(beta)`) is for batches that represent the data set; it forgets everything else.
# * It may be a schedule, a vector of shape (d,) or a matrix. `optax.inject_hyperparams` works:
#   `optax.inject_hyperparams(lambda lam: cfll.closed_form(optax.sgd(0.1), cfll.prox(lam)))(lam=10.0)`, and in the
#   loss `cfll.prox(opt_state.hyperparams["lam"])`, for numbers; a schedule goes to `cfll.prox` itself, since
#   Optax would show the loss its value of the step before.
# * Start a classifier's head at zeros: LeCun's, Xavier's and He's starts are behind in our runs
#   (`python -m benchmarks ablations`).
