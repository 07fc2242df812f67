"""Which architectures pass, and that each refusal says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    SmolLM3Config,
    T5Config,
    ViTConfig,
)

from server.errors import ModelError
from server.model.support import KVShape, check_config, probe_model
from tests.support.tiny_models import TINY_KINDS, TinyKind, tiny_config

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT_SIZES: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MLA_SIZES: dict[str, Any] = LLAMA_SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def without(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if key != name}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


REFUSED_CONFIGS: list[tuple[Callable[[], PreTrainedConfig], str]] = [
    (lambda: T5Config(vocab_size=64), "encoder-decoder"),
    (lambda: BartConfig(vocab_size=64), "encoder-decoder"),
    (lambda: ViTConfig(), r"\(vit\) is no causal language model"),
    (lambda: MambaConfig(vocab_size=64), r"\(mamba\) is a hybrid/recurrent model"),
    (lambda: RwkvConfig(vocab_size=64), r"\(rwkv\) is a hybrid/recurrent model"),
    (lambda: JambaConfig(vocab_size=64), r"\(jamba\) is a hybrid/recurrent model"),
    (lambda: FalconH1Config(vocab_size=64), r"\(falcon_h1\) is a hybrid/recurrent model"),
    (lambda: Qwen3NextConfig(vocab_size=64), r"\(qwen3_next\) is a hybrid/recurrent model"),
    (lambda: RecurrentGemmaConfig(), r"\(recurrent_gemma\) is a hybrid/recurrent model"),
    (lambda: MiniMaxConfig(**LLAMA_SIZES), r"\(minimax\) is a hybrid/recurrent model"),
    (
        lambda: Lfm2Config(**LLAMA_SIZES, layer_types=["conv", "full_attention"]),
        r"\(lfm2\) is a hybrid/recurrent model",
    ),
    (lambda: Llama4TextConfig(**LLAMA_SIZES), r"layers of the types \['chunked_attention'\]"),
    (lambda: Gemma2Config(**LLAMA_SIZES, head_dim=8), "attn_logit_softcapping"),
    (lambda: BloomConfig(vocab_size=64), "BloomForCausalLM"),
    (lambda: MptConfig(vocab_size=64), "MptForCausalLM"),
    (
        lambda: LlamaConfig(**LLAMA_SIZES | {"quantization_config": {"quant_method": "gptq"}}),
        "quantised checkpoint",
    ),
]

REFUSED_BY_PROBE: list[tuple[Callable[[], PreTrainedConfig], str]] = [
    (
        lambda: GptOssConfig(**LLAMA_SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "layer 0 uses s_aux",
    ),
    (lambda: DeepseekV3Config(**MLA_SIZES), r"\(4, 16, 8\)"),
    (lambda: DiffLlamaConfig(**LLAMA_SIZES), r"\[0, 0, 1, 1\] attend"),
    (lambda: DogeConfig(**LLAMA_SIZES), "attention mask of its own"),
    (
        lambda: Gemma3TextConfig(**LLAMA_SIZES, head_dim=8, use_bidirectional_attention=True),
        "layer 1 attends to later tokens",
    ),
    (
        lambda: BertConfig(**without(LLAMA_SIZES, "num_key_value_heads")),
        "layer 0 attends to later tokens",
    ),
]

SERVED: list[tuple[Callable[[], PreTrainedConfig], KVShape]] = [
    (lambda: GPT2Config(**GPT_SIZES, n_positions=64), KVShape(2, 4, 8)),
    (
        lambda: OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        KVShape(2, 4, 8),
    ),
    (lambda: Phi3Config(**LLAMA_SIZES), KVShape(2, 2, 8)),
    (lambda: SmolLM3Config(**LLAMA_SIZES), KVShape(2, 2, 8)),
    (lambda: Cohere2Config(**LLAMA_SIZES), KVShape(2, 2, 8)),
    (
        lambda: Qwen3MoeConfig(
            **LLAMA_SIZES
            | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
            | {"moe_intermediate_size": 16}
        ),
        KVShape(2, 2, 16),
    ),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED_CONFIGS)
def test_a_kind_that_cannot_be_served_is_refused_by_its_configuration(
    make: Callable[[], PreTrainedConfig], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        check_config("some/model", make())

    assert "some/model" in str(caught.value)


@pytest.mark.parametrize(("make", "reason"), REFUSED_BY_PROBE)
def test_a_kind_that_cannot_be_served_is_refused_by_what_its_layers_ask_for(
    make: Callable[[], PreTrainedConfig], reason: str
) -> None:
    config = make()
    check_config("some/model", config)

    with pytest.raises(ModelError, match=reason) as caught:
        probe_model("some/model", build(config))

    assert "some/model" in str(caught.value)


@pytest.mark.parametrize(("make", "shape"), SERVED)
def test_attention_only_kinds_are_served(
    make: Callable[[], PreTrainedConfig], shape: KVShape
) -> None:
    config = make()
    check_config("some/model", config)

    assert probe_model("some/model", build(config)) == shape


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_kinds_that_other_tests_use_are_served(kind: TinyKind) -> None:
    config = tiny_config(kind)
    check_config(kind, config)

    assert probe_model(kind, build(config)) == KVShape(3, 2, 8)


def test_a_model_attends_as_before_after_the_probe() -> None:
    model = build(tiny_config("llama"))
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        probe_model("tiny", model)
        after = model(input_ids=ids).logits

    assert torch.equal(before, after)


def test_a_model_attends_as_before_after_a_failed_probe() -> None:
    model = build(DogeConfig(**LLAMA_SIZES))
    usual = model.config._attn_implementation

    with pytest.raises(ModelError):
        probe_model("doge", model)

    assert model.config._attn_implementation == usual


def test_a_layer_that_does_not_attend_is_missed() -> None:
    model = build(LlamaConfig(**LLAMA_SIZES))
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    del layers[1]
    model.config.num_hidden_layers = 2

    with pytest.raises(ModelError, match=r"of its 2 layers, \[0\] attend"):
        probe_model("half", model)
