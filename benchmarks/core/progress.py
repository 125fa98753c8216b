"""What a waiting person sees: which run of how many, its loss now, and a line per finished run."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class SweepProgress:
    """Two bars, all runs and the current one; a context manager.

    Lines of finished runs also appear where bars cannot be drawn.
    """

    def __init__(self, console: Console, num_runs: int):
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._runs = self._bars.add_task("all runs", total=num_runs, note="")
        self._steps = self._bars.add_task("", total=None, note="", visible=False)
        self._done = 0
        self._num_runs = num_runs

    def __enter__(self) -> "SweepProgress":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, label: str, num_steps: int) -> None:
        """Begin a run."""
        self._bars.reset(self._steps, total=num_steps, description=label, note="compiling")
        self._bars.update(self._steps, visible=True)

    def step(self, loss: float) -> None:
        """One training step is done."""
        self._bars.update(self._steps, advance=1, note=f"loss {loss:.2e}")

    def finish(self, line: str) -> None:
        """The run is done, or was found on disk. Nothing is printed of a run without a name."""
        self._done += 1
        self._bars.update(self._runs, advance=1)
        self._bars.update(self._steps, visible=False)
        if line:
            self._bars.console.print(
                f"{self._done:>3}/{self._num_runs} {line}", highlight=False, soft_wrap=True
            )
