"""Data sets of the benchmarks: generated here, or read from where the user keeps them."""
