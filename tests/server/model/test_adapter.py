"""Base models with the adapter of their heads, against PEFT's own merge."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineConfig
from server.cpu.packed_linear import pack_linears
from server.engine.engine import Engine
from server.errors import HeadsCheckpointError, HeadsMismatchError
from server.model.draft_heads import load_draft_heads
from server.model.loading import load_model
from tests.support.engine_tools import make_request
from tests.support.log_lines import LogLines
from tests.support.tiny_adapters import adapted, save_adapted_heads, save_tiny_adapter
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 60).unsqueeze(0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("adapter") / "model")


@pytest.fixture(scope="module")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    adapter = save_tiny_adapter(model_dir, directory / "adapter")
    return save_adapted_heads(model_dir, directory / "heads", adapter)


def build(model_dir: Path, heads_dir: Path) -> Engine:
    config = EngineConfig(
        model=str(model_dir), heads=str(heads_dir), device="cpu", num_blocks=16, tree_size=4
    )
    return Engine.from_config(config)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}])
@pytest.mark.parametrize("is_packed", [True, False])
def test_logits_are_those_of_pefts_own_merge(
    model_dir: Path, tmp_path: Path, options: dict[str, Any], is_packed: bool
) -> None:
    adapter = save_tiny_adapter(model_dir, tmp_path / "adapter", **options)
    heads = save_adapted_heads(model_dir, tmp_path / "heads", adapter)
    loaded = load_model(str(model_dir), "cpu", "float32", heads)
    if is_packed:
        pack_linears(loaded.model)
    merged = adapted(model_dir, **options).merge_and_unload()
    with torch.inference_mode():
        expected = merged(input_ids=IDS).logits
        found = loaded.model(input_ids=IDS).logits
        plain = load_model(str(model_dir), "cpu", "float32").model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


def test_the_fingerprint_stays_that_of_the_plain_base(model_dir: Path, heads_dir: Path) -> None:
    plain, merged = (load_model(str(model_dir), "cpu", heads=h) for h in (None, heads_dir))
    assert merged.fingerprint == plain.fingerprint
    assert plain.adapter_sha256 is None
    assert merged.adapter_sha256 is not None


def test_heads_without_an_adapter_leave_the_model_plain(model_dir: Path, tmp_path: Path) -> None:
    heads = save_tiny_heads(model_dir, tmp_path / "heads")
    assert load_model(str(model_dir), "cpu", heads=heads).adapter_sha256 is None


def test_another_base_model_is_refused_before_anything_is_merged(
    heads_dir: Path, tmp_path: Path
) -> None:
    other = save_tiny_model("llama", tmp_path, seed=1)
    with pytest.raises(HeadsMismatchError, match="trained for tiny"):
        load_model(str(other), "cpu", heads=heads_dir)


def test_an_adapter_that_is_cut_short_is_named(model_dir: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(model_dir, tmp_path / "adapter")
    heads = save_adapted_heads(model_dir, tmp_path / "heads", adapter)
    weights = heads / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(HeadsCheckpointError, match=r"adapter_model\.safetensors is damaged"):
        load_model(str(model_dir), "cpu", heads=heads)


def test_an_adapter_that_is_more_than_lora_is_refused(model_dir: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(model_dir, tmp_path / "adapter", use_dora=True)
    heads = save_adapted_heads(model_dir, tmp_path / "heads", adapter)
    with pytest.raises(HeadsCheckpointError, match="use_dora True, which is not supported"):
        load_model(str(model_dir), "cpu", heads=heads)


def test_heads_and_a_model_of_different_adapters_are_refused(
    model_dir: Path, heads_dir: Path, tmp_path: Path
) -> None:
    merged = load_model(str(model_dir), "cpu", heads=heads_dir)
    with pytest.raises(HeadsMismatchError, match="the adapter None"):
        load_draft_heads(save_tiny_heads(model_dir, tmp_path / "plain"), merged)
    with pytest.raises(HeadsMismatchError, match="loaded with the adapter None"):
        load_draft_heads(heads_dir, load_model(str(model_dir), "cpu"))


def test_the_engine_serves_base_and_adapter_with_the_heads(
    model_dir: Path, heads_dir: Path, log: LogLines
) -> None:
    engine = build(model_dir, heads_dir)
    assert any(str(engine.loaded.adapter_sha256) in line for line in log.take())
    request = make_request(IDS[0].tolist(), max_tokens=8)
    found = engine.generate([request])[0].token_ids
    merged = adapted(model_dir).merge_and_unload()
    ids_1T = IDS
    for token in found:
        with torch.inference_mode():
            assert token == int(merged(input_ids=ids_1T).logits[0, -1].argmax())
        ids_1T = torch.cat((ids_1T, torch.tensor([[token]])), dim=1)
    assert engine.counters.num_draft_tokens > 0
