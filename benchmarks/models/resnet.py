"""ResNet-18 for images of 32 x 32, as a feature extractor with a linear head.

The variant usual on CIFAR: a 3 x 3 stem of stride 1 and no max-pooling before the four stages.

Batch norms keep their averages in the collection `batch_stats`: apply with
`train=True, mutable=["batch_stats"]` to train, and with `train=False` to evaluate.
"""

from functools import partial

import flax.linen as nn
import jax

# Not padding "SAME": strided layers would be padded at the end, the usual network's are in front.
Conv3x3 = partial(
    nn.Conv,
    kernel_size=(3, 3),
    padding=1,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2, "fan_out", "truncated_normal"),
)
# 0.9 is what other frameworks call a momentum of 0.1, their default.
BatchNorm = partial(nn.BatchNorm, momentum=0.9)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is 1 x 1 where the shape changes."""

    width: int  # output channels
    stride: int = 1  # of the first convolution and of the shortcut

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(batch, height, width, c) -> (batch, height / stride, width / stride, self.width)."""

        def norm(x: jax.Array) -> jax.Array:
            return BatchNorm(use_running_average=not train)(x)

        residual = nn.relu(norm(Conv3x3(self.width, strides=self.stride)(x)))
        residual = norm(Conv3x3(self.width)(residual))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = norm(nn.Conv(self.width, (1, 1), strides=self.stride, use_bias=False)(x))
        return nn.relu(x + residual)


class ResNet18(nn.Module):
    """Stem, four stages of two blocks, average over the image, linear head."""

    # Channels of the stem; the stages have 1, 2, 4 and 8 times as many. The head's inputs are d = 8
    # width.
    width: int = 64
    num_outputs: int = 10  # o, the outputs of the head

    def setup(self) -> None:
        self.stem = Conv3x3(self.width)
        self.stem_norm = BatchNorm()
        self.blocks = [
            Block(self.width * 2**stage, stride=2 if stage > 0 and block == 0 else 1)
            for stage in range(4)
            for block in range(2)
        ]
        self.head = nn.Dense(self.num_outputs)

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """What the head sees, (batch, 8 width), of normalized images, channels last."""
        x = nn.relu(self.stem_norm(self.stem(images), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train)
        return x.mean(axis=(1, 2))

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Outputs of shape (batch, num_outputs)."""
        return self.head(self.features(images, train))
