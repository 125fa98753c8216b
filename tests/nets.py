"""A small network with a linear head, in linen and in NNX."""

import flax.linen as nn
from flax import nnx


class Linen(nn.Module):
    width: int
    outputs: int

    def setup(self):
        self.hidden, self.head = nn.Dense(self.width), nn.Dense(self.outputs)

    def features(self, x):
        return nn.tanh(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))


class Nnx(nnx.Module):
    def __init__(self, inputs, width, outputs):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(inputs, width, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def features(self, x):
        return nnx.tanh(self.hidden(x))

    def __call__(self, x):
        return self.head(self.features(x))
