"""What the user sees on stderr while a model is fetched or converted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from transformers.utils import logging as transformers_logging


@contextmanager
def download_bar(description: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yields what to call with the number of bytes that have arrived."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=num_bytes)

        def update(arrived: int) -> None:
            progress.update(task, completed=min(arrived, num_bytes))

        yield update


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of `transformers`, which take no notice of ours."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
