"""Progress on stderr, so that stdout carries nothing but results.

Of several processes that do the same, only the first one shows it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def note(message: str) -> None:
    """Print a line on stderr."""
    _console().print(message, style="dim", highlight=False, markup=False)


def note_error(error: Exception) -> None:
    """Print why a command cannot go on, from whichever process it is."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"process {rank}: "
    console = Console(stderr=True)
    console.print(f"{where}error: {error}", style="dim", highlight=False, markup=False)


def _console() -> Console:
    # Launchers of several processes number them so.
    return Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


class _SpeedColumn(ProgressColumn):
    """The task's speed in its own unit."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["speed"]), style="dim")


class Bar:
    """One progress bar, with a speed that may be of another unit than the bar.

    Where stderr is no terminal, a line every `log_interval_s` takes its place.
    """

    def __init__(
        self, progress: Progress, label: str, total: int, unit: str, log_interval_s: float
    ) -> None:
        self._progress = progress
        self._label = label
        self._total = total
        self._unit = unit
        self._log_interval_s = log_interval_s
        self._num_done = 0
        self._amount = 0
        self._started_s = self._logged_s = time.perf_counter()
        self._task = progress.add_task(label, total=total, speed="")

    def advance(self, count: int = 1) -> None:
        """Move the bar on."""
        self._num_done += count
        self._progress.advance(self._task, count)
        self._log()

    def add(self, amount: int) -> None:
        """Count units of speed."""
        self._amount += amount
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        self.show(f"{self._amount / elapsed_s:.0f} {self._unit}/s")

    def show(self, text: str) -> None:
        """Show a text in place of the speed."""
        self._progress.update(self._task, speed=text)

    def _log(self) -> None:
        now_s = time.perf_counter()
        is_due = now_s - self._logged_s >= self._log_interval_s
        if is_due and not self._progress.console.is_terminal:
            self._logged_s = now_s
            task = self._progress.tasks[self._task]
            per_unit_s = (now_s - self._started_s) / max(1, self._num_done)
            left_s = per_unit_s * (self._total - self._num_done)
            note(
                f"{self._label}: {self._num_done} of {self._total}, "
                f"{task.fields['speed'] or 'going on'}, {left_s / 60:.0f} min left"
            )


@contextmanager
def progress_bar(
    label: str, total: int, unit: str = "", log_interval_s: float = 30.0
) -> Iterator[Bar]:
    """Show a bar on stderr for as long as the context lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console()) as progress:
        yield Bar(progress, label, total, unit, log_interval_s)
