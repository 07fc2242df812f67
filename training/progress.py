"""Progress on stderr, so that stdout carries nothing but results."""

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
    Console(stderr=True).print(message, style="dim", highlight=False, markup=False)


class _SpeedColumn(ProgressColumn):
    """The task's speed in its own unit."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["speed"]), style="dim")


class Bar:
    """One progress bar, with a speed that may be of another unit than the bar."""

    def __init__(self, progress: Progress, label: str, total: int | None, unit: str) -> None:
        self._progress = progress
        self._unit = unit
        self._amount = 0
        self._started_s = time.perf_counter()
        self._task = progress.add_task(label, total=total, speed="")

    def advance(self, count: int = 1) -> None:
        """Move the bar on."""
        self._progress.advance(self._task, count)

    def add(self, amount: int) -> None:
        """Count units of speed."""
        self._amount += amount
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        self._progress.update(self._task, speed=f"{self._amount / elapsed_s:.0f} {self._unit}/s")

    def show(self, text: str) -> None:
        """Show a text in place of the speed."""
        self._progress.update(self._task, speed=text)


@contextmanager
def progress_bar(label: str, total: int | None, unit: str = "") -> Iterator[Bar]:
    """Show a bar on stderr for as long as the context lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, label, total, unit)
