"""The JSON object that ends every bench, and the context that makes a figure mean something."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_DIGITS = 6
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A bench's result with what is needed to describe the run.

    Attributes:
        result: The command's dataclass; its fields are the report's top level.
        extra: Further fields: what ran, on which data.
        passed: False if the bench is a check and it failed.
    """

    result: Any
    device: torch.device
    dtype: torch.dtype
    extra: dict[str, Any] = field(default_factory=dict)
    passed: bool = True


@dataclass(frozen=True, slots=True)
class RunContext:
    """Where, when and with what a bench ran.

    Attributes:
        command_line: The command as it can be typed again.
        device_name: Marketing name of the GPU, or of the CPU.
        num_threads: CPU threads that torch uses.
        load_average: Processes that wanted a CPU in the minute before the bench began.
        commit: Commit of the source tree, with `+` appended if files were changed; None outside of
            git.
        date: UTC, ISO 8601.
    """

    command_line: str
    device: str
    device_name: str
    dtype: str
    num_threads: int
    num_cpus: int
    load_average: float
    python_version: str
    torch_version: str
    transformers_version: str
    commit: str | None
    date: str


def run_context(
    argv: Sequence[str], device: torch.device, dtype: torch.dtype, load_average: float
) -> RunContext:
    """Collect the context; the load average was taken before the bench began."""
    return RunContext(
        command_line=shlex.join(["python", "-m", "bench", *argv]),
        device=device.type,
        device_name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        num_cpus=os.cpu_count() or 0,
        load_average=load_average,
        python_version=platform.python_version(),
        torch_version=torch.__version__,
        transformers_version=version("transformers"),
        commit=git_commit(Path(__file__).parent),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def device_name(device: torch.device) -> str:
    """The marketing name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def git_commit(directory: Path) -> str | None:
    """The commit that a directory is at, `+` added if tracked files differ; None without git."""
    try:
        head = _git(directory, "rev-parse", "HEAD")
        changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changes)


def _git(directory: Path, *args: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(directory), *args], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def to_json(command: str, result: Any, extra: Mapping[str, Any]) -> str:
    """Put a result's fields first, then what surrounds them, on one line.

    Args:
        command: Name of the bench.
        result: A dataclass; its fields become the top level of the object.
        extra: Further fields; none may be one of the result's.
    """
    fields = asdict(result)
    clash = fields.keys() & extra.keys()
    if clash:
        raise AssertionError(f"{command} reports {sorted(clash)} twice")
    return json.dumps(_rounded({"command": command, **fields, **extra}), allow_nan=False)


def _rounded(value: Any) -> Any:
    """Cut floats to six significant digits; infinite ones become null."""
    if isinstance(value, float):
        finite = value == value and abs(value) != float("inf")
        return float(f"{value:.{_DIGITS}g}") if finite else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value


def show_figures(title: str, result: Mapping[str, Any]) -> None:
    """Print the plain numbers of a result, if it has any, as a table on stderr."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in result.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value}")
    if table.row_count:
        Console(stderr=True).print(table)


def publish(line: str, output: Path | None) -> None:
    """Write the object as the last line of stdout, and to a file if one is named."""
    print(line, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n", encoding="utf-8")
