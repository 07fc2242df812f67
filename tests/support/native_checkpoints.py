"""Tiny checkpoints that ship an MTP layer of their own, and what such a layer computes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GemmaConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.support.tiny_models import VOCAB_SIZE, tiny_tokenizer

NativeName = Literal[
    "glm4_moe", "glm4_moe_lite", "deepseek_v3", "qwen3", "qwen3_moe", "gemma", "qwen2"
]
NATIVE_NAMES: tuple[NativeName, ...] = get_args(NativeName)
NUM_LAYERS, WIDTH = 3, 32
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class NativeKind:
    """A base and the names under which its checkpoint keeps the MTP layer."""

    config: PreTrainedConfig
    layout: str
    prefix: str
    block_prefix: str
    hidden_norm: str
    embedding_norm: str
    projection: str
    final_norm: str
    is_hidden_first: bool = False
    norm_offset: float = 0.0


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
# Keys are as wide as values, so the paged attention can serve it.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_BEHIND = f"model.layers.{NUM_LAYERS}."
_DEEPSEEK = ("DeepSeek-V3", _BEHIND, _BEHIND, "hnorm", "enorm", "eh_proj", "shared_head.norm")
_QWEN = (
    "Qwen3-Next",
    "mtp.",
    "mtp.layers.0.",
    "pre_fc_norm_hidden",
    "pre_fc_norm_embedding",
    "fc",
    "norm",
)
_MIMO = (
    "MiMo",
    "model.mtp_layers.0.",
    "model.mtp_layers.0.",
    "hidden_layernorm",
    "token_layernorm",
    "input_proj",
    "final_layernorm",
)


def native_kind(name: NativeName) -> NativeKind:
    """A base's configuration and the layout of its MTP layer."""
    config: PreTrainedConfig
    match name:
        case "glm4_moe":
            config = Glm4MoeConfig(
                **_SIZES, **_EXPERTS, n_routed_experts=4, first_k_dense_replace=1, use_qk_norm=True
            )
            return NativeKind(config, *_DEEPSEEK)
        case "glm4_moe_lite":
            config = Glm4MoeLiteConfig(**_SIZES | _EXPERTS | _LATENT, n_routed_experts=4)
            return NativeKind(config, *_DEEPSEEK)
        case "deepseek_v3":
            config = DeepseekV3Config(
                **_SIZES | _EXPERTS | _LATENT,
                n_routed_experts=4,
                n_group=2,
                topk_group=2,
                first_k_dense_replace=1,
            )
            return NativeKind(config, *_DEEPSEEK)
        case "qwen3":
            return NativeKind(Qwen3Config(**_SIZES), *_QWEN)
        case "qwen3_moe":
            return NativeKind(Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=4), *_QWEN)
        case "gemma":
            return NativeKind(GemmaConfig(**_SIZES), *_QWEN, norm_offset=1.0)
        case "qwen2":
            return NativeKind(Qwen2Config(**_SIZES), *_MIMO, is_hidden_first=True)


@dataclass(frozen=True)
class NativeCheckpoint:
    """A saved checkpoint, and the parts of its MTP layer."""

    kind: NativeKind
    directory: Path
    tensors: dict[str, Tensor]
    donor: PreTrainedModel

    def part(self, name: str) -> Tensor:
        return self.tensors[f"{self.kind.prefix}{getattr(self.kind, name)}.weight"]

    def saved(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.directory / WEIGHTS_FILE)

    def rewrite(self, changed: dict[str, Tensor], without: str = "") -> None:
        """Save the weights again, with other tensors and without one."""
        tensors = self.saved() | changed
        tensors.pop(without, None)
        path = self.directory / WEIGHTS_FILE
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    def shard(self) -> None:
        """Save each tensor in a file of its own, with an index."""
        files = {}
        for index, (name, tensor) in enumerate(self.saved().items()):
            files[name] = f"part-{index}.safetensors"
            safetensors.torch.save_file(
                {name: tensor}, self.directory / files[name], metadata={"format": "pt"}
            )
        (self.directory / WEIGHTS_FILE).unlink()
        index_text = json.dumps({"metadata": {}, "weight_map": files})
        (self.directory / "model.safetensors.index.json").write_text(index_text)


def save_native(name: NativeName, directory: Path) -> NativeCheckpoint:
    """Write a base with an MTP layer, whose block is the last one of another random model."""
    kind = native_kind(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(kind.config, dtype=torch.float32)
        donor = AutoModelForCausalLM.from_config(kind.config, dtype=torch.float32)
        for part in (base, donor):
            for weight_name, weight in part.state_dict().items():
                if "norm" in weight_name or "bias" in weight_name:
                    nn.init.uniform_(weight, 0.5, 1.5)
        own = {
            name: torch.rand(WIDTH) + 0.5 - kind.norm_offset
            for name in (kind.hidden_norm, kind.embedding_norm, kind.final_norm)
        } | {kind.projection: torch.randn(WIDTH, 2 * WIDTH) * 0.3}
    base.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    donor.save_pretrained(directory / "donor")
    last = f"model.layers.{NUM_LAYERS - 1}."
    saved = safetensors.torch.load_file(directory / "donor" / WEIGHTS_FILE)
    tensors = {
        kind.block_prefix + weight.removeprefix(last): tensor
        for weight, tensor in saved.items()
        if weight.startswith(last)
    } | {f"{kind.prefix}{name}.weight": tensor for name, tensor in own.items()}
    made = NativeCheckpoint(kind, directory, tensors, donor)
    made.rewrite(tensors)
    return made


def reference_states(native: NativeCheckpoint, hidden_XD: Tensor, ids_X: Tensor) -> Tensor:
    """What the MTP layer makes of tokens and the states before them, as published.

    Both are of the same length; token i sits at position i + 1.
    """
    kind, config = native.kind, native.kind.config

    def normed(x: Tensor, name: str) -> Tensor:
        scale = native.part(name) + kind.norm_offset
        mean: Tensor = x.square().mean(1, keepdim=True)
        return x / (mean + float(config.rms_norm_eps)).sqrt() * scale

    weights = native.saved()
    embedded_XD = weights["model.embed_tokens.weight"][ids_X]
    halves = [normed(embedded_XD, "embedding_norm"), normed(hidden_XD, "hidden_norm")]
    if kind.is_hidden_first:
        halves.reverse()
    u_XD = torch.cat(halves, 1) @ native.part("projection").T
    donor: Any = native.donor
    donor.set_attn_implementation("eager")
    positions = torch.arange(1, len(ids_X) + 1)[None]
    mask = torch.full((len(ids_X), len(ids_X)), -torch.inf).triu(1)[None, None]
    output = donor.base_model.layers[-1](
        u_XD[None],
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=donor.base_model.rotary_emb(u_XD[None], position_ids=positions),
    )
    output_1XD: Tensor = output[0] if isinstance(output, tuple) else output
    return normed(output_1XD.view_as(u_XD), "final_norm")


def random_ids(count: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(3))
