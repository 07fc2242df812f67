"""A run's metrics as JSON lines, one per logged step; a resumed run drops what it repeats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.jsonl import LineAppender, drop_torn_line, replace_file

METRICS_FILE = "metrics.jsonl"


def open_metrics(directory: Path, first_step: int) -> LineAppender:
    """Open a run's metrics for the steps after `first_step`; later ones are removed."""
    path = directory / METRICS_FILE
    if path.exists():
        drop_torn_line(path)
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        replace_file(path, b"".join(kept))
    return LineAppender(path)


def read_metrics(directory: Path) -> list[Mapping[str, Any]]:
    """Return a run's logged steps in order."""
    lines = (directory / METRICS_FILE).read_bytes().splitlines()
    return [json.loads(line) for line in lines]
