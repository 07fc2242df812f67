"""Our attention as an implementation that transformers calls."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.attention.backend import AttentionBackend
from server.attention.hook import ATTENTION_NAME, AttentionContext, install_attention
from server.errors import ModelError
from tests.support.engine_tools import tiny_loaded, tiny_reference


class Recorder(AttentionBackend):
    """A backend that notes what it was asked and returns the queries."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, int | None]] = []

    def prepare(self, batch: object) -> None:
        """Nothing is shared by the layers."""

    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: object,
    ) -> Tensor:
        assert metadata == "the step"
        assert queries_HTC.shape[1:] == keys_HTC.shape[1:] == values_HTC.shape[1:]
        self.calls.append((layer, scaling, sliding_window))
        return queries_HTC.transpose(0, 1).contiguous()


class Layer(nn.Module):
    layer_idx = 5


def attend(**keywords: object) -> object:
    function = AttentionInterface()[ATTENTION_NAME]
    states = torch.zeros(1, 2, 3, 16)
    return function(Layer(), states, states, states, None, **keywords)


@pytest.fixture(autouse=True)
def _installed() -> None:
    install_attention(tiny_loaded("mistral").model)


class TestAttentionHook:
    def test_every_layer_asks_the_backend_of_this_forward_pass(self) -> None:
        recorder, model = Recorder(), tiny_loaded("gemma3").model
        install_attention(model)
        with torch.inference_mode():
            model(
                input_ids=torch.tensor([[3, 4, 5]]),
                position_ids=torch.tensor([[0, 1, 1]]),
                use_cache=False,
                attention_context=AttentionContext(recorder, "the step"),
            )
        assert [layer for layer, _, _ in recorder.calls] == [0, 1, 2]
        assert [window for _, _, window in recorder.calls] == [12, None, 12]
        assert {scaling for _, scaling, _ in recorder.calls} == {8**-0.5}

    def test_the_output_keeps_the_batch_dimension(self) -> None:
        output = attend(attention_context=AttentionContext(Recorder(), "the step"))
        assert isinstance(output, tuple)
        assert output[0].shape == (1, 3, 2, 16)
        assert output[1] is None

    def test_scaling_defaults_to_the_square_root_of_the_head(self) -> None:
        recorder = Recorder()
        attend(attention_context=AttentionContext(recorder, "the step"), sliding_window=7)
        assert recorder.calls == [(5, 0.25, 7)]

    def test_outside_the_engine_it_refuses_to_run(self) -> None:
        with pytest.raises(ModelError, match="only runs inside the engine"):
            attend()

    @pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "alibi"])
    def test_what_would_change_the_result_is_refused_rather_than_ignored(self, name: str) -> None:
        context = AttentionContext(Recorder(), "the step")
        with pytest.raises(ModelError, match=f"Layer uses {name}"):
            attend(attention_context=context, **{name: 30.0})

    def test_a_model_that_was_not_handed_over_is_left_alone(self) -> None:
        with torch.inference_mode():
            output = tiny_reference("mistral")(torch.tensor([[3, 4, 5]]))
        assert output.logits.isfinite().all()
