"""What Linux says about the CPU, and what is said where it says nothing."""

import platform
from pathlib import Path

import pytest

from server.cpu.cpu_info import cpu_features, cpu_name

CPU_INFO = "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t: fpu avx512f\n\nprocessor\t: 1\n"


def say(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read(path: Path, encoding: str) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "arm")


def test_name_and_features_are_those_of_the_first_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    say(monkeypatch, CPU_INFO)
    assert cpu_name() == "Some CPU @ 2GHz"
    assert cpu_features().split()[-2:] == ["fpu", "avx512f"]


@pytest.mark.parametrize("text", [None, "", "processor\t: 0\n"])
def test_without_them_the_processors_kind_must_do(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    say(monkeypatch, text)
    assert cpu_name() == cpu_features() == "arm"
