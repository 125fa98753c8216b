"""NFNet-F0 (Brock et al., 2021), as a feature extractor with a linear head.

A residual network without batch normalization: kernels are standardized, the scale of every block's
input is known in advance and divided out, and every residual branch starts at zero. Gradients have
to be clipped adaptively (`optax.adaptive_grad_clip`) to train it at large batches; that is the
experiment's business.

Parameters are float32. The backbone computes in `dtype`, bfloat16 by default; the mean over the
image, and with it the features and the head, are float32: a closed-form solve needs the digits.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_GELU_GAIN = 1.7015043497085571  # a standard normal input leaves with variance one


def activation(x: jax.Array) -> jax.Array:
    """GELU, scaled to keep the variance of a standard normal input."""
    return nn.gelu(x) * jnp.asarray(_GELU_GAIN, x.dtype)


def standardize(kernel: jax.Array, eps: float = 1e-4) -> jax.Array:
    """Zero mean, and a variance of one over the fan-in, for every output channel.

    The kernel is (height, width, inputs per group, outputs). White inputs of variance one leave it
    with variance one. `eps` is a floor under variance x fan-in.
    """
    fan_in = np.prod(kernel.shape[:-1])
    mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
    return (kernel - mean) * jax.lax.rsqrt(jnp.maximum(variance * fan_in, eps))


class StandardizedConv(nn.Module):
    """Convolution with a standardized kernel, a gain and a bias per output channel."""

    width: int  # output channels
    size: int  # of the window, in pixels
    stride: int = 1  # in pixels
    groups: int = 1  # of channels, each with its own kernel
    dtype: Any = jnp.bfloat16  # to convolve in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x of shape (batch, height, width, channels). Pads with zeros ("SAME")."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.width)
        kernel = self.param(
            "kernel", nn.initializers.variance_scaling(1.0, "fan_in", "normal"), shape
        )
        gain = self.param("gain", nn.initializers.ones, (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        outputs = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            (standardize(kernel) * gain).astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return outputs + bias.astype(self.dtype)


class SqueezeExcite(nn.Module):
    """A factor from 0 to 1 per image and channel, from the means over the image."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x of shape (batch, height, width, c). Returns (batch, 1, 1, c)."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        hidden = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(means))
        return nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype)(hidden))


class StochasticDepth(nn.Module):
    """Leave a residual branch out, at random for each image.

    Not rescaled, as in the reference: the branch is weaker in training than in evaluation.
    """

    rate: float

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0], 1, 1, 1))
        return x * kept.astype(x.dtype)


class Block(nn.Module):
    """Residual bottleneck: 1x1, two grouped 3x3, 1x1, squeeze and excite."""

    width: int  # output channels
    bottleneck: int  # channels between the 1x1 convolutions; a multiple of `group_width`
    group_width: int  # channels per group of the 3x3 convolutions
    squeezed: int  # hidden units of squeeze and excite
    stride: int  # of the first 3x3 convolution; the shortcut pools as much
    input_std: float  # standard deviation of the input at initialization; it is divided out
    alpha: float  # scale of the residual branch
    stochastic_depth: float  # probability of leaving the branch out
    dtype: Any  # to compute in

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv(width: int, size: int, name: str, **kwargs: Any) -> StandardizedConv:
            return StandardizedConv(width, size, dtype=self.dtype, name=name, **kwargs)

        groups = self.bottleneck // self.group_width
        inputs = activation(x) / jnp.asarray(self.input_std, x.dtype)
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.width:
            pooled = inputs
            if self.stride > 1:
                window = (self.stride, self.stride)
                pooled = nn.avg_pool(inputs, window, window, "SAME", count_include_pad=False)
            shortcut = conv(self.width, 1, "shortcut")(pooled)

        out = conv(self.bottleneck, 1, "expand")(inputs)
        out = conv(self.bottleneck, 3, "grouped_0", stride=self.stride, groups=groups)(
            activation(out)
        )
        out = conv(self.bottleneck, 3, "grouped_1", groups=groups)(activation(out))
        out = conv(self.width, 1, "contract")(activation(out))
        out = 2 * SqueezeExcite(self.squeezed, self.dtype, name="squeeze_excite")(out) * out
        out = StochasticDepth(self.stochastic_depth, name="stochastic_depth")(out, train)
        skip_gain = self.param("skip_gain", nn.initializers.zeros, ())
        return out * (self.alpha * skip_gain).astype(out.dtype) + shortcut


class NFNet(nn.Module):
    """Stem, four stages of blocks, last convolution, mean over the image, linear head.

    The default is F0. Every size can be set, so that a test can build a small one with features and
    outputs of the true number.
    """

    # Blocks per stage; all stages but the first halve the image.
    depths: tuple[int, ...] = (1, 2, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1536, 1536)  # output channels per stage
    group_width: int = 128  # channels per group of the 3x3 convolutions
    # Channels of the 3x3 convolutions before the stages; the first and the last of them halve the
    # image.
    stem: tuple[int, ...] = (16, 32, 64, 128)
    num_features: int = 3072  # d, the inputs of the head
    num_outputs: int = 1000  # o, the number of classes
    bottleneck: float = 0.5  # channels inside a block, as a share of its width
    squeeze: float = 0.5  # hidden units of squeeze and excite, as a share of the block's width
    alpha: float = 0.2  # scale of the residual branches
    # Grows in equal steps from zero in the first block towards this rate.
    stochastic_depth: float = 0.25
    dropout: float = 0.2  # rate on the features
    dtype: Any = jnp.bfloat16  # of the backbone's computation

    def setup(self) -> None:
        self.stem_convs = [
            StandardizedConv(
                width, 3, stride=2 if index in (0, len(self.stem) - 1) else 1, dtype=self.dtype
            )
            for index, width in enumerate(self.stem)
        ]
        self.blocks = self._blocks()
        self.last_conv = StandardizedConv(self.num_features, 1, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_outputs, kernel_init=nn.initializers.normal(0.01))

    def _blocks(self) -> list[Block]:
        blocks: list[Block] = []
        input_std = 1.0
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            groups = max(1, int(width * self.bottleneck) // self.group_width)
            for index in range(depth):
                block = Block(
                    width=width,
                    bottleneck=groups * self.group_width,
                    group_width=self.group_width,
                    squeezed=max(1, int(width * self.squeeze)),
                    stride=2 if stage > 0 and index == 0 else 1,
                    input_std=input_std,
                    alpha=self.alpha,
                    stochastic_depth=self.stochastic_depth * len(blocks) / sum(self.depths),
                    dtype=self.dtype,
                )
                blocks.append(block)
                # The shortcut of a stage's first block is a convolution of a normalized input:
                # the variance begins anew at one, and each branch adds alpha squared.
                input_std = ((1.0 if index == 0 else input_std**2) + self.alpha**2) ** 0.5
        return blocks

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """What the head sees, (batch, d), float32, of normalized pixels (batch, height, width, 3).

        In training stochastic depth and dropout need the random stream "dropout".
        """
        x = images.astype(self.dtype)
        for index, conv in enumerate(self.stem_convs):
            x = conv(x if index == 0 else activation(x))
        for block in self.blocks:
            x = block(x, train)
        x = activation(self.last_conv(x)).astype(jnp.float32)
        return self.drop(jnp.mean(x, axis=(1, 2)), deterministic=not train)

    def __call__(self, images: jax.Array, train: bool = False) -> Any:
        """Outputs of shape (batch, num_outputs): logits, or predictions of one-hot targets."""
        return self.head(self.features(images, train))
