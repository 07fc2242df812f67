"""A run's metrics as JSON lines, one per logged step; a resumed run drops what it repeats.

Trackers get the same figures.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from training.data.jsonl import LineAppender, drop_torn_line, replace_file
from training.loop.run_state import RunRecord
from training.loop.trackers import flat_figures, open_trackers

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Takes the metrics of logged steps."""

    def __init__(self, lines: LineAppender, trackers: Sequence[GeneralTracker]) -> None:
        self._lines = lines
        self._trackers = trackers

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step, of which `step` is one."""
        self._lines.append(metrics)
        for tracker in self._trackers:
            tracker.log(flat_figures(metrics), step=metrics["step"])


@contextmanager
def open_metrics(record: RunRecord, first_step: int) -> Iterator[MetricsLog]:
    """Open a run's metrics for the steps after `first_step`; later ones are removed.

    Raises:
        RunError: If they cannot be written, or a tracker cannot be started.
    """
    path = record.directory / METRICS_FILE
    if path.exists():
        drop_torn_line(path)
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        replace_file(path, b"".join(kept))
    with LineAppender(path) as file, open_trackers(record.tracking, first_step) as trackers:
        yield MetricsLog(file, trackers)


def read_metrics(directory: Path) -> list[Mapping[str, Any]]:
    """Return a run's logged steps in order."""
    lines = (directory / METRICS_FILE).read_bytes().splitlines()
    return [json.loads(line) for line in lines]
