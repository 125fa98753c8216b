"""Heads by path: every container keeps its type, errors contain the fix."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cfll
from cfll.heads import backbone_mask

PARAMS = {
    "encoder": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)},
    "decoder": {"head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}},
}


def test_head_applies_in_the_wider_dtype():
    head = cfll.LinearHead(jnp.ones((3, 2)), jnp.ones(2))
    assert head(jnp.ones((5, 7, 3), jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(head(jnp.ones((5, 7, 3))), np.full((5, 7, 2), 4.0))


@pytest.mark.parametrize("path", ["decoder/head", ("decoder", "head"), "/decoder/head/"])
def test_get_and_set_by_path(path):
    new = cfll.set_head(PARAMS, path, cfll.LinearHead.zeros(4, 2))
    np.testing.assert_array_equal(cfll.get_head(new, path).kernel, np.zeros((4, 2)))
    assert new["encoder"] == PARAMS["encoder"]


def test_mask_is_false_on_the_head_alone():
    mask = backbone_mask(PARAMS, "decoder/head")
    assert mask["encoder"] == {"kernel": True, "bias": True}
    assert mask["decoder"]["head"] == {"kernel": False, "bias": False}


def test_nnx_state_keeps_its_type():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    state = nnx.state({"head": model}, nnx.Param)
    new = cfll.set_head(state, "head", cfll.LinearHead.zeros(4, 2))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_array_equal(cfll.get_head(new, "head").kernel, np.zeros((4, 2)))


def test_equinox_stores_the_transpose():
    model = eqx.nn.MLP(3, 3, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    head = cfll.get_head(params, "layers/1")
    np.testing.assert_array_equal(head.kernel, model.layers[1].weight.T)
    doubled = cfll.set_head(params, "layers/1", jax.tree.map(lambda leaf: 2 * leaf, head))
    np.testing.assert_array_equal(doubled.layers[1].weight, 2 * model.layers[1].weight)


def test_a_pointwise_convolution_is_a_dense_layer():
    params = {"head": nn.Conv(2, (1,)).init(jax.random.key(0), jnp.ones((1, 5, 4)))["params"]}
    assert cfll.get_head(params, "head").kernel.shape == (4, 2)
    assert cfll.set_head(params, "head", cfll.LinearHead.zeros(4, 2))["head"]["kernel"].ndim == 3


def test_partitioned_parameters_are_found():
    init = nn.with_partitioning(nn.initializers.zeros, ("x", "y"))
    params = nn.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert cfll.get_head({"head": params}, "head").kernel.shape == (4, 2)


@pytest.mark.parametrize(
    ("params", "path", "words"),
    [
        (PARAMS, "head", ["'head'", "decoder/head", "encoder"]),
        (PARAMS, "decoder", ["decoder/head"]),
        ({"params": PARAMS}, "decoder/head", ["variables['params']"]),
        ({"head": {"kernel": jnp.ones((3, 3, 4, 2))}}, "head", ["(3, 3, 4, 2)"]),
        ({"head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(3)}}, "head", ["(3,)", "(2,)"]),
        ({"head": {"kernel": jnp.ones((4, 2)), "scale": jnp.ones(3)}}, "head", ["scale"]),
        ({}, "head", ["none"]),
        (jnp.ones(12), "head", ["cfll.closed_form(optax.flatten(...), rule)"]),
    ],
)
def test_errors_list_what_is_there(params, path, words):
    with pytest.raises(ValueError, match="head") as caught:
        cfll.get_head(params, path)
    for word in words:
        assert word in str(caught.value)


def test_a_head_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        cfll.set_head(PARAMS, "decoder/head", cfll.LinearHead.zeros(4, 3))
    with pytest.raises(ValueError, match="use_bias=True"):
        cfll.set_head(PARAMS, "decoder/head", cfll.LinearHead.zeros(4, 2, use_bias=False))


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({"mlp/~/linear_1": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}}, "mlp/~/linear_1"),
        ({"mlp/~/linear_1": {"w": jnp.ones((3, 2))}}, ("mlp/~/linear_1",)),
        ([{"w": jnp.ones((3, 2))}], 0),
        ({"layers": [{"w": jnp.ones((3, 2))}]}, "layers/0"),
        ({"head": {"weight": jnp.ones((2, 3, 1, 1)), "bias": jnp.ones((2, 1, 1))}}, "head"),
        ({"head": {"kernel": jnp.ones((1, 1, 3, 2)), "bias": jnp.ones(2)}}, "head"),
    ],
)
def test_paths_of_other_libraries(params, path):
    head = cfll.get_head(params, path)
    assert head.kernel.shape == (3, 2)
    new = cfll.LinearHead(2 * head.kernel, None if head.bias is None else 3 * head.bias)
    written = cfll.set_head(params, path, new)
    chex.assert_trees_all_equal_shapes(written, params)
    chex.assert_trees_all_equal(cfll.get_head(written, path), new)
    assert not any(jax.tree.leaves(backbone_mask(params, path)))


def test_a_path_of_another_type_is_refused():
    with pytest.raises(TypeError, match="head is a NoneType: write the path"):
        cfll.get_head({"head": {"w": jnp.ones((3, 2))}}, None)
