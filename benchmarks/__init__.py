"""Benchmarks of cfll: `python -m benchmarks --help`.

On top of the library, through its public interface only. Each experiment is one file with one
command; `training.py`, `optimizers.py`, `records.py`, `progress.py` and `plots.py` are what they
share, `data/` makes the data sets, `models/` holds the backbones.
"""
