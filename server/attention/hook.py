"""Our paged tree attention as a `transformers` attention implementation.

`transformers` calls it for every layer and passes on unknown keywords of the model's forward, so
the step's context travels as one keyword and no modelling code is copied. In an exported graph
attention is one operator that no compiler looks into: `euryale::attend`, which calls the backend
that `attending` names, or one that a backend brings (`define_operator`) and `exporting_with` picks.

NOTE: An operator takes tensors and numbers only, so the rest reaches it by context variables.

Shapes: T flat tokens, H attention heads, G KV heads, C channels per head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
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


@dataclass(frozen=True, slots=True)
class _LayerCall:
    context: AttentionContext
    layer: int

    def attend(
        self,
        query_1HTC: Tensor,
        key_1GTC: Tensor,
        value_1GTC: Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        output_THC = self.context.backend.forward(
            query_1HTC[0],
            key_1GTC[0],
            value_1GTC[0],
            self.layer,
            scaling,
            sliding_window,
            self.context.metadata,
        )
        return output_THC.unsqueeze(0)


_layer_call: ContextVar[_LayerCall] = ContextVar("_layer_call")
_PYTHON_OPERATOR = "euryale::attend"
_exported_operator: ContextVar[str] = ContextVar("_exported_operator", default=_PYTHON_OPERATOR)
_SCHEMA = "(Tensor query, Tensor key, Tensor value, float scaling, int window) -> Tensor"
_NO_WINDOW = -1


def define_operator(name: str) -> None:
    """Define an attention operator that stands in exported graphs; it has no implementation yet.

    Its arguments are queries, keys and values `[1, heads, T, C]`, the factor on the scores, and the
    sliding window, -1 for none; its result is `[1, T, H, C]`.

    Args:
        name: With its namespace, like `euryale::attend`; each can be defined once per process.
    """
    torch.library.define(name, _SCHEMA)
    torch.library.register_fake(name, _attended_shape)


def _attended_shape(
    query_1HTC: Tensor, key_1GTC: Tensor, value_1GTC: Tensor, scaling: float, window: int
) -> Tensor:
    _, num_heads, num_tokens, num_channels = query_1HTC.shape
    return query_1HTC.new_empty(1, num_tokens, num_heads, num_channels)


def operator_overload(name: str) -> Any:
    """Find a defined operator, as torch's compiler knows it."""
    namespace, _, operator = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operator).default


@contextmanager
def attending(context: AttentionContext, layer: int) -> Iterator[None]:
    """Let the attention of an exported graph that runs inside attend as this layer."""
    token = _layer_call.set(_LayerCall(context, layer))
    try:
        yield
    finally:
        _layer_call.reset(token)


@contextmanager
def exporting_with(operator: str | None) -> Iterator[None]:
    """Let graphs that are exported inside attend by a backend's operator; None takes Python's."""
    token = _exported_operator.set(operator or _PYTHON_OPERATOR)
    try:
        yield
    finally:
        _exported_operator.reset(token)


def _attend(
    query_1HTC: Tensor, key_1GTC: Tensor, value_1GTC: Tensor, scaling: float, window: int
) -> Tensor:
    call = _layer_call.get()
    sliding_window = None if window == _NO_WINDOW else window
    return call.attend(query_1HTC, key_1GTC, value_1GTC, scaling, sliding_window)


define_operator(_PYTHON_OPERATOR)
torch.library.impl(_PYTHON_OPERATOR, "CPU", _attend)


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
    is_exporting = torch.compiler.is_exporting()
    if attention_context is None and not is_exporting:
        raise ModelError("the attention implementation 'euryale' only runs inside the engine")
    for name in UNSUPPORTED_KEYWORDS:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} uses {name}, which the paged attention does not support; "
                "serve a model without it"
            )
    factor = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_context is None:
        window = _NO_WINDOW if sliding_window is None else sliding_window
        operator = operator_overload(_exported_operator.get())
        # Machine code reads heads and tokens in any order, but the channels of one in a row.
        rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return operator(*rows, factor, window), None
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module types attributes as tensors
    call = _LayerCall(attention_context, layer)
    return call.attend(query, key, value, factor, sliding_window), None


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
