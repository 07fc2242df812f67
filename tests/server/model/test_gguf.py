"""A converted GGUF file against the checkpoint that it was written from."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.cache import CACHE_VARIABLE
from server.errors import ModelError
from server.model.gguf import convert_gguf, converted_dir
from tests.server.model.gguf_files import save_tiny_gguf
from tests.support.tiny_models import EOS_TOKEN

TEXTS = ["The draft tree has a root.", f"user: Ça va? 你好{EOS_TOKEN}", "  \n🦑"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("original")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    return save_tiny_gguf(original, tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> Path:
    target = tmp_path_factory.mktemp("cache") / "models" / "tiny"
    convert_gguf(gguf, target)
    return target


def test_weights_are_the_originals(original: Path, converted: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(original).state_dict()
    found = AutoModelForCausalLM.from_pretrained(converted).state_dict()

    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_logits_are_the_originals(original: Path, converted: Path) -> None:
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(original)(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(converted)(input_ids=ids).logits

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_the_originals(original: Path, converted: Path, text: str) -> None:
    expected = AutoTokenizer.from_pretrained(original)
    found = AutoTokenizer.from_pretrained(converted)

    assert found.encode(text) == expected.encode(text)
    assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))
    assert found.chat_template == expected.chat_template
    assert found.eos_token_id == expected.eos_token_id


def test_the_result_is_an_ordinary_checkpoint(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}

    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "quantization_config" not in (converted / "config.json").read_text()
    assert [path.name for path in converted.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_a_finished_conversion_is_not_repeated(tmp_path: Path) -> None:
    target = tmp_path / "models" / "done"
    target.mkdir(parents=True)

    convert_gguf(tmp_path / "no such file.gguf", target)

    assert list(target.iterdir()) == []


def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path, gguf: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    target = tmp_path / "models" / "half"

    with pytest.raises(ModelError, match=r"half\.gguf"):
        convert_gguf(half, target)

    assert [path for path in target.parent.iterdir() if path.suffix != ".lock"] == []


def test_a_file_without_some_of_the_weights_is_refused(tmp_path: Path) -> None:
    incomplete = save_tiny_gguf(
        tmp_path / "original", tmp_path / "incomplete.gguf", without={"blk.1.ffn_up.weight"}
    )

    with pytest.raises(ModelError, match=r"missing keys.*layers\.1\.mlp\.up_proj"):
        convert_gguf(incomplete, tmp_path / "models" / "incomplete")


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("not a model")

    with pytest.raises(ModelError, match=r"text\.gguf"):
        convert_gguf(path, tmp_path / "models" / "text")


def test_conversions_are_told_apart_by_name_and_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    one = converted_dir("a.gguf", "0" * 64)

    assert one == tmp_path / "models" / f"a-{'0' * 16}"
    assert one != converted_dir("a.gguf", "1" * 64)
    assert one != converted_dir("b.gguf", "0" * 64)
