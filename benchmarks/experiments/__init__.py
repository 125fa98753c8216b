"""What an experiment is: a command, and a section of RESULTS.md made from its finished runs.

The command line, RESULTS.md and the tests go over what `discover` finds: to add an experiment, add
its file here.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.core.records import Records
from benchmarks.reporting.summary import Summary


class Experiment(NamedTuple):
    """One experiment; its file has a tuple `EXPERIMENTS` of them, mostly of one."""

    # The command; its name, arguments and docstring are those of the command line.
    run: Callable[..., None]
    # (finished runs, folder for figures, preset) -> what they say; `None`: no section.
    summarize: Callable[[Records, Path, str], Summary] | None
    place: int  # of the section in RESULTS.md, and of the command in the help: ascending
    presets: tuple[str, ...] = ("cpu",)  # of which finished runs may be; a section each
    # Preset -> name of the file of finished runs; by default that of the command.
    file: Callable[[str], str] | None = None

    @property
    def name(self) -> str:
        """What is typed."""
        return self.run.__name__

    def records_name(self, preset: str) -> str:
        """Of the file of finished runs, without ending."""
        return self.file(preset) if self.file else self.name


def discover() -> list[Experiment]:
    """The experiments of all files here, in their order."""
    found: list[Experiment] = []
    for _, name, _ in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{name}"), "EXPERIMENTS", ())
    return sorted(found, key=lambda experiment: experiment.place)
