"""README's table of wrappers, line by line: what each does to a closed-form head."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfll

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(64, 3)), jnp.float32)
Y = jnp.sin(2 * X[:, :1]) * X[:, 1:2]
W = jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
RULE = cfll.prox(0.1, solver="primal")  # compiles fastest
SGD = cfll.closed_form(optax.sgd(0.1), RULE)


def make_params(kernel=0.0):
    return {"w": W, "head": {"kernel": jnp.full((8, 1), kernel), "bias": jnp.zeros(1)}}


def features_of(params):
    return jnp.tanh(X @ params["w"])


def make_step(tx, *names, order="Eq. (17)"):
    """A step in either order, with those of the keywords that are named."""

    @jax.jit
    def step(params, opt_state):
        head = cfll.get_state(opt_state)

        def loss_fn(params):
            if order == "Eq. (17)":
                return RULE.loss(features_of(params), Y, head)
            squares = (Y - cfll.get_head(params, "head")(features_of(params))) ** 2
            return jnp.mean(squares), None

        (loss, solution), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        keywords = {
            "value": loss,
            "grad": grads,
            "value_fn": lambda params: loss_fn(params)[0],
            "grad_fn": lambda params, _: jax.grad(lambda p: loss_fn(p)[0])(params),
        }
        keywords = {name: keywords[name] for name in names}
        if order == "Eq. (17)":
            keywords["solution"] = solution
        else:
            keywords |= {"targets": Y, "feature_fn": features_of}
        updates, opt_state = tx.update(grads, opt_state, params, **keywords)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def train(tx, *names, steps=6, order="Eq. (17)", params=None):
    """The last parameters, the state of the head, and all losses."""
    params = make_params() if params is None else params
    opt_state, losses, step = tx.init(params), [], make_step(tx, *names, order=order)
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    return params, cfll.get_state(opt_state), losses


# What line searches and SAM take ------------------------------------------------------------------

ASCENT = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
SAM = optax.contrib.sam(optax.sgd(0.1), ASCENT)
OPAQUE = optax.contrib.sam(optax.sgd(0.1), ASCENT, opaque_mode=True)
SEARCH = ("value", "grad", "value_fn")
BACKTRACKING = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))


@pytest.mark.parametrize(
    ("backbone", "names"),
    [
        (BACKTRACKING, SEARCH),
        (optax.polyak_sgd(1.0), ("value",)),
        (SAM, ()),
        (optax.chain(optax.clip(1.0), SAM), ()),
        (OPAQUE, ("grad_fn",)),
        (optax.contrib.schedule_free_sgd(0.1), ()),
        (optax.contrib.prodigy(), ()),
    ],
    ids=["backtracking", "polyak", "sam", "sam in a chain", "opaque", "free", "prodigy"],
)
def test_backbones_in_the_order_of_equation_17(standard_promotion, backbone, names):
    tx = cfll.closed_form(backbone, RULE)
    params, head, losses = train(tx, *names)
    assert losses[-1] < losses[0]
    assert (int(head.count), int(head.info.skipped), float(head.info.drift)) == (6, 0, 0.0)
    chex.assert_trees_all_equal(cfll.get_head(params, "head"), head.anchor)


def test_lbfgs_descends_further_than_sgd(standard_promotion):
    _, head, lbfgs = train(cfll.closed_form(optax.lbfgs(), RULE), *SEARCH, steps=20)
    assert (int(head.info.skipped), float(head.info.drift)) == (0, 0.0)
    _, _, sgd = train(SGD, steps=20)
    assert lbfgs[-1] < 0.7 * sgd[-1]


@pytest.mark.parametrize(("backbone", "names"), [(BACKTRACKING, SEARCH), (OPAQUE, ("grad_fn",))])
def test_functions_see_all_parameters_and_the_backbone_its_own(standard_promotion, backbone, names):
    params = make_params()
    new, head, _ = train(cfll.closed_form(backbone, RULE), *names, steps=1)

    def of_backbone(w):  # the same without a head in the parameters
        start = cfll.get_state(SGD.init(params))
        return RULE.loss(features_of({"w": w}), Y, start)[0]

    value, grad = jax.value_and_grad(of_backbone)(W)
    keywords = {"value": value, "grad": grad, "value_fn": of_backbone}
    keywords |= {"grad_fn": lambda w, _: jax.grad(of_backbone)(w)}
    keywords = {name: keywords[name] for name in names}
    update, _ = jax.jit(lambda: backbone.update(grad, backbone.init(W), W, **keywords))()
    np.testing.assert_allclose(new["w"], W + update, rtol=1e-4, atol=1e-5)
    expected = cfll.prox_solve(features_of(params), Y, cfll.get_head(params, "head"), 0.1)
    chex.assert_trees_all_close(head.anchor, expected, rtol=1e-5, atol=1e-6)


def test_a_value_fn_gets_the_keywords_that_it_names(standard_promotion):
    params, seen = make_params(), []

    def value_fn(params, targets, temperature=0.0):
        seen.append(temperature)
        return jnp.mean((targets - features_of(params) @ params["head"]["kernel"]) ** 2)

    tx = cfll.closed_form(BACKTRACKING, RULE)
    value, grad = jax.value_and_grad(value_fn)(params, Y)
    keywords = {"value": value, "grad": grad, "value_fn": value_fn, "temperature": 0.5}
    tx.update(grad, tx.init(params), params, targets=Y, feature_fn=features_of, **keywords)
    assert 0.5 in seen


@pytest.mark.skipif(optax.__version__ == "0.2.6", reason="ignores what later ones refuse")
def test_a_free_chain_with_a_line_search_is_refused_by_optax(standard_promotion):
    tx = optax.chain(optax.lbfgs(), cfll.closed_form_head(RULE))
    with pytest.raises(TypeError, match="not consumed by `value_fn`"):
        train(tx, *SEARCH, steps=1)


def two_heads(inner):
    """Two closed-form heads around an optimizer, their parameters, and one step of Eq. (17)."""
    rules = {"a": RULE, "b": cfll.ridge(1.0, solver="primal")}
    tx = cfll.closed_form(inner(rules["a"]), rules["b"], "b")
    kernel = {"kernel": jnp.zeros((8, 1))}
    params = {"w": W, "a": kernel, "b": kernel}
    opt_state = tx.init(params)

    def loss_fn(params):
        states = {name: cfll.get_state(opt_state, name) for name in rules}
        both = {k: rule.loss(features_of(params), Y, states[k]) for k, rule in rules.items()}
        return sum(loss for loss, _ in both.values()), {k: s for k, (_, s) in both.items()}

    (value, solution), grad = jax.value_and_grad(loss_fn, has_aux=True)(params)
    keywords = {"value": value, "grad": grad, "value_fn": lambda params: loss_fn(params)[0]}
    return tx, params, opt_state, grad, solution, keywords


def check_both_heads(params, updates, opt_state):
    phi = features_of(params)
    zero = cfll.LinearHead.zeros(8, 1, use_bias=False)
    expected = cfll.prox_solve(phi, Y, zero, 0.1), cfll.ridge_solve(phi, Y, 1.0, use_bias=False)
    for name, head in zip(("a", "b"), expected, strict=True):
        chex.assert_trees_all_close(updates[name]["kernel"], head.kernel, rtol=1e-4, atol=1e-5)
        assert int(cfll.get_state(opt_state, name).count) == 1


@pytest.mark.parametrize(
    "inner",
    [
        lambda rule: cfll.closed_form(BACKTRACKING, rule, "a"),
        lambda rule: optax.inject_hyperparams(
            lambda rate: cfll.closed_form(optax.sgd(rate), rule, "a")
        )(rate=0.1),
    ],
    ids=["line search", "inject_hyperparams"],
)
def test_keywords_reach_a_closed_form_inside(standard_promotion, inner):
    tx, params, opt_state, grad, solution, keywords = two_heads(inner)
    keywords = keywords if "Linesearch" in str(opt_state) else {}
    update = jax.jit(lambda: tx.update(grad, opt_state, params, solution=solution, **keywords))
    updates, opt_state = update()
    check_both_heads(params, updates, opt_state)
    assert float(jnp.abs(updates["w"]).max()) > 0


def test_feature_fn_reaches_a_closed_form_inside(standard_promotion):
    tx, params, opt_state, *_ = two_heads(lambda rule: cfll.closed_form(optax.sgd(0.1), rule, "a"))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def with_all(params):  # looks at both heads
        return features_of(params) + 0 * (params["a"]["kernel"] + params["b"]["kernel"]).T

    updates, opt_state = tx.update(zeros, opt_state, params, targets=Y, feature_fn=with_all)
    check_both_heads(params, updates, opt_state)


# Around a closed-form head ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optax.contrib.schedule_free(SGD, 0.1),
        optax.contrib.mechanize(SGD),
        optax.chain(SGD, optax.ema(0.9)),
    ],
    ids=["schedule_free", "mechanize", "ema"],
)
def test_averages_around_a_head_show_as_drift(standard_promotion, tx):
    _, head, _ = train(tx)
    assert float(head.info.drift) > 1e-3


def test_lookahead_takes_keywords_that_are_bound(standard_promotion):
    def lookahead(**keywords):
        update = functools.partial(SGD.update, **keywords)
        return optax.lookahead(optax.GradientTransformation(SGD.init, update), 2, 0.5)

    params = optax.LookaheadParams.init_synced(make_params())
    opt_state, drifts = lookahead().init(params), []
    for _ in range(4):
        phi = features_of(params.fast)
        _, solution = RULE.loss(phi, Y, cfll.get_state(opt_state))
        zeros = jax.tree.map(jnp.zeros_like, params.fast)
        updates, opt_state = lookahead(solution=solution).update(zeros, opt_state, params)
        params = optax.apply_updates(params, updates)
        drifts.append(float(cfll.get_state(opt_state).info.drift))
    assert drifts[0] == drifts[1] == drifts[3] == 0 < drifts[2]  # synchronized after two steps
    with pytest.raises(TypeError, match=r"optax\.lookahead"):
        lookahead().update(zeros, opt_state, params)


@pytest.mark.parametrize("outer", [optax.lookahead(SGD, 2, 0.5), optax.contrib.sam(SGD, ASCENT)])
def test_wrappers_without_keywords_refuse_them(standard_promotion, outer):
    params = make_params()
    with pytest.raises(TypeError, match="unexpected keyword argument 'solution'"):
        outer.update(params, outer.init(params), params, solution=None)


def test_sam_around_names_itself():
    sam, params = optax.contrib.sam(SGD, optax.sgd(0.1)), make_params()
    with pytest.raises(TypeError, match=r"cfll\.closed_form\(optax\.contrib\.sam"):
        sam.update(params, sam.init(params), params)


# A first gradient of zero -------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [optax.contrib.prodigy(), SAM], ids=["prodigy", "sam"])
def test_algorithm_1_from_a_head_of_zeros_has_no_first_gradient(standard_promotion, backbone):
    tx = cfll.closed_form(backbone, RULE)
    _, head, _ = train(tx, steps=3, order="Algorithm 1")
    assert int(head.info.skipped) >= 2  # their 0 / 0: counted, not silent
    params = make_params()
    first = cfll.prox_solve(features_of(params), Y, cfll.get_head(params, "head"), 0.1)
    params = cfll.set_head(params, "head", first)
    _, head, losses = train(tx, steps=3, order="Algorithm 1", params=params)
    assert int(head.info.skipped) == 0
    assert losses[-1] < losses[0]


# States that lost their types ---------------------------------------------------------------------


def test_a_state_without_types_is_refused_with_the_fix(tmp_path, standard_promotion):
    import flax.serialization
    import orbax.checkpoint as ocp

    params = make_params()
    state = SGD.init(params)
    restored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        lost = checkpointer.restore(tmp_path / "state")
        again = checkpointer.restore(tmp_path / "state", SGD.init(params))
    chex.assert_trees_all_equal(again, state)
    chex.assert_trees_all_equal(flax.serialization.from_state_dict(state, restored), state)

    keywords = {"targets": Y, "features": features_of(params)}
    for plain in (restored, lost):
        with pytest.raises(ValueError, match=r"restore into tx\.init"):
            cfll.get_state(plain)
        with pytest.raises(TypeError, match=r"restore into tx\.init"):
            SGD.update(params, plain, params, **keywords)
    with pytest.raises(TypeError, match="has a ClosedFormState"):
        cfll.closed_form_head(RULE).update(params, restored["1"], params, **keywords)
