"""Two-stage heads against transcriptions of Algorithm 3 and of the original."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import cfll.flax
from cfll import iv

RNG = np.random.default_rng(0)
RATE = 0.1
FACTORIZATIONS = ("cholesky", "eigh", "svd", "qr", "householder", "geqrf", "lu")


def tanh_net(params, stats, inputs, *, train):
    return jnp.tanh(inputs @ params), stats


def make_networks(covariate=False):
    def net(d_in, d_out):
        return iv.Backbone(tanh_net, jnp.asarray(RNG.normal(size=(d_in, d_out))))

    return iv.Networks(net(2, 4), net(3, 5), net(2, 3) if covariate else None)


def make_batch(n, covariate=False):
    z, hidden = RNG.normal(size=(n, 3)), RNG.normal(size=(n, 1))
    x = z[:, :2] + hidden
    y = np.sin(x[:, :1]) + hidden
    c = RNG.normal(size=(n, 2)) if covariate else None
    return jax.tree.map(jnp.asarray, iv.IVBatch(z, x, y, c))


def with_ones(features):
    return jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)


def solve(features, targets, anchor, penalty):
    """Eq. (13), by an explicit inverse; `features` have their ones column."""
    gram = features.T @ features + penalty * jnp.eye(features.shape[1])
    return jnp.linalg.inv(gram) @ (features.T @ targets + penalty * anchor)


def stage2_features(predicted, params, batch2):
    """Outer products with intercepts, as the original's code writes them."""
    if params[1] is None:
        return with_ones(predicted)
    left, right = with_ones(predicted), with_ones(jnp.tanh(batch2.covariate @ params[1]))
    d = left.shape[1] * right.shape[1]
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), d)


def square(residual):
    return jnp.mean(jnp.sum(residual**2, axis=1))


def algorithm_3(theta_x, theta_z, batch1, batch2, *, lams, steps, rounds):
    """As printed, lines 4 to 14, every derivative taken through the inverse."""
    lam1, lam2, lam12 = lams
    d = stage2_features(jnp.zeros((1, 4)), theta_x, jax.tree.map(lambda a: a[:1], batch2)).shape[1]
    big_w, w = jnp.zeros((6, 4)), jnp.zeros((d, 1))
    for _ in range(rounds):
        for _ in range(steps[0]):
            psi = jnp.tanh(batch1.treatment @ theta_x[0])

            def features1(theta):
                return with_ones(jnp.tanh(batch1.instrument @ theta))

            grad = jax.grad(lambda t, W, p, f: square(p - f(t) @ W), 0)(
                theta_z, big_w, psi, features1
            )
            theta_z = theta_z - RATE * grad
            big_w = solve(features1(theta_z), psi, big_w, lam1)
        for _ in range(steps[1]):
            phi1 = with_ones(jnp.tanh(batch1.instrument @ theta_z))
            phi2 = with_ones(jnp.tanh(batch2.instrument @ theta_z))

            def features2(theta, W, phi1, phi2):
                star = solve(phi1, jnp.tanh(batch1.treatment @ theta[0]), W, lam12)
                return stage2_features(phi2 @ star, theta, batch2)

            f = partial(features2, W=big_w, phi1=phi1, phi2=phi2)
            grad = jax.grad(lambda t, w, f: square(batch2.outcome - f(t) @ w), 0)(theta_x, w, f)
            theta_x = jax.tree.map(lambda p, g: p - RATE * g, theta_x, grad)
            w = solve(f(theta_x), batch2.outcome, w, lam2)
    return theta_x, theta_z, big_w, w


def original_dfiv(theta_x, theta_z, batch1, batch2, *, betas, steps, rounds):
    """Xu et al.: descend on the regularized losses, through all inverses."""
    beta1, beta2 = betas
    for _ in range(rounds):
        for _ in range(steps[0]):
            psi = jnp.tanh(batch1.treatment @ theta_x[0])

            def loss1(theta, psi):
                phi = with_ones(jnp.tanh(batch1.instrument @ theta))
                big_w = solve(phi, psi, 0.0, beta1)
                return square(psi - phi @ big_w) + beta1 * jnp.sum(big_w**2) / len(phi), big_w

            grad, big_w = jax.grad(loss1, has_aux=True)(theta_z, psi)
            theta_z = theta_z - RATE * grad
        for _ in range(steps[1]):
            phi1 = with_ones(jnp.tanh(batch1.instrument @ theta_z))
            phi2 = with_ones(jnp.tanh(batch2.instrument @ theta_z))

            def loss2(theta, phi1, phi2):
                star = solve(phi1, jnp.tanh(batch1.treatment @ theta[0]), 0.0, beta1)
                features = stage2_features(phi2 @ star, theta, batch2)
                w = solve(features, batch2.outcome, 0.0, beta2)
                return square(batch2.outcome - features @ w) + beta2 * jnp.sum(w**2) / len(phi2), w

            grad, w = jax.grad(loss2, has_aux=True)(theta_x, phi1, phi2)
            theta_x = jax.tree.map(lambda p, g: p - RATE * g, theta_x, grad)
    return theta_x, theta_z, big_w, w


def stacked(head):
    return np.concatenate([head.kernel, head.bias[None]])


def skipped(state):
    return int(state.stage1.info.skipped + state.stage2.info.skipped)


def optimizers(make=optax.sgd):
    return {"treatment_optimizer": make(RATE), "instrument_optimizer": make(RATE)}


@pytest.mark.slow
@pytest.mark.parametrize("covariate", [False, True])
@pytest.mark.parametrize("method", ["proximal", "original"])
def test_a_run_equals_the_transcription(x64, method, covariate):
    networks = make_networks(covariate)
    batch1, batch2 = make_batch(40, covariate), make_batch(30, covariate)
    steps, rounds = (3, 2), 2
    if method == "proximal":
        made = iv.proximal(
            networks,
            **optimizers(),
            lam1=2.0,
            lam2=3.0,
            lam12=0.1,
            order="descend-then-solve",
            stage1_steps=3,
            stage2_steps=2,
        )
        reference = partial(algorithm_3, lams=(2.0, 3.0, 0.1))
    else:
        made = iv.original(
            networks, **optimizers(), beta1=2.0, beta2=3.0, stage1_steps=3, stage2_steps=2
        )
        reference = partial(original_dfiv, betas=(2.0, 3.0))
    state = made.init(batch1)
    for _ in range(rounds):
        state, _ = made.round(state, batch1, batch2)

    theta_x = (networks.treatment.params, networks.covariate.params if covariate else None)
    expected_x, expected_z, big_w, w = reference(
        theta_x, networks.instrument.params, batch1, batch2, steps=steps, rounds=rounds
    )
    np.testing.assert_allclose(state.instrument.params, expected_z, rtol=1e-6)
    chex.assert_trees_all_close(state.treatment.params, expected_x, rtol=1e-6)
    np.testing.assert_allclose(stacked(state.stage1.anchor), big_w, rtol=1e-6)
    got, order = stacked(state.stage2.anchor), np.arange(len(w))
    if covariate:  # ours: products, treatment, covariate, 1; theirs: (4 + 1) x (3 + 1), row by row
        grid = order.reshape(5, 4)
        order = np.concatenate([grid[:4, :3].ravel(), grid[:4, 3], grid[4, :3], grid[4, 3:]])
    np.testing.assert_allclose(got, np.asarray(w)[order], rtol=1e-6, atol=1e-12)
    assert (int(state.stage1.count), int(state.stage2.count), skipped(state)) == (6, 4, 0)


@pytest.mark.parametrize(
    ("order", "solves"), [("solve-then-descend", 2), ("descend-then-solve", 3)]
)
def test_stage_2_never_differentiates_a_factorization(order, solves):
    networks, batch = make_networks(), make_batch(20)
    options = {**optimizers(), "lam1": 1.0, "lam2": 1.0, "order": order, "solver": "primal"}
    method = iv.proximal(networks, **options)
    state = method.init(batch)

    def loss(params):
        net = state.treatment._replace(params=params)
        return method.stage2(state._replace(treatment=net), batch, batch)[1]

    # The forward pass factorizes; the linear map that is its derivative does not.
    assert "cholesky" in str(jax.make_jaxpr(loss)(state.treatment.params))
    _, derivative = jax.linearize(loss, state.treatment.params)
    jaxpr = str(jax.make_jaxpr(derivative)(state.treatment.params))
    assert "triangular_solve" in jaxpr  # W* depends on the treatment network: one more solve
    forward = str(jax.make_jaxpr(lambda p: method.stage2(state, batch, batch))(0))
    # And the whole step holds guarded solves, W* once per forward pass and w, none for gradients.
    assert forward.count("= cholesky") == solves
    for primitive in FACTORIZATIONS:
        assert f"= {primitive}" not in jaxpr


@pytest.mark.slow
@pytest.mark.parametrize("make", [iv.proximal, iv.original])
def test_training_finds_the_structural_function(make, standard_promotion):
    keys = jax.random.split(jax.random.key(0), 4)
    z, hidden, noise = jax.random.normal(keys[0], (3, 1024, 1))
    x = z + 0.5 * hidden
    data = iv.IVBatch(z, x, jnp.tanh(2 * x) + 2 * hidden + 0.1 * noise)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.tanh(nn.Dense(16)(nn.tanh(nn.Dense(16)(inputs))))

    networks = iv.Networks(*(cfll.flax.backbone(Net(), Net().init(key, x)) for key in keys[1:3]))
    names = ("lam1", "lam2") if make is iv.proximal else ("beta1", "beta2")
    # Donation: a state is consumed by its step, the networks it started from are not.
    method = make(networks, **optimizers(lambda _: optax.adam(1e-3)), **dict.fromkeys(names, 10.0))
    state = method.init(data)
    round_ = jax.jit(method.round, donate_argnums=0)
    for _ in range(50):
        state, _ = round_(state, data, data)
    assert round_._cache_size() == 1
    method.init(data)
    grid = jnp.linspace(-1.5, 1.5, 50)[:, None]
    truth = jnp.tanh(2 * grid)

    def error(head):
        return jnp.mean((iv.predict(networks, state, grid, stage2=head) - truth) ** 2)

    confounded = cfll.ridge_solve(jnp.concatenate([x, x**3], axis=1), data.outcome, 1e-3)
    naive = jnp.mean((confounded(jnp.concatenate([grid, grid**3], axis=1)) - truth) ** 2)
    refitted = iv.refit(networks, state, [data], [data], beta=1.0).stage2
    assert error(None) < 0.3 * naive
    assert error(refitted) < 0.3 * naive


def test_a_bad_batch_is_counted_and_the_heads_survive():
    networks, batch = make_networks(), make_batch(20)
    method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0)
    state = method.init(batch)
    bad = batch._replace(outcome=batch.outcome.at[3].set(jnp.nan))
    after, _ = jax.jit(method.stage2)(state, batch, bad)
    assert skipped(after) == 1
    np.testing.assert_array_equal(after.stage2.anchor.kernel, state.stage2.anchor.kernel)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(8))(x, update_stats=train)
        return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


def test_running_statistics_move_once_per_update_and_a_state_checkpoints(tmp_path):
    z, x = jax.random.normal(jax.random.key(0), (2, 32, 3))
    batch = iv.IVBatch(z, x, x[:, :1] * 2)
    module = Normalized()
    variables = module.init(jax.random.key(1), x, train=False)
    backbone = cfll.flax.backbone(module, variables)
    networks = iv.Networks(backbone, backbone)
    method = iv.proximal(
        networks, **optimizers(), lam1=1.0, lam2=1.0, stage1_steps=2, stage2_steps=1
    )
    state, _ = jax.jit(method.round)(method.init(batch), batch, batch)
    _, expected = module.apply(variables, x, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_close(state.treatment.stats[0], expected, rtol=1e-5, atol=1e-6)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    chex.assert_trees_all_equal(restored, state)


def test_an_nnx_module_is_a_backbone():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.linear(x)))

    z, x = jax.random.normal(jax.random.key(0), (2, 32, 3))
    batch = iv.IVBatch(z, x, x[:, :1])
    networks = iv.Networks(
        cfll.flax.backbone(Net(nnx.Rngs(0))), cfll.flax.backbone(Net(nnx.Rngs(1)))
    )
    method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0, stage1_steps=2)
    state, losses = jax.jit(method.round)(method.init(batch), batch, batch)
    assert all(np.isfinite(losses))
    moved = jax.tree.leaves(
        jax.tree.map(
            lambda a, b: jnp.any(a != b), state.treatment.stats[0], networks.treatment.stats
        )
    )
    assert any(moved)
    still = networks.treatment.apply(
        state.treatment.params[0], state.treatment.stats[0], x, train=False
    )
    np.testing.assert_array_equal(
        still[0], iv.predict(networks, state, x, stage2=cfll.LinearHead(jnp.eye(4)))
    )


def test_errors_name_the_fix():
    networks, batch = make_networks(), make_batch(8)
    with pytest.raises(ValueError, match="at least 1"):
        iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0, stage1_steps=0)
    method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0)
    with pytest.raises(ValueError, match="outcome=y"):
        method.init(batch._replace(outcome=None))
    with pytest.raises(ValueError, match="treatment="):
        method.init(batch._replace(treatment=None))
    with pytest.raises(ValueError, match="lam1 is negative"):
        iv.proximal(networks, **optimizers(), lam1=-1.0, lam2=1.0).stage1(method.init(batch), batch)
    with_covariate = make_networks(covariate=True)
    state = iv.proximal(with_covariate, **optimizers(), lam1=1.0, lam2=1.0).init(
        make_batch(8, covariate=True)
    )
    with pytest.raises(ValueError, match="covariate=c"):
        iv.predict(with_covariate, state, batch.treatment)
    with pytest.raises(ValueError, match=r"this call .* treatment \(8, 2\), covariate \(7, 2\)"):
        iv.predict(with_covariate, state, batch.treatment, jnp.ones((7, 2)))
    with pytest.raises(ValueError, match="write a scalar"):
        iv.refit(networks, method.init(batch), [batch], [batch], beta=jnp.ones(4))
    once = iter([batch])
    with pytest.raises(ValueError, match="stage2_data has no batches"):
        iv.refit(networks, method.init(batch), once, once)
    with pytest.raises(TypeError, match=r"stage1_data is a batch: write \[batch\]"):
        iv.refit(networks, method.init(batch), batch, batch)


def test_unequal_numbers_of_samples_are_named():
    networks, batch = make_networks(), make_batch(8)
    method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0)
    state, bad = method.init(batch), batch._replace(treatment=batch.treatment[:7])
    for call, owner in (
        (lambda: method.init(bad), "batch"),
        (lambda: method.stage1(state, bad), "batch1"),
        (lambda: method.stage2(state, bad, batch), "batch1"),
        (lambda: jax.jit(method.round)(state, batch, bad), "batch2"),
        (lambda: iv.refit(networks, state, [bad], [batch]), "a batch of stage1_data"),
        (lambda: iv.refit(networks, state, [batch], [bad]), "a batch of stage2_data"),
    ):
        message = rf"{owner} have unequal .* instrument \(8, 3\), treatment \(7, 2\)"
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("part", [False, True])
def test_a_state_of_plain_containers_is_refused(part):
    networks, batch = make_networks(), make_batch(8)
    method = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0)
    state = method.init(batch)
    plain = serialization.msgpack_restore(serialization.to_bytes(state))
    plain = iv.IVState(**plain) if part else plain
    for call in (
        lambda: method.stage1(plain, batch),
        lambda: method.stage2(plain, batch, batch),
        lambda: method.round(plain, batch, batch),
        lambda: iv.predict(networks, plain, batch.treatment),
        lambda: iv.refit(networks, plain, [batch], [batch]),
    ):
        with pytest.raises(TypeError, match=r"is a dict, not a .*method.init\(batch\)"):
            call()
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize(
    ("beta", "limit", "route"), [(1.0, 5e-6, "primal"), (1e-2, 2e-4, "primal"), (1e-4, 5e-3, "qr")]
)
def test_refitted_heads_err_as_least_squares_in_float32_does(beta, limit, route):
    rng = np.random.default_rng(0)
    z, hidden = rng.normal(size=(2, 512, 1)).astype(np.float32)
    params = jnp.asarray(rng.normal(size=(2, 2, 16)), jnp.float32)

    def apply(params, stats, inputs, *, train):
        return jnp.tanh(inputs * params[:1] + params[1:]), stats

    networks = iv.Networks(*(iv.Backbone(apply, p) for p in params))
    batch = iv.IVBatch(z, z + hidden, np.sin(z + hidden) + hidden)
    state = iv.proximal(networks, **optimizers(), lam1=1.0, lam2=1.0).init(batch)
    batches = [iv.IVBatch(*rows) for rows in zip(*(np.split(a, 8) for a in batch[:3]), strict=True)]
    refitted = iv.refit(networks, state, iter(batches), iter(batches), beta=beta)

    def solve(features, targets):
        rows = np.vstack([with_one(features), np.sqrt(beta) * np.eye(17)])
        return np.linalg.lstsq(rows, np.vstack([targets, np.zeros((17, targets.shape[1]))]))[0]

    def with_one(features):
        return np.hstack([features, np.ones((len(features), 1))])

    psi, phi = (
        np.tanh(np.asarray(x, float) * p[0] + p[1])
        for x, p in zip((z + hidden, z), np.asarray(params, float), strict=True)
    )
    w = solve(with_one(phi) @ solve(phi, psi), batch.outcome)
    got = iv.predict(networks, state, batch.treatment, stage2=refitted.stage2)
    error = np.linalg.norm(got - with_one(psi) @ w) / np.linalg.norm(with_one(psi) @ w)
    assert error < limit
    for info in (refitted.stage1_info, refitted.stage2_info):
        assert str(cfll.Route(info.route)) == route
        assert route == "primal" or info.rcond < 1e-5
