"""What a command shows on stderr: log lines, progress and errors. Results alone go to stdout.

Of several processes that do the same, which launchers number by the environment variable RANK, only
the first one shows log lines and progress. Libraries of ours only log to `euryale.*`; a command
line decides here how that is shown.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

LOGGER = "euryale"


def log_to_stderr(level: str = "info", has_times: bool = False) -> None:
    """Show log lines on stderr; a further call replaces an earlier one's level and format.

    Args:
        level: Least severe level that is shown, such as `info`.
        has_times: False shows the messages of `euryale.*`, dim on a terminal; True shows the lines
            of all loggers with time and level, for logs that are kept.
    """
    if has_times:
        line_format = "%(asctime)s %(levelname)s %(message)s"
        logging.basicConfig(level=level.upper(), format=line_format, force=True)
        return
    logger = logging.getLogger(LOGGER)
    for handler in [found for found in logger.handlers if isinstance(found, _DimHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_DimHandler())
    logger.setLevel(level.upper())


def print_error(error: Exception) -> None:
    """Show on one line why a command cannot go on, from whichever process it is."""
    rank = _rank()
    where = "" if rank == "0" else f"process {rank}: "
    text = f"{where}error: {' '.join(str(error).split())}"
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A progress bar, with a text that shows speed or the like.

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
        self._text = ""
        self._started_s = self._logged_s = time.perf_counter()
        self._task = progress.add_task(label, total=total, text="")

    def advance(self, count: int = 1) -> None:
        """Move the bar on."""
        self._num_done += count
        self._progress.advance(self._task, count)
        self._log()

    def add(self, amount: int) -> None:
        """Count work in the bar's unit; its speed becomes the text."""
        self._amount += amount
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        self.show(f"{self._amount / elapsed_s:.0f} {self._unit}/s")

    def show(self, text: str) -> None:
        """Replace the text."""
        self._text = text
        self._progress.update(self._task, text=text)

    def _log(self) -> None:
        now_s = time.perf_counter()
        is_due = now_s - self._logged_s >= self._log_interval_s
        if is_due and not self._progress.console.is_terminal:
            self._logged_s = now_s
            per_unit_s = (now_s - self._started_s) / max(1, self._num_done)
            left_s = per_unit_s * (self._total - self._num_done)
            _print_dim(
                f"{self._label}: {self._num_done} of {self._total}, {self._text or 'going on'}, "
                f"{left_s / 60:.0f} min left"
            )


@contextmanager
def progress_bar(
    label: str, total: int, unit: str = "", log_interval_s: float = 30.0
) -> Iterator[Bar]:
    """Show a bar on stderr for as long as the context lasts.

    Args:
        label: What is going on.
        total: Number of units after which the bar is full.
        unit: What `Bar.add` counts, such as `tokens`; may be another unit than the bar's.
        log_interval_s: Seconds between two lines where stderr is no terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console()) as progress:
        yield Bar(progress, label, total, unit, log_interval_s)


class _DimHandler(logging.Handler):
    @override
    def emit(self, record: logging.LogRecord) -> None:
        _print_dim(self.format(record))


def _print_dim(message: str) -> None:
    _console().print(message, style="dim", highlight=False, markup=False, soft_wrap=True)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _console() -> Console:
    return Console(stderr=True, quiet=_rank() != "0")
