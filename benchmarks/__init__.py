"""Benchmarks of cfll: `python -m benchmarks --help`.

On top of the library, through its public interface only. From top to bottom:

* `experiments/`: one file per experiment; `results.py` replays them all into RESULTS.md.
* `findings.py`, `summary.py`, `report.py`, `plots.py`: tables, claims and figures.
* `comparison.py` (methods by batch size) and `sweep.py` (the quickstart's rows): tuning and runs.
* `methods.py`, `optimizers.py`, `tuning.py`, `training.py`, `intervals.py`: one step, one search,
  one loop, one interval.
* `records.py`, `progress.py`, `runtime.py`: results on disk, bars, the process.
* `data/` makes or reads the data sets, `models/` holds the backbones; neither knows the rest.
"""
