"""Our paged tree attention as a `transformers` attention implementation.

`transformers` calls it for every layer and passes on unknown keywords of the model's forward, so
the step's context travels as one keyword and no model code of ours exists.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from server.attention.backend import AttentionBackend
from server.errors import ModelError

ATTENTION_NAME = "euryale"
# Keywords that change the result and that the backends do not compute.
UNSUPPORTED_KEYWORDS = ("softcap", "s_aux", "position_bias", "alibi")


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the layers of one forward pass need: the backend and its metadata of the step."""

    backend: AttentionBackend
    metadata: Any


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_context is None:
        raise ModelError("the attention implementation 'euryale' only runs inside the engine")
    for name in UNSUPPORTED_KEYWORDS:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} uses {name}, which the paged attention does not support; "
                "serve a model without it"
            )
    output_THC = attention_context.backend.forward(
        query[0],
        key[0],
        value[0],
        int(module.layer_idx),  # type: ignore[arg-type]  # nn.Module types attributes as tensors
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        sliding_window,
        attention_context.metadata,
    )
    return output_THC.unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The backend masks by itself."""


def register_attention() -> None:
    """Make the name known to `transformers`; may be called again."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def install_attention(model: PreTrainedModel) -> None:
    """Make the model attend through the context that its forward gets as `attention_context`."""
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
