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
# # Predictions that know their error, and targets that are missing
#
# A linear head with Gaussian noise has a posterior in closed form. This guide trains a small network on
# noisy data with a gap, half of whose targets are missing, and then asks it how sure it is: once after
# training, from one pass over the data (`cfll.bayesian_ridge`), and once while new samples arrive at a
# frozen backbone (`cfll.kalman`). It runs in about a minute on a CPU.

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
# ## Data with a gap, and with holes
#
# One input, two outputs with noise of different strength. No sample lies between 0.2 and 0.9, and of each
# output half of the targets is missing, at random: NaN.

# %%
NOISE = jnp.array([0.05, 0.2])


def signal(x):
    return jnp.concatenate([jnp.sin(4 * x), jnp.cos(3 * x) * x], axis=-1)


def draw(key, n):
    keys = jax.random.split(key, 3)
    x = jax.random.uniform(keys[0], (n, 1), minval=-1.5, maxval=0.8)
    x = jnp.where(x > 0.2, x + 0.7, x)
    return x, signal(x) + NOISE * jax.random.normal(keys[1], (n, 2))


x_train, y_complete = draw(jax.random.key(0), 1024)
there = jax.random.bernoulli(jax.random.key(1), 0.5, y_complete.shape)
y_train = jnp.where(there, y_complete, jnp.nan)
x_test, y_test = draw(jax.random.key(2), 4096)


class Net(nn.Module):
    def setup(self):
        self.hidden = [nn.Dense(64), nn.Dense(64)]
        self.head = nn.Dense(2)

    def features(self, x):
        for layer in self.hidden:
            x = jnp.tanh(layer(2 * x))
        return x

    def __call__(self, x):
        return self.head(self.features(x))


net = Net()
params = net.init(jax.random.key(3), x_train[:1])["params"]

# %% [markdown]
# ## Training with missing targets
#
# `sample_weight` of the targets' shape: a target of weight zero is not there, whatever it holds. Each
# output is then solved on the samples that have it.

# %%
rule = cfll.prox(lam=10.0)
tx = cfll.closed_form(optax.adam(optax.cosine_decay_schedule(3e-3, 600)), rule, head="head")


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        features = net.apply({"params": params}, x, method="features")
        return rule.loss(features, y, cfll.get_state(state), sample_weight=jnp.isfinite(y))

    grads, solution = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, solution=solution)


state = cfll.flax.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
for k in range(600):
    rows = jax.random.choice(jax.random.fold_in(jax.random.key(4), k), 1024, (128,))
    state = train_step(state, x_train[rows], y_train[rows])

prediction = net.apply({"params": state.params}, x_test)
error = jnp.sqrt(jnp.mean((prediction - signal(x_test)) ** 2, axis=0))
print("error without the noise:", error.round(3), " noise:", NOISE)
print("skipped:", int(cfll.get_state(state).info.skipped))

# %% [markdown]
# ## How sure? One pass over the data
#
# `GramStats` sums what the posterior takes; penalty and noise are the most likely ones, nothing is left
# to choose. Sums have one weight per sample: each output gets its own, of the samples that have it. They
# are sums of *residuals*, what the head leaves of the targets, which keeps the digits of small noise.


# %%
def posterior_of(output):
    features = net.apply({"params": state.params}, x_train, method="features")
    head = jax.tree.map(lambda leaf: leaf[..., [output]], cfll.get_head(state.params, "head"))
    residuals = y_train[:, [output]] - head(features)
    stats = cfll.GramStats.zeros(64, 1).add(features, residuals, there[:, output])
    return cfll.bayesian_ridge(stats, anchor=head)


beliefs = [posterior_of(output) for output in (0, 1)]
for output, (posterior, info) in enumerate(beliefs):
    mean, variance = posterior.predict(
        net.apply({"params": state.params}, x_test, method="features")
    )
    inside = jnp.abs(y_test[:, [output]] - mean) < 1.645 * jnp.sqrt(variance)
    noise = jnp.sqrt(posterior.noise_variance[0])
    print(
        f"output {output}: noise {noise:.3f} (true {NOISE[output]:.3f}), 90 % intervals hold {inside.mean():.1%},"
    )
    print(
        f"          {info.num_effective[0]:.0f} directions determined, noise_rcond {info.noise_rcond[0]:.0e}"
    )

# %%
grid = jnp.linspace(-1.8, 1.8, 400)[:, None]
features = net.apply({"params": state.params}, grid, method="features")
figure, panels = plt.subplots(1, 2, figsize=(9, 3.5))
for output, axes in enumerate(panels):
    mean, variance = beliefs[output][0].predict(features)
    spread = 1.645 * jnp.sqrt(variance)
    axes.plot(x_train[:, 0], y_train[:, output], ".", color="0.75", markersize=3, label="targets")
    axes.plot(grid[:, 0], signal(grid)[:, output], "--", color="0.3", label="truth")
    axes.plot(grid[:, 0], mean[:, 0], color="C0", label="mean")
    band = (mean - spread)[:, 0], (mean + spread)[:, 0]
    axes.fill_between(grid[:, 0], *band, color="C0", alpha=0.2, label="90 % of new targets")
    axes.set(xlabel="x", ylabel=f"output {output}", ylim=(-2.5, 2.5))
panels[0].legend(frameon=False, fontsize=8)
figure.tight_layout()

# %% [markdown]
# What is uncertain here is the *head*. Beyond the data the backbone extrapolates in a way of its own, and
# the band knows of it only as far as the features change. A backbone that was trained long on few samples
# leaves residuals that are too small: `posterior.rescaled(features, targets)` with samples held out.

# %% [markdown]
# ## New samples, a frozen backbone
#
# `cfll.kalman` keeps the posterior of all samples seen, in its state, by the same train step. With a
# frozen backbone nothing else is needed; `forgetting=0.99` is for targets that drift. While a backbone
# still trains fast it is worse than `prox`: it believes what features of long ago have said.

# %%
filtering = cfll.kalman(beta=1e-2)
online = cfll.closed_form(optax.set_to_zero(), filtering, head="head")
frozen = cfll.set_head(state.params, "head", cfll.LinearHead.zeros(64, 2))
opt_state = online.init(frozen)
errors, spreads = [], []
x_new, y_new = draw(jax.random.key(5), 40 * 16)
test_features = net.apply({"params": frozen}, x_test, method="features")
for x, y in zip(x_new.reshape(40, 16, 1), y_new.reshape(40, 16, 2), strict=True):
    features = net.apply({"params": frozen}, x, method="features")
    _, solution = filtering.loss(features, y, cfll.get_state(opt_state))
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    updates, opt_state = online.update(zeros, opt_state, frozen, solution=solution)
    frozen = optax.apply_updates(frozen, updates)
    head_state = cfll.get_state(opt_state)
    posterior = head_state.rule_state.posterior(head_state.anchor)
    left = posterior.head(test_features) - signal(x_test)
    errors.append(jnp.sqrt(jnp.mean(left**2)))
    spreads.append(jnp.sqrt(jnp.mean(posterior.head_variance(test_features))))

figure, axes = plt.subplots(figsize=(6, 3.5))
axes.loglog(
    16 * jnp.arange(1, 41), errors, "o-", color="C0", markersize=4, label="error of the mean"
)
axes.loglog(
    16 * jnp.arange(1, 41),
    spreads,
    "s--",
    color="0.5",
    markersize=4,
    label="what the filter expects",
)
axes.set_xticks([16, 64, 256, 640], ["16", "64", "256", "640"])
axes.set_xticks([], minor=True)
axes.set(xlabel="samples seen", ylabel="root mean square, units of the targets")
axes.legend(frameon=False)
figure.tight_layout()
