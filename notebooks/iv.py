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
# # What would happen if? Instrumental variables with `cfll.iv`
#
# Regression predicts what *is* seen together. This guide is about what *would* happen if you changed
# something, from data in which somebody else changed it for reasons that you do not see. You need no
# experience of instrumental variables. It runs in about a minute on a CPU.

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
from cfll import iv

# %% [markdown]
# ## Prices, sales, and what nobody wrote down
#
# An airline raises its prices x when many want to fly (holidays, a congress), and then it also sells many
# tickets y. That demand is not in the data: a hidden *confounder* h. Fuel costs z, on the other hand, move
# the price and nothing else: an *instrument*.


# %%
def circle(axes, place, text, style="-"):
    box = {
        "boxstyle": "round,pad=0.5",
        "facecolor": "white",
        "edgecolor": "black",
        "linestyle": style,
    }
    return axes.text(*place, text, ha="center", va="center", bbox=box)


figure, axes = plt.subplots(figsize=(7, 2.6))
z = circle(axes, (0, 0), "instrument z\n(fuel cost)")
x = circle(axes, (1.5, 0), "treatment x\n(price)")
y = circle(axes, (3, 0), "outcome y\n(tickets sold)")
h = circle(axes, (2.25, 1), "confounder h\n(demand, not seen)", "--")
for start, end, style in ((z, x, "-"), (x, y, "-"), (h, x, "--"), (h, y, "--")):
    arrow = {"arrowstyle": "-|>", "patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    arrow |= {"color": "black", "linestyle": style, "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", end.get_position(), start.get_position(), arrowprops=arrow)
axes.text(2.25, 0.08, "f", fontstyle="italic", ha="center")
axes.set(xlim=(-0.6, 3.6), ylim=(-0.4, 1.4))
axes.axis("off")
figure.tight_layout()


# %%
def f(x):
    """Thousands of tickets that a price x in dollars sells, whoever set it: what we want to know."""
    return 2 * jax.nn.sigmoid((140 - x) / 12)


def draw(key, n):
    keys = jax.random.split(key, 3)
    z = jax.random.uniform(keys[0], (n, 1), maxval=100)  # cost
    h, noise = (jax.random.normal(k, (n, 1)) for k in keys[1:])  # demand; all else
    x = 90 + z + 25 * h
    return iv.IVBatch(instrument=z, treatment=x, outcome=f(x) + 0.7 * h + 0.1 * noise)


data, held_out = draw(jax.random.key(0), 4000), draw(jax.random.key(1), 2000)
grid = jnp.linspace(75, 205, 100)[:, None]

# %% [markdown]
# ## Two networks
#
# Each is a backbone without head: features of the price, features of the cost.


# %%
class Net(nn.Module):
    center: float

    @nn.compact
    def __call__(self, inputs):
        hidden = (inputs - self.center) / 30
        for width in (32, 32, 16):
            hidden = nn.tanh(nn.Dense(width)(hidden))
        return hidden


def backbone(center, seed, inputs):
    net = Net(center)
    return cfll.flax.backbone(net, net.init(jax.random.key(seed), inputs[:1]))


networks = iv.Networks(
    treatment=backbone(140.0, 2, data.treatment), instrument=backbone(50.0, 3, data.instrument)
)

# %% [markdown]
# ## What regression says
#
# The best prediction of sales from the price. It is right as a prediction, and wrong as advice: beyond 170
# dollars, it says, tickets sell the better the dearer they are. They were dear when many wanted them.

# %%
ROUNDS, BATCH, RATE, BETA = 300, 256, 3e-3, 10.0


def rows_of(key):
    """Two different batches."""
    rows = jax.random.choice(key, len(data.outcome), (2, BATCH), replace=False)
    return (jax.tree.map(lambda a, r=r: a[r], data) for r in rows)


@jax.jit
def regression():
    net, rule = networks.treatment, cfll.prox(100.0)
    tx = cfll.closed_form(optax.adam(RATE), rule)

    def features_of(params, inputs):
        return net.apply(params["net"], net.stats, inputs, train=True)[0]

    def step(carry, key):
        params, opt_state = carry
        batch, _ = rows_of(key)

        def loss_fn(params):
            state = cfll.get_state(opt_state)
            return rule.loss(features_of(params, batch.treatment), batch.outcome, state)

        grads, solution = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return (optax.apply_updates(params, updates), opt_state), None

    params = {"net": net.params, "head": cfll.LinearHead.zeros(16, 1)._asdict()}
    (params, opt_state), _ = jax.lax.scan(
        step, (params, tx.init(params)), jax.random.split(jax.random.key(4), 4 * ROUNDS)
    )
    return cfll.get_state(opt_state).anchor(features_of(params, grid))


regressed = regression()


def show(axes, lines):
    axes.plot(
        data.treatment[:600], data.outcome[:600], ".", color="0.75", markersize=3, label="observed"
    )
    axes.plot(grid, f(grid), color="black", linewidth=3, label="truth f")
    for label, (values, style) in lines.items():
        axes.plot(grid, values, style, color="C1", label=label)
    axes.set(xlim=(70, 210), xlabel="price x (dollars)", ylabel="tickets y (thousands)")
    axes.legend(frameon=False)


figure, axes = plt.subplots(figsize=(6, 3.5))
show(axes, {"regression of y on x": (regressed, "--")})
figure.tight_layout()


# %% [markdown]
# ## Two stages
#
# Of all changes of the price, use those that the cost made:
#
# 1. predict the *features of the price* from the cost, $W^\top\phi(z) \approx E[\psi(x) \mid z]$: demand
#    averages out, because cost knows nothing of it;
# 2. predict sales from those predictions, $w^\top W^{\star\top}\phi(z) \approx E[y \mid z]$.
#
# The same $w$ on the price itself is the answer: $f(x) = w^\top\psi(x)$. `cfll.iv.proximal` trains both
# networks and solves both heads in closed form, at every step, near their previous values, before the
# network descends on the loss at the solved head: Eq. (17).


# %%
@jax.jit
def train(lam1, lam2, lam12=1.0):
    adam = {"treatment_optimizer": optax.adam(RATE), "instrument_optimizer": optax.adam(RATE)}
    method = iv.proximal(networks, **adam, lam1=lam1, lam2=lam2, lam12=lam12)

    def round_(state, key):
        state, losses = method.round(state, *rows_of(key))  # 20 updates of stage 1, one of stage 2
        return state, losses

    return jax.lax.scan(round_, method.init(data), jax.random.split(jax.random.key(5), ROUNDS))


state, (loss1, loss2) = train(lam1=1000.0, lam2=100.0)

# %% [markdown]
# ## Current and refitted heads
#
# The heads in the state are current at every step: `iv.predict` needs nothing else. They have seen one
# batch after the other, though; `iv.refit` solves both heads on all data with the trained backbones. Two
# things make current heads many times worse than refitted ones: a learning rate that does not decay (the
# networks move away from the heads just solved) and batch norm (heads fit features of the batch's
# statistics, and are evaluated with running ones). Let rates decay; with batch norm, refit. `refit`
# takes any iterables of batches, so the data need not fit in memory. Its `beta` is worth something here:
# waves of f that are shorter than the scatter of the price around its mean leave no trace in the cost, and
# only the penalty keeps them out.

# %%
refitted = iv.refit(networks, state, [data], [data], beta=BETA)
answers = {
    "IV, current heads": (iv.predict(networks, state, grid), ":"),
    "IV, refitted heads": (iv.predict(networks, state, grid, stage2=refitted.stage2), "-"),
}
figure, axes = plt.subplots(figsize=(6, 3.5))
show(axes, answers)
figure.tight_layout()


def error(values):
    return float(jnp.mean((values - f(grid)) ** 2))


print(f"regression of y on x   squared error {error(regressed):.4f}")
for label, (values, _) in answers.items():
    print(f"{label:22} squared error {error(values):.4f}")

# %% [markdown]
# ## Is it to be trusted?
#
# You will not know the truth. Look at these:
#
# * `state.stage1.info.skipped`, `state.stage2.info.skipped`: solves that were not finite, and not used.
# * `refitted.stage1_info.rcond`, `refitted.stage2_info.rcond`: below 1e-5 in float32, the weakest
#   directions are rounding. Take a larger `beta`, or float64.
# * How much of the price's features the cost explains, on held-out data. Near zero, the instrument is weak,
#   and the answer is regression's once more, or noise.
# * How well the two stages predict the outcome *from the instrument*, on held-out data: an error that
#   needs no truth, and the one to choose by.
#
# That the instrument acts through the price alone, no number can tell.


# %%
def of_instrument(state, z):
    """Features phi(z)."""
    net = state.instrument
    return networks.instrument.apply(net.params, net.stats, z, train=False)[0]


def explained(state, refitted):
    """Share of the variance of the treatment's features that the instrument explains, held out."""
    net = state.treatment
    psi, _ = networks.treatment.apply(net.params[0], net.stats[0], held_out.treatment, train=False)
    left = psi - refitted.stage1(of_instrument(state, held_out.instrument))
    return float(1 - jnp.sum(left**2) / jnp.sum((psi - psi.mean(axis=0)) ** 2))


def stage2_error(state, refitted):
    """Mean squared error of the outcome predicted from the instrument, held out."""
    predicted = refitted.stage2(refitted.stage1(of_instrument(state, held_out.instrument)))
    return float(jnp.mean((predicted - held_out.outcome) ** 2))


print("skipped solves:", int(state.stage1.info.skipped), int(state.stage2.info.skipped))
print(f"rcond: {refitted.stage1_info.rcond:.0e} and {refitted.stage2_info.rcond:.0e}")
print(f"explained by the instrument: {explained(state, refitted):.2f}")
print(f"error of y from z: {stage2_error(state, refitted):.4f}")

# %% [markdown]
# ## Choosing `lam1`, `lam2` and `lam12`
#
# All three multiply a sum over the batch, so their scale is that of the batch size.
#
# * `lam1` (stage 1) and `lam2` (stage 2): small ones follow each batch, and its noise; large ones average
#   over many batches. Here noise is all that IV has to fight: start at the batch size or above, and try a
#   factor of 100 either way.
# * `lam12` is that of the head $W^\star$ inside stage 2, through which the treatment network gets its
#   gradient. Too small, $W^\star$ fits the demand in this one batch, which is what stage 1 was to remove.
#   Too large, it stays where it was, and the gradient is lost. Start at 1.
#
# Compare runs by the held-out error of stage 2. Most of it is noise that no run can predict, so its
# differences are small: take it to throw out what is bad, not to rank what is good.

# %%
LAMS = [1.0, 100.0, 10_000.0]


def judged(*lams):
    state, _ = train(*lams)
    refitted = iv.refit(networks, state, [data], [data], beta=BETA)
    values = iv.predict(networks, state, grid, stage2=refitted.stage2)
    return stage2_error(state, refitted), error(values)


pairs = {(lam1, lam2): judged(lam1, lam2) for lam1 in LAMS for lam2 in LAMS}
inner = {lam12: judged(100.0, 100.0, lam12) for lam12 in (1e-4, 1e-2, 1.0, 1e2, 1e4)}
for (lam1, lam2), (held, true) in sorted(pairs.items(), key=lambda item: item[1]):
    print(f"lam1 {lam1:<6g} lam2 {lam2:<6g} error of y from z {held:.4f}   of f {true:.4f}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
runs = {f"lam1 = {lam1:g}": [pairs[lam1, lam2] for lam2 in LAMS] for lam1 in LAMS}
runs["lam12 varied"] = list(inner.values())
for marker, (label, found) in zip("ox^s", runs.items(), strict=True):
    filled = "none" if marker == "s" else "black"
    panels[0].semilogy(*zip(*found, strict=True), marker, color="black", mfc=filled, label=label)
panels[0].set(xlabel="held-out error of y from z (needs no truth)", ylabel="squared error of f")
panels[1].loglog(list(inner), [true for _, true in inner.values()], "s-", color="black", mfc="none")
panels[1].set(xlabel="lam12 (penalty on a sum over the batch)")
for axes in panels:
    axes.axhline(error(regressed), linestyle="--", color="0.5", label="regression")
panels[0].legend(frameon=False, fontsize="small")
figure.tight_layout()

# %% [markdown]
# Observed covariates c, with which the effect of the price may vary, have a third network:
# `iv.Networks(treatment, instrument, covariate)`. What enters linearly only, as in two-stage least squares,
# is part of both the treatment and the instrument. `iv.original` is the method of Xu et al. (2020), for
# large batches; `python -m benchmarks dfiv` compares.

# %% [markdown]
# ## A confounder that is seen in proxies only
#
# Without an instrument, but with two noisy views of the hidden demand, the effect can be found, too (DFPV,
# Xu et al. 2021): a treatment proxy z, which tells nothing more about y once price and demand are known, and an
# outcome proxy w, which price and z do not move. It is the same problem with its parts in other places:
# `iv.proxy.networks` and `iv.proxy.batch` put them there, and `iv.proxy.predict` takes the mean over the outcome
# proxy. Below, the effect of the price is -1 and the demand hides it. `python -m benchmarks proxy` compares.


# %%
class Features(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.tanh(nn.Dense(16)(inputs))


demand, *noises = jax.random.normal(jax.random.key(6), (4, 4000, 1))
price = demand + noises[0]
views = {"treatment_proxy": demand + 0.3 * noises[1], "outcome_proxy": demand + 0.3 * noises[2]}
seen = iv.proxy.batch(treatment=price, outcome=-price + 3 * demand, **views)
proxies = iv.proxy.networks(
    **{
        name: cfll.flax.backbone(Features(), Features().init(jax.random.key(seed), price[:1]))
        for seed, name in enumerate(
            ("treatment1", "treatment_proxy", "outcome_proxy", "treatment2")
        )
    }
)
adam = {"treatment_optimizer": optax.adam(RATE), "instrument_optimizer": optax.adam(RATE)}
method = iv.proximal(proxies, **adam, lam1=100.0, lam2=100.0)
advance = jax.jit(method.round)
halves = [jax.tree.map(lambda a, k=k: a[k::2], seen) for k in (0, 1)]  # one for each stage
state = method.init(halves[0])
for _ in range(100):
    state, losses = advance(state, *halves)
refitted = iv.refit(proxies, state, halves[:1], halves[1:], beta=1.0)


def slope(head):
    prices = jnp.array([[-1.0], [1.0]])
    low, high = iv.proxy.predict(proxies, state, prices, views["outcome_proxy"], stage2=head)
    return float((high - low)[0] / 2)


naive = jnp.polyfit(price.ravel(), seen.outcome.ravel(), 1)[0]
print(f"slope by regression {naive:+.2f}, by proxies {slope(None):+.2f} (current heads), ", end="")
print(f"{slope(refitted.stage2):+.2f} (refitted)")
