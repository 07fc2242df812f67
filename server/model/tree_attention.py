"""Paged tree attention in our own machine code: float32 on x86 CPUs with AVX-512.

Where a step goes through Python in every layer, that takes longer than its attention. Compiled
blocks call this without Python; `attend_as` says before what they attend with.

A token's output is the same to the bit in any company: beside other sequences, as a node of a tree
or as plain text.

Shapes: T flat tokens, H attention heads, G KV heads, C channels per head.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.attention.backend import AttentionBatch, AttentionSpan
from server.kv.kv_cache import KVCache, KVLayout
from server.model.native_library import load_native

_SOURCE = Path(__file__).with_name("tree_attention.cpp")
_NEEDED = {"avx512f"}
# Channels of a head are computed so many at a time.
_CHANNELS = 8
_NO_WINDOW = -1
_Long = ctypes.c_int64
_Address = ctypes.c_void_p
_NUM_BYTES = ctypes.sizeof(_Long)


class _Span(ctypes.Structure):
    _fields_ = (
        ("start", _Long),
        ("num_queries", _Long),
        ("context_len", _Long),
        ("num_slots", _Long),
        ("block_table", _Address),
        ("mask", _Address),
        ("depths", _Address),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("spans", _Address),
        ("num_spans", _Long),
        ("slots", _Address),
        ("num_tokens", _Long),
        ("block_size", _Long),
    )


_OPERATOR = "euryale::native_attend"


def attended_shape(
    query_1HTC: Tensor, key_1GTC: Tensor, value_1GTC: Tensor, scaling: float, window: int
) -> Tensor:
    """The shape of what an attention operator returns, for exported graphs."""
    _, num_heads, num_tokens, num_channels = query_1HTC.shape
    return query_1HTC.new_empty(1, num_tokens, num_heads, num_channels)


torch.library.define(
    _OPERATOR, "(Tensor query, Tensor key, Tensor value, float scaling, int window) -> Tensor"
)
torch.library.register_fake(_OPERATOR, attended_shape)

# For torch's compiler: the operator, and what compiled code calls in its place.
ATTENTION_SHIMS = {
    torch.ops.euryale.native_attend.default: [
        "AOTITorchError aoti_torch_cpu_native_attend(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, double, int64_t, AtenTensorHandle*)"
    ]
}


class TreeAttention:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._set_num_threads = library.euryale_attention_threads
        self._set_num_threads.argtypes = [ctypes.c_int]
        self._set_num_threads.restype = None
        self.attend_with = library.euryale_attend_with
        self.attend_with.argtypes = [_Address] * 3
        self.attend_with.restype = None
        self.attend = library.euryale_tree_attention
        self.attend.argtypes = [
            *(_Address, _Long, _Long, _Long),
            *(_Address, _Long, _Long, _Long),
            *(_Address, _Long, _Long),
            *(_Address, _Long, ctypes.c_double, _Long),
        ]
        self.attend.restype = ctypes.c_int

    def follow_threads(self) -> None:
        """Compute with as many threads as torch does at present."""
        self._set_num_threads(torch.get_num_threads())

    def echo(self) -> None:
        """Let compiled code on this thread attend as the echo of `block_calls`."""
        self.attend_with(None, None, None)


def load_tree_attention(report: Callable[[str], None]) -> TreeAttention:
    """Load the library, and build it if no earlier start did.

    Args:
        report: Called with a short line if it must be built.

    Raises:
        CompilationError: If this CPU cannot run it, or it cannot be built.
    """
    library = load_native(_SOURCE, _NEEDED, TreeAttention, report)
    library.follow_threads()
    return library


def can_attend(layout: KVLayout) -> bool:
    """Whether it computes with such keys and values."""
    is_float = layout.dtype == torch.float32 and layout.device.type == "cpu"
    return is_float and layout.head_dim % _CHANNELS == 0


@dataclass(frozen=True, slots=True, eq=False)
class NativeMetadata:
    """Shared by all layers of one step.

    Attributes:
        step: What the library reads.
        owned: What that points to.
    """

    step: _Step
    address: int
    owned: list[Any]


class NativeBackend:
    """Attention over the paged cache, one call of the library per layer.

    Args:
        kv_cache: Whose layout `can_attend` takes.
        library: Computes it.
    """

    def __init__(self, kv_cache: KVCache, library: TreeAttention) -> None:
        self._kv = kv_cache
        self._library = library
        self._keys = [keys_SGC.data_ptr() for keys_SGC in kv_cache.keys]
        self._values = [values_SGC.data_ptr() for values_SGC in kv_cache.values]

    def prepare(self, batch: AttentionBatch) -> NativeMetadata:
        """Put the spans where the library reads them; see `AttentionBackend.prepare`."""
        owned: list[Any] = [batch.slots_T]
        spans = (_Span * len(batch.spans))(*(_native_span(span, owned) for span in batch.spans))
        owned.append(spans)
        step = _Step(
            ctypes.addressof(spans),
            len(batch.spans),
            batch.slots_T.data_ptr(),
            batch.slots_T.shape[0],
            self._kv.layout.block_size,
        )
        return NativeMetadata(step, ctypes.addressof(step), owned)

    def attend_as(self, layer: int, metadata: NativeMetadata) -> None:
        """Let compiled code on this thread attend as this layer from now on."""
        self._library.attend_with(metadata.address, self._keys[layer], self._values[layer])

    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: NativeMetadata,
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        self.attend_as(layer, metadata)
        num_heads, num_tokens, num_channels = queries_HTC.shape
        queries, keys, values = (
            x if x.stride(2) == 1 else x.contiguous() for x in (queries_HTC, keys_HTC, values_HTC)
        )
        output_THC = queries.new_empty(num_tokens, num_heads, num_channels)
        failed = self._library.attend(
            *(queries.data_ptr(), num_heads, queries.stride(0), queries.stride(1)),
            *(keys.data_ptr(), keys.shape[0], keys.stride(0), keys.stride(1)),
            *(values.data_ptr(), values.stride(0), values.stride(1)),
            *(output_THC.data_ptr(), num_channels, scaling),
            _NO_WINDOW if sliding_window is None else sliding_window,
        )
        if failed:
            raise MemoryError("there is no memory for the scores of a step")
        return output_THC


def _native_span(span: AttentionSpan, owned: list[Any]) -> _Span:
    """The span as the library reads it; adds to `owned` what it points to."""
    table = (_Long * len(span.block_table))(*span.block_table)
    owned.append(table)
    return _Span(
        span.start,
        span.num_queries,
        span.context_len,
        span.num_slots,
        ctypes.addressof(table),
        _address_of(span.ancestor_mask_QS, torch.bool, owned),
        _address_of(span.depths_S, torch.int64, owned),
    )


def _address_of(x: Tensor | None, dtype: torch.dtype, owned: list[Any]) -> int | None:
    if x is None:
        return None
    kept = x.to(dtype).contiguous()
    owned.append(kept)
    return kept.data_ptr()
