"""What names of models stand for."""

from pathlib import Path

import pytest

from server.errors import ModelError
from server.model.builtin import SMOLLM2, BuiltinModel
from server.model.gguf import converted_dir
from server.model.source import resolve_model
from tests.server.model.gguf_files import save_tiny_gguf
from tests.server.model.wheels import write_wheel


def no_fetch(builtin: BuiltinModel, directory: Path) -> Path:
    raise ModelError("there is no network")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EURYALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_directory_stands_for_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), no_fetch) == str(tmp_path)


def test_a_tilde_stands_for_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()

    assert resolve_model("~/model", no_fetch) == str(tmp_path / "model")


def test_a_directory_may_end_in_gguf(tmp_path: Path) -> None:
    directory = tmp_path / "model.gguf"
    directory.mkdir()

    assert resolve_model(str(directory), no_fetch) == str(directory)


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d-e"])
def test_a_hub_id_stands_for_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)

    assert resolve_model(name, no_fetch) == name


@pytest.mark.parametrize(
    "name", ["", "/no/such/model", "./model", "a/b/c", "no-such.gguf", "hello world", "https://a/b"]
)
def test_a_name_that_stands_for_nothing_is_refused_with_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelError, match="give a local directory") as caught:
        resolve_model(name, no_fetch)

    assert repr(name) in str(caught.value)


def test_a_gguf_file_is_converted_into_the_cache_once(tmp_path: Path, cache: Path) -> None:
    gguf = save_tiny_gguf(tmp_path / "original", tmp_path / "tiny.gguf")

    first = Path(resolve_model(str(gguf), no_fetch))
    weights = first / "model.safetensors"
    written_at = weights.stat().st_mtime_ns
    second = Path(resolve_model(str(gguf), no_fetch))

    assert first == second
    assert first.parent == cache / "models"
    assert first.name.startswith("tiny-")
    assert weights.stat().st_mtime_ns == written_at


def test_the_built_in_that_is_converted_needs_no_network(cache: Path) -> None:
    target = converted_dir(SMOLLM2.file_name, SMOLLM2.sha256)
    target.mkdir(parents=True)

    assert resolve_model("smollm2", no_fetch) == str(target)


def test_the_built_in_without_a_network_names_the_remedy(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no network.*put the file SmolLM2-135M"):
        resolve_model("smollm2", no_fetch)


def test_another_file_is_not_taken_for_the_built_in(cache: Path) -> None:
    def fetch(builtin: BuiltinModel, directory: Path) -> Path:
        return write_wheel(directory)

    with pytest.raises(ModelError, match="cannot fetch the model smollm2"):
        resolve_model("smollm2", fetch)


def test_a_directory_does_not_shadow_the_built_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    target = converted_dir(SMOLLM2.file_name, SMOLLM2.sha256)
    target.mkdir(parents=True)

    assert resolve_model("smollm2", no_fetch) == str(target)
    assert resolve_model("./smollm2", no_fetch) == "smollm2"
