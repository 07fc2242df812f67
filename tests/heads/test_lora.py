import json
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from heads.errors import HeadsCheckpointError
from heads.lora import AdapterFiles, merge_adapter, read_updates

RANK, WIDTH, OUTER = 2, 6, 10


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(OUTER, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTER, bias=False))
        self.head = nn.Linear(WIDTH, OUTER, bias=False)
        self.head.weight = self.embedding.weight


def config_bytes(**changes: Any) -> bytes:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none"}
    return json.dumps(config | changes).encode()


def tensors(layer: str = "inner.1", outputs: int = OUTER, rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    path = f"base_model.model.{layer}"
    return {
        f"{path}.lora_A.weight": torch.randn(rank, WIDTH, generator=generator),
        f"{path}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }


def files(weights: dict[str, Tensor] | None = None, **changes: Any) -> AdapterFiles:
    stored = tensors() if weights is None else weights
    return AdapterFiles(config_bytes(**changes), safetensors.torch.save(stored))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4.0), (True, 8 / 2**0.5)])
def test_the_scaled_product_is_added_to_the_named_layer_alone(
    use_rslora: bool, scale: float
) -> None:
    base = Base()
    before = state(base)
    assert merge_adapter(base, files(use_rslora=use_rslora)) == 1
    a_RI, b_OR = tensors().values()
    changed = {"inner.1.weight": before["inner.1.weight"] + scale * (b_OR @ a_RI)}
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, (before | changed)[name])


def test_a_merged_layer_computes_what_the_layer_and_its_adapter_do() -> None:
    base, x_TI = Base(), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(4))
    (update,) = read_updates(files()).values()
    plain_TO = base.inner[1](x_TI)
    merge_adapter(base, files())
    expected_TO = plain_TO + update.scale * (x_TI @ update.a_RI.T @ update.b_OR.T)
    torch.testing.assert_close(base.inner[1](x_TI), expected_TO)


def test_a_16_bit_weight_is_rounded_once() -> None:
    base = Base().to(torch.bfloat16)
    before = state(base)["inner.1.weight"].float()
    merge_adapter(base, files())
    a_RI, b_OR = tensors().values()
    expected = (before + 4.0 * (b_OR @ a_RI)).to(torch.bfloat16)
    assert torch.equal(state(base)["inner.1.weight"], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("use_dora", True),
        ("modules_to_save", ["head"]),
        ("rank_pattern", {"inner": 4}),
        ("alpha_pattern", {"inner": 4}),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [1]),
        ("an_option_of_tomorrow", "on"),
    ],
)
def test_whatever_is_not_plain_lora_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(HeadsCheckpointError, match=f"{key} .*not supported"):
        read_updates(files(**{key: value}))


def test_options_that_are_off_or_only_say_where_it_came_from_are_fine() -> None:
    adapter = files(use_dora=False, modules_to_save=None, rank_pattern={}, target_modules=["x"])
    assert list(read_updates(adapter)) == ["inner.1"]


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (AdapterFiles(b"{", b""), "cannot be read"),
        (AdapterFiles(config_bytes(), b"short"), "cannot be read"),
        (AdapterFiles(b"[]", safetensors.torch.save(tensors())), "no object"),
        (files({}), "no weights"),
        (files(r=0), "whole number from 1"),
        (files(lora_alpha="8"), "lora_alpha '8'"),
        (files(tensors(rank=3)), "rank r = 2"),
        (files(dict(list(tensors().items())[:1])), r"\['lora_A'\] for inner.1"),
        (files({"base_model.model.inner.1.bias": torch.zeros(1)}), r"inner\.1\.bias"),
        (files({"inner.1.lora_A.weight": torch.zeros(2, 6)}), r"lora_A\.weight"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter: AdapterFiles, match: str) -> None:
    with pytest.raises(HeadsCheckpointError, match=match):
        read_updates(adapter)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type"])
def test_a_config_that_lacks_a_needed_value_is_refused(key: str) -> None:
    config = json.loads(config_bytes())
    del config[key]
    adapter = AdapterFiles(json.dumps(config).encode(), safetensors.torch.save(tensors()))
    with pytest.raises(HeadsCheckpointError, match=f"no {key}"):
        read_updates(adapter)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (tensors("inner.7"), "inner.7, which is missing"),
        (tensors("embedding"), "embedding, which is Embedding"),
        (tensors("inner.0"), r"of shape \(10, 6\), but the base model's has \(6, 6\)"),
        (tensors("head"), "head, whose weight the base model uses elsewhere"),
    ],
)
def test_a_layer_that_does_not_fit_leaves_the_model_as_it_was(
    weights: dict[str, Tensor], match: str
) -> None:
    base = Base()
    before = state(base)
    with pytest.raises(HeadsCheckpointError, match=match):
        merge_adapter(base, files(tensors() | weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
