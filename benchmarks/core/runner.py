"""From a key to its record: read if it is there, otherwise made and kept.

Every experiment runs everything through here, whether it trains, times or checks. So all of them
can be stopped and resumed, and RESULTS.md can be made from records alone.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.core.progress import SweepProgress
from benchmarks.core.records import Record, Records


class MissingError(Exception):
    """A run is not among the records, and nothing may be made."""


class Runner:
    """Finished runs, and the means to make what is missing, if that is allowed."""

    def __init__(
        self, records: Records, progress: SweepProgress | None = None, *, make: bool = True
    ):
        self.records, self._make = records, make
        self.progress = progress or SweepProgress(Console(quiet=True), 0)

    def run(
        self,
        key: Mapping[str, Any],
        make: Callable[[], Record],
        label: str = "",
        says: Callable[[Record], str] = lambda record: "",
    ) -> Record:
        """The record of a key, which is all that determines it; it `says` in a word what it found.

        `make` may call `progress.start` with its number of steps, and `progress.step`. Without a
        label no line is printed. Raises MissingError if nothing may be made.
        """
        record, note = self.records.get(key), "from disk"
        if record is None:
            if not self._make:
                raise MissingError(str(key))
            start = time.perf_counter()
            self.progress.start(label, 1)
            record = make()
            self.records.add(key, record)
            note = f"{time.perf_counter() - start:.1f} s"
        self.progress.finish(f"{label}  {says(record):<16} {note}" if label else "")
        return record


@contextmanager
def running(out: Path, name: str, num_runs: int) -> Iterator[Runner]:
    """What a command runs in: records <name>.jsonl in a folder, a progress bar, the time."""
    console, start = Console(), time.perf_counter()
    with SweepProgress(console, num_runs) as progress:
        yield Runner(Records(out / f"{name}.jsonl"), progress)
    console.print(f"{time.perf_counter() - start:.0f} s. Runs and figures are in {out}.")
