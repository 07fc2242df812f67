"""Packed layers against `torch.nn.functional.linear` with the plain weight."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from heads.packed_product import can_pack
from server.cpu.packed_linear import PackedLinear, pack_linears
from tests.support.tiny_models import TINY_KINDS, TinyKind, tiny_config

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.skipif(
    not can_pack(CPU, torch.float32), reason="this build of torch has no oneDNN"
)


class DoubledLinear(nn.Linear):
    """A subclass that computes something else, as some models have them."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 33, 512])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_computes_what_the_plain_one_computes(
    num_rows: int, has_bias: bool, dtype: torch.dtype
) -> None:
    if not can_pack(CPU, dtype):
        return
    torch.manual_seed(num_rows)
    plain = nn.Linear(48, 20, bias=has_bias, dtype=dtype).requires_grad_(False)
    rows = torch.randn(num_rows, 48, dtype=dtype)

    packed = PackedLinear(plain)(rows)

    expected = functional.linear(rows, plain.weight, plain.bias)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(16,), (1, 3, 16), (2, 0, 16), (2, 1, 2, 16)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(16, 8).requires_grad_(False)
    rows = torch.randn(shape)

    torch.testing.assert_close(PackedLinear(plain)(rows), plain(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 9])
def test_joined_layers_come_side_by_side_each_with_its_own_bias(num_rows: int) -> None:
    torch.manual_seed(num_rows)
    layers = [nn.Linear(16, 8), nn.Linear(16, 3, bias=False), nn.Linear(16, 5)]
    for layer in layers:
        layer.requires_grad_(False)
    rows = torch.randn(num_rows, 16)

    packed = PackedLinear(*layers)(rows)

    expected = torch.cat([layer(rows) for layer in layers], dim=-1)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)


def test_a_view_that_is_not_contiguous_is_read_right() -> None:
    plain = nn.Linear(16, 8).requires_grad_(False)
    rows = torch.randn(16, 5).T

    torch.testing.assert_close(PackedLinear(plain)(rows), plain(rows), rtol=1e-5, atol=1e-5)


def test_later_changes_of_the_plain_weight_do_not_reach_the_packed_one() -> None:
    plain = nn.Linear(16, 8).requires_grad_(False)
    rows = torch.randn(3, 16)
    packed = PackedLinear(plain)
    before = packed(rows)
    plain.weight.zero_()

    assert torch.equal(packed(rows), before)


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_a_packed_model_gives_the_plain_models_logits(kind: TinyKind) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (1, 40))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        num_linears = sum(type(module) is nn.Linear for module in model.modules())

        assert pack_linears(model) == num_linears > 0
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_a_tied_embedding_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    pack_linears(model)

    assert model.get_input_embeddings().weight is weight
    assert torch.equal(weight, before)


def test_the_plain_weights_are_not_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pack_linears(model)

    assert list(model.parameters()) == []
    assert model.state_dict() == {}
    assert repr(model[0]) == "PackedLinear(in_features=8, out_features=8)"


def test_subclasses_of_linear_stay() -> None:
    model = nn.Sequential(DoubledLinear(8, 8), nn.Linear(8, 8))

    assert pack_linears(model) == 1
    assert type(model[0]) is DoubledLinear


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=dtype))

    assert not can_pack(CPU, dtype)
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear


def test_nothing_is_packed_off_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))

    assert pack_linears(model) == 0
