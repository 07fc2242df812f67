"""Loads a base model with `transformers`, ready for the engine.

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
from server.cpu.int8_kernel import Int8Kernel
from server.cpu.int8_linear import can_quantize, quantize_linears
from server.cpu.packed_linear import pack_linears
from server.errors import ConfigError, ModelError
from server.model.adapter import merge_adapter_of
from server.model.progress import quiet_transformers
from server.model.source import resolve_model
from server.model.support import check_config, probe_model
from server.model.weights import LOAD_ERRORS, load_weights
from server.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A base model in eval mode and what the engine must know about it.

    Attributes:
        name: As it was asked for.
        model: Without gradients; on CPU with packed linear layers unless it was loaded unpacked.
        max_model_len: Longest sequence that the model's positions allow.
        vocab_size: Rows of the unembedding, at least as many as the tokenizer has tokens.
        num_kv_heads: Key/value heads of every layer.
        head_dim: Channels of a head's keys and values.
        fingerprint: Tells this base model from others; without the adapter.
        adapter_sha256: Digest of the LoRA adapter that is merged in; None if none is.
        quantization: What was done to the weights of the linear layers: `none` or `int8`.
        has_int8_kernel: Whether our own kernel computes them then, and not oneDNN.
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
    quantization: str
    has_int8_kernel: bool
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
        """Move a model that was loaded unpacked; this value is not to be used any more."""
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
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    heads: Path | None = None,
    is_packed: bool = True,
    quantization: str = "none",
    int8_kernel: Int8Kernel | None = None,
) -> LoadedModel:
    """Load a base model.

    Args:
        name: The built-in `smollm2`, a `.gguf` file, a local directory or a hub id.
        device: `cpu`, `cuda` or `auto`, which takes CUDA if there is a device.
        dtype: `float32`, `bfloat16`, `float16` or `auto`: float32 on CPU, bfloat16 on CUDA.
        heads: A heads checkpoint; if it carries an adapter, that is merged into the weights.
        is_packed: Whether linear layers may be replaced by faster ones without autograd.
        quantization: `int8` replaces them by ones with int8 weights, packed or not; `none` does
            not.
        int8_kernel: Computes layers with int8 weights; None leaves that to oneDNN.

    Raises:
        ConfigError: If there is no such device, dtype or quantization, these do not go together,
            or the adapter cannot be merged.
        HeadsMismatchError: If the heads belong to another base model.
        ModelError: If the model cannot be found or read, or is of an unsupported kind.
    """
    on = _device(device)
    weight_dtype = _dtype(dtype, on)
    _check_quantization(quantization, on, weight_dtype)
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
    if quantization == "int8":
        quantize_linears(model, int8_kernel)
    elif is_packed:
        pack_linears(model)
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
        quantization=quantization,
        has_int8_kernel=quantization == "int8" and int8_kernel is not None,
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; give 'auto', 'cpu' or 'cuda'") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device is {name!r}, which is not supported; give 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no CUDA device; give 'cpu'")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name!r}; give 'auto' or one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def _check_quantization(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if name == "none":
        return
    if name != "int8":
        raise ConfigError(f"quantization is {name!r}; give 'none' or 'int8'")
    if device.type != "cpu" or dtype != torch.float32:
        raise ConfigError(
            f"quantization is 'int8' with {str(dtype).removeprefix('torch.')} on {device.type}, "
            "but it is for float32 on cpu; give device 'cpu' with dtype 'float32', or quantization "
            "'none'"
        )
    if not can_quantize():
        raise ConfigError(
            "quantization is 'int8', but this build of torch has no int8 product for this CPU; "
            "give 'none'"
        )


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
