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
# # Diagnostics, what can go wrong, and Optax's wrappers
#
# Trouble that depends on data (a NaN, features without full rank, another transformation that moves the head)
# is never an exception inside jit and never silent: it is a field of `cfll.get_state(opt_state).info`. This guide
# provokes what can go wrong, shows where you see it, and lists what is promised and which of Optax's wrappers
# do what to a head. It runs in under a minute on a CPU.

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
import numpy as np
import optax

import cfll

# %% [markdown]
# ## The fields
#
# | field | meaning |
# |---|---|
# | `accepted`, `skipped` | a head that is not finite (NaN batch, even in one output) is not used: the old one stays, the backbone's update passes, the event is counted. Protect the backbone with `optax.apply_if_finite`: then it counts, and the head never sees the batch |
# | `solve.route`, `solve.rcond` | how it was solved; `cfll.Route(info.route)` prints the name. `qr` after `auto`: singular to working precision, as dead or repeated features make it. `given`: a `LinearHead` of your own came as `solution`. A Cholesky solve errs by about 1e-7 / `rcond` before refinement |
# | `solve.iterations`, `solve.residual` | of `cfll.CG`, else 0. A residual above the tolerance: not finished |
# | `drift` | something else moves the head's parameters: a transformation *after* `closed_form_head`, or parameters replaced without `tx.init` |
# | `overruled` | in the order of Eq. (17): largest update of the head that the solution replaced. Not zero: the backbone uses leaves of the head as well (tied weights), the loss has another term of the head, or weight decay comes before `closed_form_head` |
# | `stale` | the solution came from the state of another update: `rule.loss` got a `cfll.get_state(opt_state)` from before, e.g. from outside the train step |
#
# `info.route` and `info.rcond` are shortcuts for the part of the solve.

# %%
rule = cfll.prox(lam=1e-3)
params = {"w": jnp.eye(6), "head": {"kernel": jnp.zeros((6, 1)), "bias": jnp.zeros(1)}}
x = jax.random.normal(jax.random.key(0), (64, 6))
y = jnp.sin(x[:, :1])


def make_step(tx):
    @jax.jit
    def step(params, opt_state, x, y):
        def loss_fn(params):
            return rule.loss(jnp.tanh(x @ params["w"]), y, cfll.get_state(opt_state))

        (_, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, solution=solution)
        return optax.apply_updates(params, updates), opt_state

    return step


def show(name, opt_state):
    info = cfll.get_state(opt_state).info
    print(
        f"{name:<26} accepted {bool(info.accepted)!s:<5} skipped {info.skipped} "
        f"route {cfll.Route(info.route)!s:<7} rcond {info.rcond:.1e} drift {info.drift:.1e} "
        f"overruled {info.overruled:.1e}"
    )


tx = cfll.closed_form(optax.sgd(0.1), rule, head="head")
step, opt_state = make_step(tx), tx.init(params)
show("healthy", step(params, opt_state, x, y)[1])
show("a NaN in the targets", step(params, opt_state, x, y.at[3].set(jnp.nan))[1])
show("a feature twice", step(params, opt_state, x.at[:, 1].set(x[:, 0]), y)[1])

decayed = optax.chain(tx, optax.add_decayed_weights(1e-2))  # after the head: moves it
step, state = make_step(decayed), decayed.init(params)
for _ in range(3):
    params, state = step(params, state, x, y)
show("weight decay after it", state)

# %% [markdown]
# ## What `rcond` says, and when to believe a head
#
# Features that become dependent: `rcond` falls, the route changes from Cholesky to the fallback, and predictions
# stay right, because the fallback sees what float32 can still tell apart. (An `rcond` of 0, drawn at 1e-10: Cholesky failed.)

# %%
rng = np.random.default_rng(0)
base, extra = rng.normal(size=(256, 8)), rng.normal(size=(256, 1))
targets = np.sin(base[:, :1]) + 0.1 * rng.normal(size=(256, 1))
distances, rows = 10.0 ** -np.arange(0, 9), []
for distance in distances:
    features = np.concatenate([base, base[:, :1] + distance * extra], axis=1)
    centered = features - features.mean(axis=0)
    exact = centered @ np.linalg.solve(
        centered.T @ centered + 1e-6 * np.eye(9), centered.T @ (targets - targets.mean())
    )
    features32, targets32 = jnp.float32(features), jnp.float32(targets)
    anchor = cfll.LinearHead.zeros(9, 1)
    head, info = cfll.penalized_solve(features32, targets32, anchor, 1e-6, penalize_bias=False)
    error = np.abs(np.asarray(head(features32)) - exact - targets.mean()).max()
    rows.append((float(info.rcond), error, str(cfll.Route(info.route))))

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.loglog(distances, [max(rcond, 1e-10) for rcond, *_ in rows], "-o", label="rcond")
axes.loglog(distances, [error for _, error, _ in rows], "--s", label="error of a prediction")
axes.set(
    xlabel="distance of two features",
    title="float32, " + " → ".join(dict.fromkeys(r for *_, r in rows)),
)
axes.legend()
plt.show()

# %% [markdown]
# ## What is promised
#
# And the command that shows it (`test_x.py`: `python -m pytest tests/test_x.py`, `-k x`: `python -m pytest -k x`):
#
# | promise | shown by |
# |---|---|
# | float32: a head errs by at most 1e-4 of head or anchor, whichever is larger, up to condition 1e4 of the penalized system | `python -m pytest -m grid` |
# | float64: scikit-learn's `Ridge` to 1e-5, with weights, with and without intercept | `-k agrees_with_scikit_learn` |
# | features for which Cholesky fails (dead, repeated, collinear): predictions on them within 1e-3 with `solver="auto"` | `-k auto_survives` |
# | beyond that `rcond` warns (0: Cholesky failed): of 672 problems none errs by more than 1e-3 in predictions without a warning | `python -m benchmarks numerics` |
# | a mean of the targets costs the kernel no digits; a million rows of few features cost none; in directions without data the head stays small over a run | `test_float32.py` |
# | `GramStats` in float32: a long stream errs as a short one; any chunking, merging and `psum` is one call; means of features and targets cost no digits | `test_stats.py` |
# | every solver and `GramStats` the same under jit, eagerly, in vmap, scan, shard_map, an explicit mesh, exported, with `jax_debug_nans`, from float16 to float64 | `test_contract.py` |
# | outside of jit no public function compiles again for the same shapes; "auto" with few samples, very many features and three outputs takes at most 3 times the memory of "dual" (with one output: that of "dual" and at most 2.2 times the features) | `test_contract.py` |
# | any mix of wrapper, order of a step, optimizer and dtype: the head of a NumPy transcription, or an error in words of ours | `test_programs.py`, `test_wrappers.py` |
# | a head that is not finite in the dtype of the parameters never replaces one that is | `-k never_accepted`, `test_transform.py` |
# | targets missing per output (weights of zero): the solution of each output's own samples; the step has no NaN | `test_missing.py` |
# | batches on several devices: the head of one device | `test_scale.py` |
# | in `pmap` and `shard_map` a rule without `axis_name` is an error: replicas do not part unseen | `-k replicas` |
#
# No promise for `solver="dual"` on more samples than features, for `solver="primal"` on fewer (1.2e-4 was seen), for `GramStats` in float32 at condition numbers
# above 1e3, nor for features in float32 whose mean is 1e4 times their spread (`rcond` says so): subtract it.
#
# ## Optax's wrappers, and the rest of a train step
#
# | wrapper | with `closed_form_head` |
# |---|---|
# | `optax.chain`, `named_chain`, `inject_hyperparams`, `apply_if_finite` | work; put the head last in a chain |
# | line searches (`optax.lbfgs`), `optax.contrib.sam` | work as the backbone's optimizer: `cfll.closed_form(optax.lbfgs(), rule)` hands them only what they or their functions name, `tx.update(..., solution=solution, value=loss, grad=grads, value_fn=lambda p: loss_fn(p)[0])`. Around the head or beside it in your own `optax.chain` Optax 0.2.8 refuses the head's keywords |
# | `optax.contrib.schedule_free`, `mechanize`, `optax.ema` | work as the backbone's optimizer; around or after the head they average it, too: `drift` shows it. The averaged backbone of the first: `hidden = params \| {"head": jax.tree.map(lambda _: optax.MaskedNode(), params["head"])}`, `optax.contrib.schedule_free_eval_params(opt_state[0].inner_state, hidden) \| {"head": params["head"]}`; then solve the head once more, see below |
# | `optax.lookahead` | refuses keywords: bind them, `optax.lookahead(optax.GradientTransformation(tx.init, partial(tx.update, solution=solution)), ...)`. It averages the head at each synchronization (`drift`). Not inside `closed_form` |
# | `optax.contrib.prodigy`, normalized gradients (SAM) | in the order of Eq. (17) as they are. In Algorithms 1 and 2 a head of zeros gives the backbone a first gradient of zero, and 0 / 0 is NaN: every head is rejected from then on (`skipped` counts). A line search stays where it is. Solve a first head before training: `cfll.set_head(params, "head", cfll.prox_solve(...))` |
# | `optax.MultiSteps` | the head is solved on the last micro-batch only; for all of them add to `cfll.GramStats` and pass `solution=stats.prox(cfll.get_state(opt_state).anchor, lam)`, `lam` a number of yours: no rule learns there. Put it outermost: inside a chain it drops keywords |
# | `optax.masked`, `partition` | work with `solution`; a `feature_fn` that needs what they hide is an error that says so. Use `cfll.closed_form` |
# | `pmap`, `shard_map` | `cfll.prox(lam, axis_name="i")`, see above; without it an error, since replicas would part. Not seen: `jax.vmap` with a named axis |
# | checkpoints | restore into `tx.init(params)`: a state without types is refused |
# | tied weights | a head whose leaves the backbone uses as well is not supported; in the order of Eq. (17) `overruled` shows it |
# | `flax.training.train_state.TrainState` | drops keywords; `cfll.flax.TrainState` passes them on |
# | batch norm, dropout | the feature functions run a second forward pass in the mode you ask for and *discard* its statistics: they move once per step. In linen: `TrainState.create(..., batch_stats=variables["batch_stats"])`, then `cfll.flax.feature_fn(state, x, train=True, rngs={"dropout": key})` and `state.apply_gradients(..., batch_stats=new)`, where `train` is your method's own keyword and `new` comes from your loss. Solve the head once more at the end, see below |

# %% [markdown]
# For example, gradients summed over micro-batches: the head of all of them is the solution of their sums.

# %%
stats = cfll.GramStats.zeros(6, 1)
for part in (slice(0, 32), slice(32, 64)):
    stats = stats.add(jnp.tanh(x[part] @ params["w"]), y[part])
head = stats.prox(cfll.get_state(opt_state).anchor, 1e-3)
whole = cfll.prox_solve(jnp.tanh(x @ params["w"]), y, cfll.get_state(opt_state).anchor, 1e-3)
print(jnp.abs(head.kernel - whole.kernel).max())

# %% [markdown]
# ## Batch norm, dropout
#
# While it trains, a batch norm uses the statistics of the batch; evaluated, it uses running ones. Dropout is
# noise in training alone. A closed-form head fits the features of its batches closely, and so notices the
# difference more than a gradient head does: the smaller the batch or the larger the noise, the more. Train as
# ever; then solve the head once more, on features as they are evaluated: sums over the data in one pass, of any
# batches. (Solved on evaluated features at *every* step, it was worse in the end wherever that was tried.) Sums
# are for the squared loss. With `cfll.softmax` and the other losses take a few steps of the rule instead, on
# evaluated features of as many rows as fit: `rule.loss(features, targets, head_state)[1].head`. Let learning
# rates decay, too: with a constant one the backbone moves away from the head that was solved just before.


# %%
class Normalized(nn.Module):
    def setup(self):
        self.hidden, self.norm, self.head = nn.Dense(64), nn.BatchNorm(momentum=0.9), nn.Dense(1)

    def features(self, x, train):
        return nn.gelu(self.norm(self.hidden(x), use_running_average=not train))

    def __call__(self, x, train=False):
        return self.head(self.features(x, train))


inputs = jax.random.normal(jax.random.key(1), (4096, 4))
outputs = jnp.sin(inputs[:, :1] * inputs[:, 1:2]) + inputs[:, 2:3] ** 2
train_x, train_y, test_x, test_y = inputs[:3072], outputs[:3072], inputs[3072:], outputs[3072:]
net, rule = Normalized(), cfll.prox(lam=10.0)
variables = net.init(jax.random.key(2), train_x[:2])
tx = cfll.closed_form(optax.adam(optax.cosine_decay_schedule(1e-2, 960)), rule, head="head")
state = cfll.flax.TrainState.create(
    apply_fn=net.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
)


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        features, new = state.apply_fn(
            variables, x, True, method="features", mutable=["batch_stats"]
        )
        loss, solution = rule.loss(features, y, cfll.get_state(state))
        return loss, (solution, new["batch_stats"])

    grads, (solution, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, solution=solution, batch_stats=batch_stats)


rng = np.random.default_rng(0)
for _ in range(10):
    for rows in rng.permutation(len(train_x)).reshape(-1, 32):
        state = train_step(state, train_x[rows], train_y[rows])


def evaluated(x):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return net.apply(variables, x, False, method="features")


stats = cfll.GramStats.zeros(64, 1)
for rows in np.arange(len(train_x)).reshape(-1, 512):
    stats = stats.add(evaluated(train_x[rows]), train_y[rows])
anchor = cfll.get_state(state).anchor
for name, head in {"as trained": anchor, "solved once more": stats.prox(anchor, 10.0)}.items():
    error = jnp.mean((head(evaluated(test_x)) - test_y) ** 2)
    print(f"{name:17} test error {error:.4f}")
params = cfll.set_head(state.params, "head", stats.prox(anchor, 10.0))  # to keep
