"""Paged tree attention in our own machine code: float32 on x86 CPUs with AVX-512.

Where a step goes through Python in every layer, that takes longer than its attention. Compiled
layers call this without Python; `enter_layer` says before what they attend with.

A token's output is the same to the bit whatever else is in the step, and whether the token is a
node of a tree or plain text.

Shapes: T flat tokens, H attention heads, G KV heads, C channels per head.
"""

import ctypes
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from server.attention.backend import AttentionBackend, AttentionBatch, AttentionSpan
from server.attention.hook import define_operator, operator_overload
from server.cpu.layer_calls import EchoBackend
from server.cpu.own_library import load_library
from server.errors import CompilationError, ConfigError
from server.kv.kv_cache import KVCache, KVLayout

_SOURCE = Path(__file__).parent / "kernels" / "tree_attention.cpp"
_NEEDED = {"avx512f"}
# Channels of a head are computed so many at a time.
_CHANNELS = 8
_NO_WINDOW = -1
_Long = ctypes.c_int64
_Address = ctypes.c_void_p


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


_OPERATOR = "euryale::own_attend"
define_operator(_OPERATOR)
# For torch's compiler: the operator, and what compiled code calls in its place.
ATTENTION_SHIMS = {
    operator_overload(_OPERATOR): [
        "AOTITorchError aoti_torch_cpu_own_attend(AtenTensorHandle, AtenTensorHandle, "
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
        # Lets the next compiled layer on this thread attend as `EchoBackend` does.
        self.attend_as_echo = library.euryale_attend_as_echo
        self.attend_as_echo.argtypes = []
        self.attend_as_echo.restype = None
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


def create(kv_cache: KVCache) -> AttentionBackend:
    """Make our own attention for a cache; the member `cpu` of the attention backends.

    Raises:
        ConfigError: If this machine cannot run it, or it does not compute with such a cache.
    """
    try:
        return OwnAttention(kv_cache, load_tree_attention())
    except (CompilationError, ValueError) as error:
        raise ConfigError(f"attention is 'cpu', but {error}; give 'sdpa' or 'auto'") from error


def load_tree_attention() -> TreeAttention:
    """Load the library, and build it if no earlier start did.

    Raises:
        CompilationError: If this CPU cannot run it, or it cannot be built.
    """
    library = load_library(_SOURCE, _NEEDED, _checked)
    library.follow_threads()
    return library


def can_attend(layout: KVLayout) -> bool:
    """Whether our own attention computes with such keys and values."""
    is_float = layout.dtype == torch.float32 and layout.device.type == "cpu"
    return is_float and layout.head_dim % _CHANNELS == 0


def _checked(loaded: ctypes.CDLL) -> TreeAttention:
    """The library, after a prompt of a few tokens was attended rightly."""
    library = TreeAttention(loaded)
    num_tokens, layout = 5, KVLayout(1, 2, 24, 4, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    queries_HTC = torch.randn(6, num_tokens, layout.head_dim, generator=generator)
    keys_GTC, values_GTC = torch.randn(2, 2, num_tokens, layout.head_dim, generator=generator)
    backend = OwnAttention(KVCache(layout, 2), library)
    span = AttentionSpan(0, num_tokens, 0, [0, 1], None, None)
    metadata = backend.prepare(AttentionBatch((span,), torch.arange(num_tokens)))
    output_THC = backend.forward(queries_HTC, keys_GTC, values_GTC, 0, 0.2, None, metadata)
    expected_HTC = F.scaled_dot_product_attention(
        queries_HTC, keys_GTC, values_GTC, is_causal=True, scale=0.2, enable_gqa=True
    )
    distance = float((output_THC - expected_HTC.transpose(0, 1)).abs().max())
    if not distance < 1e-4:
        raise CompilationError(f"it computes something else, at a distance of {distance:.3g}")
    return library


@dataclass(frozen=True, slots=True, eq=False)
class OwnMetadata:
    """Shared by all layers of one step.

    Attributes:
        step: The spans and slots as the library reads them.
        address: Where `step` lies.
        owned: Keeps alive what `step` points to.
    """

    step: _Step
    address: int
    owned: list[Any]


class OwnAttention(AttentionBackend):
    """Attention over the paged cache, one call of the library per layer.

    Args:
        kv_cache: A cache with a layout for which `can_attend` holds.
        library: Our own machine code.

    Raises:
        ValueError: If it does not compute with such keys and values.
    """

    operator = _OPERATOR

    def __init__(self, kv_cache: KVCache, library: TreeAttention) -> None:
        layout = kv_cache.layout
        if not can_attend(layout):
            raise ValueError(
                f"KV is {layout.dtype} on {layout.device} with {layout.head_dim} channels per "
                f"head, where it needs float32 on cpu with a multiple of {_CHANNELS}"
            )
        self._kv = kv_cache
        self._library = library
        self._keys = [keys_SGC.data_ptr() for keys_SGC in kv_cache.keys]
        self._values = [values_SGC.data_ptr() for values_SGC in kv_cache.values]

    @override
    def prepare(self, batch: AttentionBatch) -> OwnMetadata:
        owned: list[Any] = []
        size = self._kv.layout.block_size
        spans = (_Span * len(batch.spans))(*(_span_of(span, size, owned) for span in batch.spans))
        owned.append(spans)
        step = _Step(
            ctypes.addressof(spans),
            len(batch.spans),
            _address_of(batch.slots_T, torch.int64, owned),
            batch.slots_T.shape[0],
            size,
        )
        return OwnMetadata(step, ctypes.addressof(step), owned)

    @override
    def enter_layer(self, layer: int, metadata: OwnMetadata) -> None:
        self._library.attend_with(metadata.address, self._keys[layer], self._values[layer])

    @override
    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: OwnMetadata,
    ) -> Tensor:
        num_heads, num_tokens, num_channels = queries_HTC.shape
        kv_shape = (self._kv.layout.num_kv_heads, num_tokens, num_channels)
        fits = keys_HTC.shape == values_HTC.shape == kv_shape
        fits = fits and num_tokens == metadata.step.num_tokens
        if not fits or not queries_HTC.dtype == keys_HTC.dtype == values_HTC.dtype == torch.float32:
            raise ValueError(
                f"queries {tuple(queries_HTC.shape)}, keys {tuple(keys_HTC.shape)} and values "
                f"{tuple(values_HTC.shape)} do not belong to a float32 step of "
                f"{metadata.step.num_tokens} tokens"
            )
        queries, keys, values = (
            x if x.stride(2) == 1 else x.contiguous() for x in (queries_HTC, keys_HTC, values_HTC)
        )
        output_THC = queries.new_empty(num_tokens, num_heads, num_channels)
        self.enter_layer(layer, metadata)
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


class OwnEcho(EchoBackend):
    """`EchoBackend` in the library, to check compiled layers that attend by its operator."""

    operator = _OPERATOR

    def __init__(self, library: TreeAttention) -> None:
        super().__init__()
        self._library = library

    @override
    def enter_layer(self, layer: int, metadata: object) -> None:
        self._library.attend_as_echo()


def _span_of(span: AttentionSpan, block_size: int, owned: list[Any]) -> _Span:
    """The span as the library reads it; adds to `owned` what it points to."""
    num_blocks = -(-span.num_slots // block_size)
    table = array("q", span.block_table[:num_blocks])
    mask_QS, depths_S = span.ancestor_mask_QS, span.depths_S
    num_own = span.num_slots - span.context_len
    if (
        len(table) < num_blocks
        or (mask_QS is not None and mask_QS.shape != (span.num_queries, num_own))
        or (depths_S is not None and depths_S.shape != (num_own,))
    ):
        raise ValueError(f"a span's blocks, mask or depths do not belong together: {span}")
    owned.append(table)
    return _Span(
        span.start,
        span.num_queries,
        span.context_len,
        span.num_slots,
        table.buffer_info()[0],
        _address_of(mask_QS, torch.bool, owned),
        _address_of(depths_S, torch.int64, owned),
    )


def _address_of(x: Tensor | None, dtype: torch.dtype, owned: list[Any]) -> int | None:
    if x is None:
        return None
    kept = x.to(dtype).contiguous()
    owned.append(kept)
    return kept.data_ptr()
