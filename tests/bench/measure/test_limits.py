import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.measure.limits import WeightTraffic, distinct_bytes, read_speed, weight_bytes
from tests.support.tiny_models import TinyKind, tiny_config


def tiny_model(kind: TinyKind) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        tiny_config(kind), dtype=torch.float32
    )
    return model


def test_a_tied_unembedding_is_read_once() -> None:
    model = tiny_model("llama")
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


def test_an_untied_input_embedding_is_not_read() -> None:
    model = tiny_model("qwen2")
    lookup = model.get_input_embeddings().weight
    assert isinstance(lookup, torch.Tensor)
    every = 4 * sum(p.numel() for p in model.parameters())
    assert weight_bytes(model) == every - 4 * lookup.numel()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_int8_weights_have_a_byte_each(kind: TinyKind) -> None:
    model = tiny_model(kind)
    num_saved = 3 * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert weight_bytes(model, "int8") == weight_bytes(model) - num_saved


def test_shared_tensors_count_once_and_by_their_type() -> None:
    weight = torch.zeros(3, 5)
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert distinct_bytes([weight, weight, half]) == 64


def test_memory_is_read_at_a_possible_speed() -> None:
    assert 0.1 < read_speed(torch.device("cpu"), num_bytes=16 << 20) < 10_000


def test_traffic_is_compared_with_the_memorys_speed() -> None:
    described = WeightTraffic(100, 20.0, 15.0, 5.0).describe()
    assert described["plain_share"] == pytest.approx(0.75)
    assert described["memory_gb_per_s"] == 20.0
