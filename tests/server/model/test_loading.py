"""Loaded models against plain `transformers` ones, damaged checkpoints, and the built-in model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from server.errors import ConfigError, ModelError
from server.model.loading import load_model
from tests.support.tiny_models import (
    MAX_MODEL_LEN,
    TINY_KINDS,
    VOCAB_SIZE,
    TinyKind,
    save_tiny_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 60).unsqueeze(0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(kind, directory / kind) for kind in TINY_KINDS}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return save_tiny_model("llama", tmp_path / "llama")


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_logits_are_those_of_the_plain_model(checkpoints: dict[str, Path], kind: TinyKind) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[kind]).eval()
    loaded = load_model(str(checkpoints[kind]), "cpu", "float32")
    with torch.inference_mode():
        expected = plain(input_ids=IDS).logits
        found = loaded.model(input_ids=IDS).logits

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_matrices_for_the_heads_are_plain_and_right(
    checkpoints: dict[str, Path], kind: TinyKind
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[kind])
    unembedding = plain.get_output_embeddings().get_parameter("weight")
    input_embedding = plain.get_input_embeddings().get_parameter("weight")
    loaded = load_model(str(checkpoints[kind]), "cpu", "float32")

    assert torch.equal(loaded.unembedding(), unembedding)
    assert torch.equal(loaded.input_embedding(), input_embedding)
    is_tied = plain.config.tie_word_embeddings
    assert (loaded.unembedding().data_ptr() == loaded.input_embedding().data_ptr()) == is_tied


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_facts_are_read_off_the_model(checkpoints: dict[str, Path], kind: TinyKind) -> None:
    loaded = load_model(str(checkpoints[kind]), "cpu", "float32")

    assert loaded.name == str(checkpoints[kind])
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert (loaded.num_layers, loaded.num_kv_heads, loaded.head_dim) == (3, 2, 8)
    assert (loaded.hidden_size, loaded.vocab_size) == (32, VOCAB_SIZE)
    assert loaded.max_model_len == MAX_MODEL_LEN
    assert loaded.eos_token_ids == {2}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_linear_layers_stay_plain(checkpoints: dict[str, Path]) -> None:
    loaded = load_model(str(checkpoints["qwen2"]), "cpu", "float32")
    assert type(loaded.model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_type_that_was_asked_for(checkpoints: dict[str, Path], dtype: str) -> None:
    loaded = load_model(str(checkpoints["llama"]), "cpu", dtype)

    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.unembedding().dtype == loaded.dtype
    with torch.inference_mode():
        assert loaded.model(input_ids=IDS).logits.dtype == loaded.dtype


def test_a_moved_model_and_its_matrices_are_all_elsewhere(checkpoints: dict[str, Path]) -> None:
    there = torch.device("meta")
    moved = load_model(str(checkpoints["llama"]), "cpu").moved(there)
    assert moved.device == there
    assert {tensor.device for tensor in moved.model.state_dict().values()} == {there}
    assert moved.unembedding().device == moved.input_embedding().device == there


def test_auto_takes_float32_on_cpu(checkpoints: dict[str, Path]) -> None:
    assert load_model(str(checkpoints["llama"]), "cpu", "auto").dtype == torch.float32


def test_auto_takes_the_device_that_there_is(checkpoints: dict[str, Path]) -> None:
    loaded = load_model(str(checkpoints["llama"]))

    assert loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_a_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path], device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        load_model(str(checkpoints["llama"]), device)


@pytest.mark.parametrize("device", ["tpu", "meta", ""])
def test_an_unknown_device_is_refused(checkpoints: dict[str, Path], device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        load_model(str(checkpoints["llama"]), device)


def test_an_unknown_dtype_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        load_model(str(checkpoints["llama"]), "cpu", "int4")


def test_loading_says_nothing(
    checkpoints: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(str(checkpoints["llama"]), "cpu")

    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_fingerprint_survives_rounding(checkpoints: dict[str, Path], dtype: str) -> None:
    exact = load_model(str(checkpoints["qwen2"]), "cpu", "float32").fingerprint
    rounded = load_model(str(checkpoints["qwen2"]), "cpu", dtype).fingerprint

    assert exact.difference(rounded) is None


def test_the_fingerprint_tells_models_apart(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    fingerprint = load_model(str(checkpoints["llama"]), "cpu").fingerprint
    sibling = load_model(str(save_tiny_model("llama", tmp_path, seed=1)), "cpu").fingerprint
    other = load_model(str(checkpoints["mistral"]), "cpu").fingerprint

    assert "weights differ" in str(fingerprint.difference(sibling))
    assert "model_type" in str(fingerprint.difference(other))


def test_ends_of_text_come_from_the_generation_config_and_the_tokenizer(llama: Path) -> None:
    path = llama / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))

    assert load_model(str(llama), "cpu").eos_token_ids == {2, 7, 9}


def test_a_model_without_an_end_of_text_has_none(llama: Path) -> None:
    edit_config(llama, eos_token_id=None)
    (llama / "generation_config.json").unlink()
    plain = tiny_tokenizer()
    plain.eos_token = None
    plain.save_pretrained(llama)

    assert load_model(str(llama), "cpu").eos_token_ids == frozenset()


def test_longrope_models_end_where_their_rotations_would_change(tmp_path: Path) -> None:
    config = Phi3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 128,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    assert load_model(str(tmp_path), "cpu").max_model_len == 128


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="configuration"):
        load_model(str(tmp_path), "cpu")


def test_an_unknown_architecture_is_refused(llama: Path) -> None:
    edit_config(llama, model_type="hydra")

    with pytest.raises(ModelError, match="hydra"):
        load_model(str(llama), "cpu")


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(llama: Path) -> None:
    edit_config(llama, model_type="mamba", architectures=["MambaForCausalLM"])
    (llama / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="hybrid/recurrent"):
        load_model(str(llama), "cpu")


def test_a_checkpoint_without_weights_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(str(llama), "cpu")


def test_pickled_weights_are_refused(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")

    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(str(llama), "cpu")


def test_a_truncated_file_is_refused(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(str(llama), "cpu")


def test_a_missing_weight_is_not_made_up(llama: Path) -> None:
    path = llama / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"1 missing keys.*model\.layers\.1\.mlp\.up_proj"):
        load_model(str(llama), "cpu")


def test_a_weight_of_another_shape_is_refused(llama: Path) -> None:
    edit_config(llama, intermediate_size=48)

    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(str(llama), "cpu")


def test_a_checkpoint_without_a_tokenizer_is_refused(llama: Path) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(ModelError, match="tokenizer"):
        load_model(str(llama), "cpu")


def test_a_tokenizer_of_another_model_is_refused(llama: Path) -> None:
    plain = AutoTokenizer.from_pretrained(llama)
    plain.add_tokens([AddedToken("<too many>")])
    plain.save_pretrained(llama)

    with pytest.raises(ModelError, match=f"{VOCAB_SIZE + 1} tokens.*only has {VOCAB_SIZE}"):
        load_model(str(llama), "cpu")


def test_a_hub_id_without_a_network_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ModelError, match=r"(?s)euryale-tests/no-such-model.*check the name"):
        load_model("euryale-tests/no-such-model", "cpu")


@pytest.mark.slow
def test_the_built_in_model_answers_a_question(smollm2_dir: Path) -> None:
    assert smollm2_dir.is_dir()
    loaded = load_model("smollm2", "cpu", "float32")
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    model: Any = loaded.model
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)

    assert loaded.tokenizer.decode(output[0, len(prompt) :].tolist()).startswith(
        "The capital of France is Paris."
    )
    assert (loaded.num_layers, loaded.num_kv_heads, loaded.head_dim) == (30, 3, 64)
    assert (loaded.hidden_size, loaded.vocab_size) == (576, 49_152)
    assert loaded.max_model_len == 8192
    assert loaded.eos_token_ids == {2}
