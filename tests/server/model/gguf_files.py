"""Writes tiny models as GGUF files, so that conversion has an exact original to compare with."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import CHAT_TEMPLATE, MAX_MODEL_LEN, save_tiny_model

_LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SPECIAL_IDS = {0, 1, 2}


def save_tiny_gguf(original: Path, gguf: Path, without: Collection[str] = ()) -> Path:
    """Save a tiny Llama as a checkpoint in `original` and as a float32 GGUF file.

    The file lacks the tensors named in `without`.

    Returns:
        The path `gguf`.
    """
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", original))
    config = model.config
    writer = GGUFWriter(gguf, "llama")
    writer.add_name("tiny")
    writer.add_context_length(MAX_MODEL_LEN)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, original)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        gguf_name = _gguf_name(name)
        if gguf_name is not None and gguf_name not in without:
            num_heads = heads.get(gguf_name.split(".")[-2])
            writer.add_tensor(gguf_name, _permuted(weight.numpy(), num_heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf


def _add_tokenizer(writer: GGUFWriter, original: Path) -> None:
    rust = AutoTokenizer.from_pretrained(original).backend_tokenizer
    vocab = rust.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [
        TokenType.CONTROL if index in _SPECIAL_IDS else TokenType.NORMAL
        for index in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(_merges(rust.to_str()))
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(tokenizer_json: str) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer_json)["model"]["merges"]]


def _gguf_name(name: str) -> str | None:
    if name == "lm_head.weight":
        return None  # Tied to the embedding.
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")
    layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_LAYER_TENSORS[module]}.weight"


def _permuted(
    weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]], num_heads: int | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """GGUF interleaves the two halves of the rotated channels of queries and keys."""
    if num_heads is None:
        return weight
    split = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))
