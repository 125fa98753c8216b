"""Backbones of the benchmarks, as Flax modules with `features` and `head`."""
