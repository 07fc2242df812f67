"""Loads a base model with `transformers`; it computes as `transformers` wrote it.

Shape suffixes: V vocabulary, D model width.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from heads.checkpoint import BaseFingerprint
from server.device.create import create_device
from server.errors import ModelError
from server.model.adapter import merge_adapter_of
from server.model.progress import quiet_transformers
from server.model.source import resolve_model
from server.model.support import check_config, probe_model
from server.model.weights import LOAD_ERRORS, load_weights
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A base model in eval mode and what the engine must know about it.

    Attributes:
        name: The name that `load_model` got.
        model: Without gradients.
        max_model_len: Longest sequence that the model's positions allow.
        vocab_size: Rows of the unembedding, at least as many as the tokenizer has tokens.
        num_kv_heads: Key/value heads of every layer.
        head_dim: Channels of a head's keys and values.
        fingerprint: Tells this base model, as it is without an adapter, from others.
        adapter_sha256: Digest of the LoRA adapter that is merged in; None if none is.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    fingerprint: BaseFingerprint
    adapter_sha256: str | None
    _unembedding_VD: Tensor = field(repr=False)
    _input_embedding_VD: Tensor = field(repr=False)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return self.tokenizer.eos_token_ids

    def unembedding(self) -> Tensor:
        """The plain unembedding `[V, D]`, not a copy."""
        return self._unembedding_VD

    def input_embedding(self) -> Tensor:
        """The plain input embedding `[V, D]`, not a copy; the same tensor if they are tied."""
        return self._input_embedding_VD

    def moved(self, device: torch.device) -> Self:
        """Move a model that no device has accelerated; this value is not to be used any more."""
        # Past what transformers wraps around it, whose type is another.
        nn.Module.to(self.model, device)
        unembedding_VD, input_embedding_VD = _embeddings(self.model)
        return replace(
            self,
            device=device,
            _unembedding_VD=unembedding_VD,
            _input_embedding_VD=input_embedding_VD,
        )


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", heads: Path | None = None
) -> LoadedModel:
    """Load a base model.

    Args:
        name: The built-in `smollm2`, a `.gguf` file, a local directory or a hub id.
        device: `cpu`, `cuda` or `auto`, which takes CUDA if there is a device.
        dtype: `float32`, `bfloat16`, `float16` or `auto`: float32 on CPU, bfloat16 on CUDA.
        heads: A heads checkpoint; if it carries an adapter, that is merged into the weights.

    Raises:
        ConfigError: If there is no such device or dtype, or the adapter cannot be merged.
        HeadsMismatchError: If the heads belong to another base model.
        ModelError: If the model cannot be found or read, or is of an unsupported kind.
    """
    chosen = create_device(device)
    on, weight_dtype = chosen.torch_device, chosen.dtype(dtype)
    source = resolve_model(name)
    with quiet_transformers():
        config = _config(name, source)
        check_config(name, config)
        model = load_weights(name, source, config=config, dtype=weight_dtype, device_map={"": on})
        tokenizer = _tokenizer(name, source, model)
    model.eval()
    model.requires_grad_(False)
    text = config.get_text_config(decoder=True)
    unembedding_VD, input_embedding_VD = _embeddings(model)
    vocab_size, hidden_size = unembedding_VD.shape
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"{name} has a tokenizer of {tokenizer.vocab_size} tokens, but its model only has "
            f"{vocab_size}; the two do not belong together"
        )
    fingerprint = BaseFingerprint.of(
        config.model_type, text.num_hidden_layers, hidden_size, vocab_size, model.named_parameters()
    )
    adapter_sha256 = None if heads is None else merge_adapter_of(heads, model, fingerprint)
    kv_shape = probe_model(name, model)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=on,
        dtype=weight_dtype,
        max_model_len=_max_model_len(name, text),
        hidden_size=hidden_size,
        num_layers=kv_shape.num_layers,
        vocab_size=vocab_size,
        num_kv_heads=kv_shape.num_kv_heads,
        head_dim=kv_shape.head_dim,
        fingerprint=fingerprint,
        adapter_sha256=adapter_sha256,
        _unembedding_VD=unembedding_VD,
        _input_embedding_VD=input_embedding_VD,
    )


def _embeddings(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The plain unembedding and input embedding, not copies."""
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    unembedding_VD, input_embedding_VD = (
        layer.get_parameter("weight").detach() for layer in layers
    )
    return unembedding_VD, input_embedding_VD


def _config(name: str, source: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot read the configuration of the model {name}: {error}; check the name, the "
            "network and that transformers knows the architecture without code from the hub"
        ) from error
    return config


def _tokenizer(name: str, source: str, model: PreTrainedModel) -> Tokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load the tokenizer of the model {name}: {error}; put its tokenizer.json "
            "next to the weights"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{name} has a {type(tokenizer).__name__}, which is no fast tokenizer; put a "
            "tokenizer.json next to the weights"
        )
    ends = model.generation_config.eos_token_id if model.generation_config else None
    eos_token_ids = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return Tokenizer(tokenizer, (end for end in eos_token_ids if end is not None))


def _max_model_len(name: str, text: PreTrainedConfig) -> int:
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise ModelError(f"the configuration of {name} has no max_position_embeddings")
    # NOTE: longrope changes all rotations once any sequence of the batch exceeds the original
    # length, which would not fit the keys already in the cache.
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            limit = min(limit, parameters.get("original_max_position_embeddings", limit))
    return limit
