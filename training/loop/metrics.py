"""A run's metrics as JSON lines, one per logged step; a resumed run drops what it repeats."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from training.data.jsonl import LineAppender, drop_torn_line, replace_file
from training.loop.tensorboard import TensorBoardLog

METRICS_FILE = "metrics.jsonl"


class MetricsLog(Protocol):
    """Takes the metrics of logged steps."""

    def append(self, metrics: Mapping[str, Any], /) -> None:
        """Write those of one step."""


class _Logs:
    def __init__(self, logs: Sequence[MetricsLog]) -> None:
        self._logs = logs

    def append(self, metrics: Mapping[str, Any]) -> None:
        for log in self._logs:
            log.append(metrics)


@contextmanager
def open_metrics(
    directory: Path, first_step: int, tensorboard: Path | None = None
) -> Iterator[MetricsLog]:
    """Open a run's metrics for the steps after `first_step`; later ones are removed.

    Args:
        directory: Gets JSON lines.
        first_step: Last step of the run so far.
        tensorboard: Gets the same for TensorBoard.

    Raises:
        RunError: If they cannot be written, or TensorBoard is not installed.
    """
    path = directory / METRICS_FILE
    if path.exists():
        drop_torn_line(path)
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        replace_file(path, b"".join(kept))
    with ExitStack() as stack:
        logs: list[MetricsLog] = [stack.enter_context(LineAppender(path))]
        if tensorboard is not None:
            logs.append(stack.enter_context(closing(TensorBoardLog(tensorboard, first_step))))
        yield _Logs(logs)


def read_metrics(directory: Path) -> list[Mapping[str, Any]]:
    """Return a run's logged steps in order."""
    lines = (directory / METRICS_FILE).read_bytes().splitlines()
    return [json.loads(line) for line in lines]
