"""What a model calls its decoder layers with, and which of them compute the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.cpu.layer_calls import NUM_TOKENS, CallForm, ModuleCall, record_calls
from server.errors import CompilationError
from tests.support.engine_tools import tiny_loaded, tiny_reference
from tests.support.tiny_models import TinyKind


def own_model() -> PreTrainedModel:
    """A model that may be changed."""
    return copy.deepcopy(tiny_reference("llama"))


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def calls_of(kind: TinyKind) -> list[ModuleCall]:
    model = tiny_loaded(kind).model
    return record_calls(model, list(layers_of(model)))


class TestRecordCalls:
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mixtral"])
    def test_each_layer_is_noted_with_its_index(self, kind: TinyKind) -> None:
        calls = calls_of(kind)
        assert [call.layer for call in calls] == list(range(len(calls)))
        assert all(call.inputs[0].shape[1] == NUM_TOKENS for call in calls)

    def test_the_output_of_a_layer_is_the_input_of_the_next(self) -> None:
        first, second = calls_of("llama")[:2]
        assert torch.equal(first.output, second.inputs[0])

    @pytest.mark.parametrize("kind", ["llama", "gemma3"])
    def test_a_call_can_be_made_again(self, kind: TinyKind) -> None:
        model = tiny_loaded(kind).model
        unembedding = model.get_output_embeddings()
        call = record_calls(model, [*layers_of(model), unembedding])[-1]
        assert call.layer is None
        assert torch.equal(call.compute(call.inputs, call.tensors), call.output)

    def test_the_first_token_is_cut_out_of_inputs_and_output(self) -> None:
        call = calls_of("llama")[0]
        inputs, output = call.first_token()
        assert [x.shape[1] for x in inputs] == [1] * len(inputs)
        assert torch.equal(output, call.output[:, :1])

    def test_modules_that_are_not_called_in_order_are_refused(self) -> None:
        model = tiny_loaded("llama").model
        with pytest.raises(CompilationError, match="called in order"):
            record_calls(model, list(layers_of(model))[::-1])

    def test_a_module_of_two_inputs_is_refused(self) -> None:
        class Pair(nn.Module):
            def forward(self, hidden: Tensor, other: Tensor) -> Tensor:
                return hidden + other

        class Wrapper(nn.Module):
            def __init__(self, layer: nn.Module) -> None:
                super().__init__()
                self.layer, self.pair = layer, Pair()

            def forward(self, hidden: Tensor, **keywords: object) -> Any:
                output = self.layer(hidden, **keywords)
                return self.pair(output, output)

        model = own_model()
        wrapper = Wrapper(layers_of(model)[0])
        layers_of(model)[0] = wrapper
        with pytest.raises(CompilationError, match="Pair does not map one tensor to one"):
            record_calls(model, [wrapper.pair])


class TestSignature:
    def test_is_the_same_for_layers_that_differ_in_their_weights(self) -> None:
        first, second = calls_of("llama")[:2]
        assert first.signature == second.signature

    def test_tells_layers_with_a_window_from_others(self) -> None:
        signatures = [call.signature for call in calls_of("gemma3")]
        assert any(signature != signatures[0] for signature in signatures)

    def test_tells_attributes_and_shapes(self) -> None:
        model = own_model()
        norm = layers_of(model)[1].get_submodule("input_layernorm")
        norm.variance_epsilon = 0.5  # type: ignore[assignment]
        first, second = record_calls(model, list(layers_of(model)))[:2]
        assert first.signature != second.signature


class TestCallForm:
    FORM = CallForm((("cos_sin", 2), ("ids", None)), (("mask", None), ("cached", False)))

    def keywords(self) -> dict[str, object]:
        rows = torch.zeros(3)
        return {"cos_sin": (rows + 1, rows + 2), "ids": rows + 3, "mask": None, "cached": False}

    def test_tensors_are_listed_and_put_back(self) -> None:
        hidden = torch.zeros(2)
        inputs = self.FORM.flatten(hidden, self.keywords())
        assert inputs is not None
        assert [float(x[0]) for x in inputs] == [0.0, 1.0, 2.0, 3.0]
        keywords = self.FORM.keywords(inputs)
        assert keywords.keys() == self.keywords().keys()
        assert torch.equal(keywords["cos_sin"][1], inputs[2])
        assert (keywords["mask"], keywords["cached"]) == (None, False)

    @pytest.mark.parametrize(
        "change",
        [
            {"mask": torch.zeros(1)},
            {"cached": True},
            {"ids": None},
            {"cos_sin": (torch.zeros(3),)},
            {"cos_sin": torch.zeros(3)},
            {"more": None},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_a_call_of_another_form_is_none(self, change: dict[str, object]) -> None:
        assert self.FORM.flatten(torch.zeros(2), self.keywords() | change) is None

    def test_a_missing_keyword_makes_another_form(self) -> None:
        keywords = self.keywords()
        del keywords["mask"]
        assert self.FORM.flatten(torch.zeros(2), keywords) is None
