import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.model.loading import LoadedModel, load_model
from tests.support.tiny_adapters import save_adapted_heads
from tests.support.tiny_models import save_tiny_model
from training.errors import RunError
from training.methods.lora import ALL_LINEAR, AdaptedBase, LoraPlan

IDS = torch.arange(3, 40).unsqueeze(0)
PLAN = LoraPlan(rank=4, alpha=8.0, targets=(ALL_LINEAR,), seed=0)


@pytest.fixture
def unpacked(model_dir: Path) -> LoadedModel:
    return load_model(str(model_dir), "cpu", "float32")


@torch.inference_mode()
def logits(loaded: LoadedModel) -> Tensor:
    found: Tensor = loaded.model(input_ids=IDS).logits
    return found


def disturb(base: AdaptedBase) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in base.parameters.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def test_a_fresh_adapter_changes_nothing(unpacked: LoadedModel) -> None:
    before = logits(unpacked)
    AdaptedBase(unpacked, PLAN)
    torch.testing.assert_close(logits(unpacked), before)


def test_it_can_be_switched_off_and_is_on_again(unpacked: LoadedModel) -> None:
    before = logits(unpacked)
    base = AdaptedBase(unpacked, PLAN)
    disturb(base)
    adapted = logits(unpacked)
    assert not torch.allclose(adapted, before, atol=0.1)
    with base.without():
        torch.testing.assert_close(logits(unpacked), before)
    torch.testing.assert_close(logits(unpacked), adapted)


def test_its_files_are_what_the_server_merges(
    unpacked: LoadedModel, model_dir: Path, tmp_path: Path
) -> None:
    base = AdaptedBase(unpacked, PLAN)
    disturb(base)
    heads = save_adapted_heads(model_dir, tmp_path / "heads", base.files())
    served = load_model(str(model_dir), "cpu", "float32", heads)
    torch.testing.assert_close(logits(served), logits(unpacked), rtol=1e-3, atol=1e-3)


def test_its_config_names_the_base_and_no_path(unpacked: LoadedModel) -> None:
    config = json.loads(AdaptedBase(replace(unpacked, name="acme/tiny"), PLAN).files().config)
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)


def test_only_the_adapter_learns_and_all_of_it(unpacked: LoadedModel) -> None:
    base = AdaptedBase(unpacked, PLAN)
    learning = {name for name, weight in unpacked.model.named_parameters() if weight.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in base.parameters} == learning
    # 7 linear layers in each of 3 layers, with an A and a B each.
    assert len(learning) == 7 * 3 * 2


def test_the_seed_gives_the_weights_and_leaves_the_callers_numbers_alone(model_dir: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        loaded = load_model(str(model_dir), "cpu", "float32")
        before = torch.get_rng_state()
        base = AdaptedBase(loaded, LoraPlan(4, 8.0, ("q_proj",), seed))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(torch.cat([weight.flatten() for weight in base.parameters.values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_layers_that_could_not_be_served_are_rejected_at_once(tmp_path: Path, target: str) -> None:
    # Untied, so that PEFT has nothing to warn of.
    model = save_tiny_model("qwen2", tmp_path)
    loaded = load_model(str(model), "cpu", "float32")
    with pytest.raises(RunError, match=f"lora targets are q_proj, {target}.*(adapter|{target})"):
        AdaptedBase(loaded, LoraPlan(4, 8.0, ("q_proj", target), 0))


def test_a_target_that_the_model_lacks_is_named(unpacked: LoadedModel) -> None:
    with pytest.raises(RunError, match="lora targets are no_such_layer"):
        AdaptedBase(unpacked, LoraPlan(4, 8.0, ("no_such_layer",), 0))


def test_without_peft_the_error_says_how_to_get_it(
    unpacked: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match=r"needs peft; install it with pip install 'euryale\[med"):
        AdaptedBase(unpacked, PLAN)
