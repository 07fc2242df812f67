import json
import os
import subprocess
from pathlib import Path

import pytest

import bench
from bench.__main__ import PROGRAM

SCRIPT = Path(bench.__path__[0]) / "gpu.sh"
PARTS = ["tests", "latency", "acceptance", "exactness", "overhead", "quality"]


def run_script(tmp_path: Path, fails: str = "nothing") -> subprocess.CompletedProcess[str]:
    """Run it with an interpreter that writes its arguments down and fails where it is asked to."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\n'
        f'case "$*" in "{fails}"*) exit 3;; esac\necho fine\n'
    )
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(SCRIPT), "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_parts_run_on_cuda_and_write_into_the_directory(tmp_path: Path) -> None:
    result = run_script(tmp_path)
    assert result.returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(PARTS)
    assert "-m pytest" in calls[0]
    assert "-m gpu" in calls[0]
    for part, call in zip(PARTS[1:], calls[1:], strict=True):
        output = tmp_path / "out" / f"{part}.json"
        assert call.startswith(f"-m bench {part} --device cuda --output {output} ")
        parsed = PROGRAM.parse(call.split()[2:])
        assert (parsed.command.name, parsed.arguments["config"].device) == (part, "cuda")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary) == PARTS
    assert all(entry["status"] == 0 for entry in summary.values())


@pytest.mark.parametrize("part", ["-m pytest", "-m bench acceptance"])
def test_a_failing_part_does_not_stop_the_others(tmp_path: Path, part: str) -> None:
    result = run_script(tmp_path, fails=part)
    assert result.returncode == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == len(PARTS)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [entry["status"] for entry in summary.values()].count(3) == 1


def test_the_time_limits_add_up_to_less_than_ten_minutes() -> None:
    lines = SCRIPT.read_text().splitlines()
    limits = [int(line.split()[2]) for line in lines if line.startswith(("part ", "bench "))]
    assert len(limits) == len(PARTS)
    assert sum(limits) < 600


def test_a_directory_is_required() -> None:
    result = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage" in result.stderr
