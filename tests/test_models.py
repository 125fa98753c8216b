"""The benchmarks' networks: sizes, shapes, and what their layers promise."""

from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.models import cnn, deeponet, dfiv, fno, gru, mlp, resnet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]


def num_params(model, inputs_shape, **options):
    """Parameters, without compiling anything."""
    shapes = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, **options), struct(inputs_shape)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def struct(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def output_shape(model, inputs_shape, method="__call__"):
    def apply(x):
        return model.apply(model.init(jax.random.key(0), x), x, method=method)

    return jax.eval_shape(apply, struct(inputs_shape)).shape


@pytest.mark.parametrize(
    ("model", "inputs", "size", "num_features"),
    [
        (resnet.ResNet18(), (2, 32, 32, 3), 11_173_962, 512),
        (resnet.ResNet18(width=16), (2, 32, 32, 3), None, 128),
        (cnn.CNN(), (2, 32, 32, 3), None, 256),
        (cnn.CNN(widths=(8, 16), num_features=24), (2, 28, 28, 1), None, 24),
        (cnn.CNN(widths=(64, 128), patch=4), (2, 32, 32, 3), None, 256),
        (mlp.MLP(widths=(32, 16)), (2, 8, 8, 3), 192 * 32 + 32 * 16 + 3 * 48 + 17, 16),
    ],
)
def test_sizes_and_shapes(model, inputs, size, num_features):
    if size is not None:
        assert num_params(model, inputs) == size
    assert output_shape(model, inputs, "features") == (inputs[0], num_features)
    assert output_shape(model, inputs) == (inputs[0], model.num_outputs)


@pytest.mark.parametrize(
    "model",
    [cnn.CNN((2, 3), num_features=4, num_outputs=3, patch=2), mlp.MLP(widths=(4,), num_outputs=3)],
)
def test_outputs_are_the_head_of_the_features(model):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))

    @jax.jit
    def both(x):
        variables = model.init(jax.random.key(1), x)
        head = variables["params"]["head"]
        features = model.apply(variables, x, method="features")
        return model.apply(variables, x, train=True), features @ head["kernel"] + head["bias"]

    np.testing.assert_allclose(*both(x), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs", "leading"),
    [
        (fno.FNO1d(width=4, modes=3, depth=1), (2, 16, 2), (2, 16)),
        (fno.FNO2d(width=4, modes=3, depth=1), (2, 8, 8, 3), (2, 8, 8)),
        (deeponet.DeepONet(), (2, 16, 2), (2, 16)),
        (gru.GRU(warm_up=3), (2, 8, 1), (2, 5)),
    ],
)
def test_every_point_and_every_time_is_a_sample(model, inputs, leading):
    assert output_shape(model, inputs, "features") == (*leading, model.num_features)
    assert output_shape(model, inputs) == (*leading, model.num_outputs)


@pytest.mark.parametrize("num_dims", [1, 2])
def test_the_lowest_modes_pass_and_others_do_not(num_dims):
    side, modes = 12, 3
    analysis, synthesis = fno.truncated_fourier(side**num_dims, modes, num_dims)
    field = np.random.default_rng(0).standard_normal((side,) * num_dims)
    frequency = np.abs(np.fft.fftfreq(side, 1 / side)) < modes
    kept = frequency if num_dims == 1 else frequency[:, None] & frequency
    expected = np.fft.ifftn(np.fft.fftn(field) * kept).real
    np.testing.assert_allclose(synthesis @ analysis @ field.ravel(), expected.ravel(), atol=1e-6)


def test_patches_are_what_a_convolution_sees():
    x, kernel = np.random.default_rng(0).standard_normal((2, 8, 4, 3)), np.eye(48)
    expected = jax.lax.conv_general_dilated(
        x, kernel.reshape(4, 4, 3, 48), (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(cnn.split_patches(x, 4), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="divisor"):
        cnn.split_patches(x, 3)


def test_blocks_train_by_batch_statistics_and_evaluate_by_averages():
    block = resnet.Block(width=2, stride=2)
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))

    @jax.jit
    def run(x):
        variables = block.init(jax.random.key(1), x, train=False)
        outputs, updates = block.apply(variables, x, train=True, mutable=["batch_stats"])
        convolved = jax.lax.conv_general_dilated(
            x,
            variables["params"]["Conv_0"]["kernel"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        evaluated = block.apply(variables, x, train=False)
        return outputs, evaluated, updates["batch_stats"]["BatchNorm_0"], convolved

    outputs, evaluated, averages, convolved = run(3 * x + 1)
    assert outputs.shape == (4, 2, 2, 2)
    assert not np.allclose(outputs, evaluated)
    # From 0 and 1, a tenth of the way to the batch.
    np.testing.assert_allclose(averages["mean"], 0.1 * convolved.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(averages["var"], 0.9 + 0.1 * convolved.var((0, 1, 2)), rtol=1e-4)


def dense(*widths):
    return sum(a * b + b for a, b in pairwise(widths))


@pytest.mark.parametrize(
    ("build", "num_inputs", "num_features", "size"),
    [
        # Batch norms have a scale and a bias each; spectral norms have no parameters.
        (dfiv.dsprites_treatment, 4096, 32, dense(4096, 1024, 512, 128, 32) + 2 * (512 + 32)),
        (dfiv.dsprites_instrument, 3, 32, dense(3, 256, 128, 128, 32) + 2 * (128 + 128 + 32)),
        (dfiv.demand_treatment, 1, 1, dense(1, 16, 1)),
        (dfiv.demand_instrument, 3, 32, dense(3, 128, 64, 32) + 2 * 32),
        (dfiv.demand_covariate, 2, 16, dense(2, 128, 32, 16) + 2 * 32),
    ],
)
def test_dfiv_sizes_and_shapes(build, num_inputs, num_features, size):
    assert num_params(build(), (4, num_inputs)) == size
    assert output_shape(build(), (4, num_inputs)) == (4, num_features)
    small = build(width_factor=0.25)
    assert num_params(small, (4, num_inputs)) < size / 3
    assert output_shape(small, (4, num_inputs)) == (4, num_features)


def test_dfiv_kernels_have_spectral_norm_one():
    net = dfiv.dsprites_instrument(width_factor=0.05)
    x = jax.random.normal(jax.random.key(0), (8, 3))

    @jax.jit
    def run(x):
        def iterate(variables, _):
            _, updates = net.apply(variables, x, train=True, mutable=["batch_stats"])
            return {**variables, **updates}, None

        variables = net.init(jax.random.key(1), x)
        return jax.lax.scan(iterate, variables, length=100)[0]  # one power iteration each

    variables = run(x)
    for index in range(4):
        kernel = variables["params"][f"Dense_{index}"]["kernel"]
        stats = variables["batch_stats"][f"SpectralNorm_{index}"]
        norm = np.linalg.norm(kernel / stats[f"Dense_{index}/kernel/sigma"], 2)
        assert abs(norm - 1) < 1e-2


def test_dfiv_layers_are_divided_by_their_norm_and_trainable():
    net = dfiv.Stack((5, 4), (nn.relu, nn.tanh), ("after", "before"), spectral=True)
    single = dfiv.Stack((4,), (None,), ("",), spectral=True)
    x = jax.random.normal(jax.random.key(0), (16, 3))

    @jax.jit
    def run(x):
        variables = single.init(jax.random.key(2), x)
        for _ in range(30):
            _, updates = single.apply(variables, x, train=True, mutable=["batch_stats"])
            variables |= updates
        matrix = single.apply(variables, jnp.eye(3))  # biases are zero at first

        variables = net.init(jax.random.key(1), x)

        def loss(params):
            now = variables | {"params": params}
            features, _ = net.apply(now, x, train=True, mutable=["batch_stats"])
            return (features**3).sum(), features

        gradient, features = jax.grad(loss, has_aux=True)(variables["params"])
        return matrix, gradient, features

    matrix, gradient, features = run(x)
    assert abs(np.linalg.norm(matrix, 2) - 1) < 1e-2
    assert np.abs(features).max() <= 1
    for name in ("Dense_0", "Dense_1"):
        kernel = gradient[name]["kernel"]
        assert np.isfinite(kernel).all()
        assert np.abs(kernel).max() > 0
