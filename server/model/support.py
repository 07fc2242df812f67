"""Which base models the engine can serve, and refusals that name what is missing.

A tree of drafts needs a model whose layers all attend through the attention interface and keep
no other state: a recurrent state cannot branch. What the configuration does not say is probed
by a forward pass whose attention only takes notes.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from server.attention.hook import UNSUPPORTED_KEYWORDS
from server.errors import ModelError

_PROBE_NAME = "euryale_probe"
_PROBE_LEN = 2
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_RECURRENT_LAYER_TYPES = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"}
_FORWARD_KEYWORDS = ("input_ids", "position_ids", "logits_to_keep")


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values look like; alike in all layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def check_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model by its configuration, before any weight is read.

    Raises:
        ModelError: Names the model and the feature that is not supported.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model; give a decoder-only one")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} is a quantised checkpoint, which is not supported; give the unquantised "
            "model, or a GGUF file of it"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} ({config.model_type}) is no causal language model")
    layer_types = set(getattr(text, "layer_types", None) or ())
    model_class = _model_class(config)
    if model_class._is_stateful or layer_types & _RECURRENT_LAYER_TYPES:
        raise ModelError(
            f"{name} ({config.model_type}) is a hybrid/recurrent model, whose state cannot branch "
            "into a draft tree; give an attention-only model"
        )
    if layer_types - _LAYER_TYPES:
        raise ModelError(
            f"{name} has layers of the types {sorted(layer_types - _LAYER_TYPES)}; only "
            f"{sorted(_LAYER_TYPES)} are supported"
        )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ModelError(
            f"{name} caps its attention logits (attn_logit_softcapping), which the paged "
            "attention does not compute; give a model without it"
        )
    if not model_class._supports_attention_backend:
        raise ModelError(
            f"{model_class.__name__} ({name}) takes no attention implementation from outside; "
            "give a model of another architecture"
        )
    keywords = inspect.signature(model_class.forward).parameters
    missing = [keyword for keyword in _FORWARD_KEYWORDS if keyword not in keywords]
    if missing:
        raise ModelError(f"{model_class.__name__}.forward of {name} takes no {missing}")


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    # transformers annotates the values of this mapping as pairs; they are classes.
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@dataclass(slots=True)
class _Probe:
    """What the layers asked of the attention function, in order."""

    layers: list[int] = field(default_factory=list)
    shapes: set[tuple[int, int, int]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    windows: dict[int, int | None] = field(default_factory=dict)


def probe_model(name: str, model: PreTrainedModel) -> KVShape:
    """Run two tokens through the model and look at what its attention layers ask for.

    The attention implementation of the model is the same afterwards as before.

    Raises:
        ModelError: If the paged attention could not compute what they ask for.
    """
    AttentionInterface.register(_PROBE_NAME, _probing_attention)
    AttentionMaskInterface.register(_PROBE_NAME, _no_mask)
    usual = model.config._attn_implementation
    model.set_attn_implementation(_PROBE_NAME)
    probe = _Probe()
    ids = torch.zeros(1, _PROBE_LEN, dtype=torch.long, device=model.device)
    positions = torch.arange(_PROBE_LEN, device=model.device).unsqueeze(0)
    try:
        with torch.inference_mode():
            model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=positions[0],
                attention_probe=probe,
            )
    except (TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{type(model).__name__} ({name}) does not run as the engine runs models: {error}"
        ) from error
    finally:
        model.set_attn_implementation(usual)
    return _verdict(name, model, probe)


def _probing_attention(
    module: nn.Module,
    query_BHTC: Tensor,
    key_BGTC: Tensor,
    value_BGTC: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    attention_probe: _Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_probe is None:
        raise ValueError("its layers do not get the keywords of its forward")
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module types attributes as tensors
    attention_probe.layers.append(layer)
    attention_probe.windows[layer] = sliding_window
    attention_probe.shapes.add((key_BGTC.shape[1], key_BGTC.shape[3], value_BGTC.shape[3]))
    used = [keyword for keyword in UNSUPPORTED_KEYWORDS if kwargs.get(keyword) is not None]
    attention_probe.problems += [f"layer {layer} uses {keyword}" for keyword in used]
    if attention_mask is not None:
        attention_probe.problems.append(f"layer {layer} brings an attention mask of its own")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        attention_probe.problems.append(f"layer {layer} attends to later tokens")
    output_BTHC = query_BHTC.new_zeros(*query_BHTC.shape[:-1], value_BGTC.shape[3])
    return output_BTHC.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The probe computes no scores, so there is nothing to mask."""


def _verdict(name: str, model: PreTrainedModel, probe: _Probe) -> KVShape:
    text = model.config.get_text_config(decoder=True)
    problems = probe.problems
    if probe.layers != list(range(text.num_hidden_layers)):
        problems.append(
            f"of its {text.num_hidden_layers} layers, {probe.layers} attend, where each must once"
        )
    for layer, layer_type in enumerate(getattr(text, "layer_types", None) or ()):
        if layer_type == "sliding_attention" and probe.windows.get(layer, 1) is None:
            problems.append(f"sliding layer {layer} does not pass its window on")
    if len(probe.shapes) > 1 or any(key != value for _, key, value in probe.shapes):
        problems.append(
            f"keys and values have the shapes {sorted(probe.shapes)} (heads, key channels, value "
            "channels), where one shape is supported"
        )
    if problems:
        raise ModelError(
            f"{name} ({model.config.model_type}) cannot be served: {'; '.join(problems)}"
        )
    (shape,) = probe.shapes
    return KVShape(text.num_hidden_layers, shape[0], shape[1])
