from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from bench.errors import BenchError
from bench.measure.reference import ReferenceModel
from server.config import SamplingParams
from server.core.request import Request
from server.cpu.packed_linear import PackedLinear
from server.engine.engine import Engine

PROMPT = (1, 40, 50, 60)


@pytest.fixture(scope="module")
def reference(engine: Engine) -> ReferenceModel:
    return ReferenceModel(engine.loaded)


def test_the_reference_is_plain_transformers(reference: ReferenceModel) -> None:
    assert not any(isinstance(module, PackedLinear) for module in reference.model.modules())
    assert reference.model.config._attn_implementation == "sdpa"
    assert not reference.model.training


def test_generate_takes_the_argmax_of_the_next_logits(reference: ReferenceModel) -> None:
    timing, token_ids = reference.generate(PROMPT, 6)
    assert timing.num_tokens == len(token_ids) == 6
    assert 0.0 < timing.first_token_s < timing.request_s
    for index, token in enumerate(token_ids):
        assert token == int(reference.next_logits(PROMPT + token_ids[:index]).argmax())


def test_generate_equals_the_engine(reference: ReferenceModel, engine: Engine) -> None:
    request = Request("r", PROMPT, SamplingParams(max_tokens=24, temperature=0.0))
    assert reference.generate(PROMPT, 24)[1] == engine.generate([request])[0].token_ids


def test_prompt_lookup_changes_no_output(reference: ReferenceModel) -> None:
    prompt = PROMPT + PROMPT
    timing, token_ids = reference.generate(prompt, 24, num_lookup_tokens=5)
    assert token_ids == reference.generate(prompt, 24)[1]
    assert 0.0 < timing.first_token_s < timing.request_s


def test_generate_stops_after_an_end_token(engine: Engine) -> None:
    reference = ReferenceModel(engine.loaded)
    _, token_ids = reference.generate(PROMPT, 6)
    reference.model.generation_config = GenerationConfig(eos_token_id=token_ids[2], pad_token_id=0)
    assert reference.generate(PROMPT, 6)[1] == token_ids[: token_ids.index(token_ids[2]) + 1]


def test_the_models_own_generation_options_are_not_used(reference: ReferenceModel) -> None:
    config = reference.model.generation_config
    assert config is not None
    assert (config.do_sample, config.num_beams) == (False, 1)
    assert config.repetition_penalty in (None, 1.0)
    assert config.eos_token_id == [2]


def test_next_logits_are_float32_at_any_length(reference: ReferenceModel) -> None:
    logits_V = reference.next_logits(PROMPT)
    assert logits_V.shape == (320,)
    assert logits_V.dtype == torch.float32


def test_a_model_with_an_adapter_has_no_plain_counterpart(engine: Engine) -> None:
    with pytest.raises(BenchError, match="give heads without one"):
        ReferenceModel(replace(engine.loaded, adapter_sha256="ab"))
