"""Runs the commands in this process, or in another one that is killed, and reads what they say."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from training.__main__ import main

_TIMEOUT_S = 300


def train_argv(data: Path, output: Path, model: Path, *more: str) -> list[str]:
    argv = ["train", "--data", str(data), "--output", str(output), "--model", str(model)]
    return [*argv, "--device", "cpu", "--held-out", "0.4", *more]


def train(data: Path, output: Path, model: Path, *more: str) -> int:
    return main(train_argv(data, output, model, *more))


def evaluate(heads: Path, data: Path, model: Path, *more: str) -> int:
    argv = ["evaluate", "--heads", str(heads), "--data", str(data), "--model", str(model)]
    return main([*argv, "--device", "cpu", *more])


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the last command printed."""
    value: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


def error_text(capsys: pytest.CaptureFixture[str]) -> str:
    """What commands wrote to stderr, without line breaks."""
    return " ".join(capsys.readouterr().err.split())


def kill_when_exists(argv: Sequence[str], path: Path) -> None:
    """Run `python -m training` with `argv` until a file is there, then kill it."""
    command = [sys.executable, "-m", "training", *argv]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + _TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists():
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.002)
        assert process.poll() == -signal.SIGKILL
