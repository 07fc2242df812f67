import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench.measure.report import device_name, git_commit, publish, run_context, to_json


@dataclass(frozen=True)
class Inner:
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    mean: float
    inner: dict[str, Inner]
    gap: float | None = None


def run_git(directory: Path, *args: str) -> None:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    command = ["git", "-C", str(directory), *args]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **identity})


def test_a_results_fields_are_the_top_level_on_one_line() -> None:
    line = to_json("latency", Result(1.5, {"a": Inner((0.5, 1.0))}), {"model": "m"})
    assert "\n" not in line
    assert json.loads(line) == {
        "command": "latency",
        "mean": 1.5,
        "inner": {"a": {"rates": [0.5, 1.0]}},
        "gap": None,
        "model": "m",
    }


def test_numbers_are_cut_to_six_digits_and_infinities_to_null() -> None:
    fields = json.loads(to_json("x", Result(1.23456789e-5, {}, math.inf), {"n": 123456789}))
    assert fields["mean"] == 1.23457e-05
    assert fields["gap"] is None
    assert fields["n"] == 123456789


def test_a_field_cannot_be_reported_twice() -> None:
    with pytest.raises(AssertionError, match="mean"):
        to_json("x", Result(1.0, {}), {"mean": 2.0})


def test_the_object_goes_to_stdout_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "out.json"
    publish('{"a": 1}', path)
    assert capsys.readouterr().out == '{"a": 1}\n'
    assert path.read_text() == '{"a": 1}\n'


def test_the_context_names_machine_and_versions() -> None:
    context = run_context(["latency", "--data", "a b"], torch.device("cpu"), torch.float32, 0.5)
    assert context.command_line == "python -m bench latency --data 'a b'"
    assert (context.device, context.dtype, context.load_average) == ("cpu", "float32", 0.5)
    assert context.device_name
    assert context.torch_version == torch.__version__
    assert context.num_threads == torch.get_num_threads()
    assert context.date.endswith("+00:00")


def test_a_cpu_has_a_name() -> None:
    assert device_name(torch.device("cpu")).strip()


def test_the_commit_is_marked_if_files_were_changed(tmp_path: Path) -> None:
    run_git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    run_git(tmp_path, "add", "file")
    run_git(tmp_path, "commit", "-q", "-m", "first")
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == commit + "+"


def test_outside_of_git_there_is_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None
