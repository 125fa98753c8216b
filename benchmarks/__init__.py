"""Benchmarks of cfll: `python -m benchmarks --help`.

On top of the library, through its public interface only. From bottom to top:

* `core/`: from keys to records (`runner.py`), one loop (`training.py`), one tuner (`tuner.py`), one
  step of every method (`methods.py`), and methods by batch size on a problem (`comparison.py`).
* `reporting/`: claims, tables and figures; `results.py` replays all experiments into RESULTS.md.
* `data/` makes or reads arrays, `models/` holds networks; neither knows the rest.
* `tasks/`: data, network and length of a run, mostly as a `core.problem.Problem`.
* `experiments/`: problem, rows, claims. One file each, found by itself: to add an experiment, add
  a file with a tuple `EXPERIMENTS`. `tests/toy_experiment.py` is one.
"""
