import json
from pathlib import Path

import pytest
import torch

from heads.medusa import MedusaHeads
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.completion import Completion
from server.core.request import Request
from server.engine.engine import Engine
from server.model.draft_heads import load_draft_heads
from server.model.loading import LoadedModel, load_model
from server.model.native_mtp import load_native_mtp
from tests.support.native_checkpoints import NATIVE_NAMES, NativeName, save_native
from training.__main__ import main

pytestmark = pytest.mark.slow


def original_heads(directory: Path, loaded: LoadedModel, shared: bool) -> Path:
    """Two heads of one layer in the original layout, some of whose drafts are accepted."""
    generator = torch.Generator().manual_seed(0)
    width, tensors = loaded.hidden_size, {}
    for head in range(2):
        weight = torch.randn(width, width, generator=generator) * 0.05
        tensors[f"{head}.0.linear.weight"] = weight
        tensors[f"{head}.0.linear.bias"] = torch.zeros(width)
        if not shared:
            tensors[f"{head}.1.weight"] = loaded.unembedding().clone()
    directory.mkdir()
    torch.save(tensors, directory / "medusa_lm_head.pt")
    sizes = {"medusa_num_heads": 2, "medusa_num_layers": 1}
    (directory / "config.json").write_text(json.dumps(sizes))
    return directory


def convert(source: Path, output: Path, model: Path, *more: str) -> int:
    argv = ["convert", "--source", str(source), "--output", str(output), "--model", str(model)]
    return main([*argv, "--device", "cpu", *more])


def generated(model: Path, heads: str) -> list[Completion]:
    config = EngineConfig(model=str(model), heads=heads, device="cpu", num_blocks=64, tree_size=6)
    engine = Engine.from_config(config)
    return engine.generate(
        [
            Request(
                str(i),
                (1, 40 + i, 60),
                SamplingParams(max_tokens=24, temperature=0.0),
                SpeculationParams(),
            )
            for i in range(4)
        ]
    )


@pytest.mark.parametrize("shared", [True, False])
def test_converted_heads_are_served_and_change_no_token(
    shared: bool,
    model_dir: Path,
    loaded: LoadedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = original_heads(tmp_path / "original", loaded, shared)
    output = tmp_path / "heads"
    assert convert(source, output, model_dir) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["num_heads"], printed["own_unembedding"]) == (2, not shared)
    found = load_draft_heads(output, loaded).heads
    assert isinstance(found, MedusaHeads)
    assert found.config.own_unembedding is not shared
    plain, drafted = generated(model_dir, "none"), generated(model_dir, str(output))
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert sum(c.stats.num_draft_tokens for c in drafted) > 0


def test_converted_heads_can_be_evaluated(
    model_dir: Path, loaded: LoadedModel, distilled_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "heads"
    assert convert(original_heads(tmp_path / "original", loaded, False), output, model_dir) == 0
    argv = ["evaluate", "--heads", str(output), "--data", str(distilled_file)]
    assert main([*argv, "--model", str(model_dir), "--device", "cpu"]) == 0
    assert load_draft_heads(output, loaded).profile is not None


@pytest.mark.parametrize("name", NATIVE_NAMES)
def test_the_mtp_layer_of_a_base_becomes_heads_that_are_served(
    name: NativeName, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = save_native(name, tmp_path / "base").directory, tmp_path / "heads"
    assert convert(base, output, base) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["layer"], printed["num_layers"]) == (1, 1)
    loaded = load_model(str(base), "cpu", "float32")
    found, native = load_draft_heads(output, loaded).heads, load_native_mtp(loaded).module
    expected = native.bfloat16().float().state_dict()
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[key])
    plain, drafted = generated(base, "none"), generated(base, str(output))
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert sum(c.stats.num_draft_tokens for c in drafted) > 0


def test_a_base_without_an_mtp_layer_is_an_error(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(model_dir, tmp_path / "heads", model_dir) == 2
    assert "ships no native MTP layer" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "heads").exists()


def test_heads_that_are_there_are_kept(
    model_dir: Path, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original_heads(tmp_path / "original", loaded, True)
    output = tmp_path / "heads"
    assert convert(source, output, model_dir) == 0
    assert convert(source, output, model_dir) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert(source, output, model_dir, "--overwrite") == 0


def test_a_source_that_is_none_is_named(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path / "nothing", tmp_path / "heads", model_dir) == 2
    # A long path may be broken over lines.
    assert "config.json" in "".join(capsys.readouterr().err.split())
    assert not (tmp_path / "heads").exists()


def test_the_source_is_never_overwritten(
    model_dir: Path, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original_heads(tmp_path / "original", loaded, True)
    before = (source / "config.json").read_bytes()
    assert convert(source, source, model_dir, "--overwrite") == 2
    assert "give another --output" in " ".join(capsys.readouterr().err.split())
    assert (source / "config.json").read_bytes() == before
