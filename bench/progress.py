"""Progress on stderr, so that stdout carries nothing but the result."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def note(message: str) -> None:
    """Print a line on stderr."""
    Console(stderr=True).print(message, style="dim", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr; the function it yields advances the bar by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def show_figures(title: str, result: Mapping[str, Any]) -> None:
    """Print the plain numbers of a result as a table on stderr."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in result.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value}")
    Console(stderr=True).print(table)
