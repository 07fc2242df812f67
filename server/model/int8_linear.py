"""Linear layers with int8 weights, for CPU inference.

A weight is stored as 8 bits with one scale per output channel, a quarter of float32's bytes, and
multiplied in integers. Activations stay as good as exact: each row is split into two parts of 8
bits, the second one quantising what the first one left, with scales and minima of the row's own.
So a token depends on no other token of the step, outliers need no care, and a layer's error is
that of its weights. The two parts are two rows of the same product, which costs little where
reading the weights is what takes the time.

Shapes: T rows, I input features, O output features; 2T stands for first parts, then second ones.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.model.packed_product import int8_product, traceable_int8_product
from server.model.shared_input import joined_bias, replace_linears

# Largest weight; -128 stays unused.
_MAX_WEIGHT = 127
# Codes of an activation's part, before any bit is left out.
_NUM_CODES = 256
# What `embedding_bag_byte_prepack` adds to a row's range before it divides by it.
_RANGE_FLOOR = 1e-8
# The number of rows that oneDNN is told to choose the layout for; any number of rows works.
_ROWS_HINT = 8
_quantize_rows = torch.ops.quantized.embedding_bag_byte_prepack
_dequantize_rows = torch.ops.quantized.embedding_bag_byte_unpack


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows as `codes * scale + minimum`, where two parts add up to one row.

    Attributes:
        codes: Whole numbers `[2T, I]`, within what this machine multiplies exactly.
        scale: Float32 `[2T, 1]`.
        minimum: Float32 `[T, 1]`, of both parts together.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor


class Int8Linear(nn.Module):
    """Computes what an `nn.Linear` with weights rounded to 8 bits computes, without autograd.

    The weight is no parameter and not in the state dict. When the layer is exported, it computes
    the same from operations that a compiler can fuse.

    Args:
        linears: In float32 on the CPU, with the same number of inputs; their outputs come side by
            side.
    """

    _weight: Tensor
    _scale_O: Tensor
    _zero_O: Tensor
    _ones_O: Tensor
    _bias_O: Tensor | None

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self._shift = _code_shift()
        weight_OI = torch.cat([linear.weight.detach() for linear in linears])
        scale_O = (weight_OI.abs().amax(1) / _MAX_WEIGHT).clamp_min(torch.finfo().tiny)
        codes_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(codes_OI, [_ROWS_HINT, self.in_features])
        self.register_buffer("_weight", packed, persistent=False)
        self.register_buffer("_scale_O", scale_O, persistent=False)
        zero_O = torch.zeros(self.out_features, dtype=torch.int64)
        self.register_buffer("_zero_O", zero_O, persistent=False)
        # What a row of ones gives: a row's minimum counts once for each input feature.
        self.register_buffer("_ones_O", codes_OI.sum(1) * scale_O, persistent=False)
        self.register_buffer("_bias_O", joined_bias(linears), persistent=False)

    def forward(self, input_I: Tensor) -> Tensor:
        """Map float32 `[..., I]` to `[..., O]`."""
        input_TI = input_I.reshape(-1, self.in_features)
        num_rows = input_TI.shape[0]
        if torch.compiler.is_exporting():
            output_TO = self._traceable(input_TI)
        elif num_rows == 0:
            output_TO = input_TI.new_zeros(0, self.out_features)
        else:
            output_TO = self._eager(input_TI)
        return output_TO.view(*input_I.shape[:-1], self.out_features)

    def _eager(self, input_TI: Tensor) -> Tensor:
        num_rows = input_TI.shape[0]
        rows = _split(input_TI.contiguous(), self._shift)
        parts = int8_product(rows.codes, self._weight, self._scale_O, self._zero_O)
        output_TO = parts[:num_rows].mul_(rows.scale[:num_rows])
        output_TO.addcmul_(parts[num_rows:], rows.scale[num_rows:])
        output_TO.addcmul_(rows.minimum, self._ones_O)
        if self._bias_O is not None:
            output_TO.add_(self._bias_O)
        return output_TO

    def _traceable(self, input_TI: Tensor) -> Tensor:
        num_rows = input_TI.shape[0]
        first = _quantize_traceably(input_TI, self._shift)
        rest_TI = input_TI - (first.codes * first.scale + first.minimum)
        second = _quantize_traceably(rest_TI, self._shift)
        codes = torch.cat((first.codes, second.codes)).to(torch.uint8)
        parts: Tensor = traceable_int8_product(codes, self._weight, self._scale_O, self._zero_O)
        minimum = first.minimum + second.minimum
        output_TO = parts[:num_rows] * first.scale + parts[num_rows:] * second.scale
        output_TO = output_TO + minimum * self._ones_O
        if self._bias_O is not None:
            output_TO = output_TO + self._bias_O
        return output_TO

    def extra_repr(self) -> str:
        """Name the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _split(input_TI: Tensor, shift: int) -> _Rows:
    """Quantise rows and what that leaves of them; codes have 8 bits less `shift`."""
    num_rows, num_features = input_TI.shape
    first = _quantize(input_TI, shift)
    second = _quantize(input_TI - _dequantize_rows(first), shift)
    packed = torch.cat((first, second))
    codes = packed[:, :num_features].contiguous()
    ranges = packed[:, num_features:].contiguous().view(torch.float32)
    scale, minimum = ranges[:, :1], ranges[:, 1:]
    if shift:
        codes >>= shift
        scale = scale * (1 << shift)
    return _Rows(codes, scale, minimum[:num_rows] + minimum[num_rows:])


def _quantize(input_TI: Tensor, shift: int) -> Tensor:
    """Rows of codes, each with its scale and minimum as float32 behind them; see `_split`."""
    packed: Tensor = _quantize_rows(input_TI)
    if shift:
        packed[:, : input_TI.shape[1]] &= 0xFF ^ ((1 << shift) - 1)
    return packed


def _quantize_traceably(input_TI: Tensor, shift: int) -> _Rows:
    """One part of rows as `_quantize` finds it, the codes still as float32."""
    minimum = input_TI.amin(1, keepdim=True)
    spread = input_TI.amax(1, keepdim=True) - minimum
    step = 1 << shift
    codes = torch.round((input_TI - minimum) * ((_NUM_CODES - 1) / (spread + _RANGE_FLOOR)))
    scale = spread / (_NUM_CODES - 1) * step
    return _Rows(torch.floor(codes / step) if shift else codes, scale, minimum)


@functools.cache
def _code_shift() -> int:
    """How many low bits of an activation's code this machine must leave out: 0 or 1.

    Without VNNI, x86 adds pairs of products in 16 bits, which overflow with codes of 8 bits and
    not with codes of 7: 2 * 127 * 127 is less than 2**15.

    Raises:
        RuntimeError: If this build of torch does not multiply integers on this machine.
    """
    num_features = 64
    weight = torch.full((16, num_features), _MAX_WEIGHT, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [_ROWS_HINT, num_features])
    for shift in (0, 1):
        largest = 0xFF >> shift
        codes = torch.full((2, num_features), largest, dtype=torch.uint8)
        product = int8_product(codes, packed, torch.ones(16), torch.zeros(16, dtype=torch.int64))
        if bool((product == largest * _MAX_WEIGHT * num_features).all()):
            return shift
    raise RuntimeError("integer products are wrong")


def can_quantize() -> bool:
    """Whether this machine and this build of torch multiply with int8 weights."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        _code_shift()
    except RuntimeError:
        return False
    return True


def quantize_linears(model: nn.Module) -> int:
    """Replace every `nn.Linear` by one with int8 weights; see `replace_linears`.

    Args:
        model: In float32 on the CPU; changed in place.

    Returns:
        The number of layers replaced.
    """
    return replace_linears(model, Int8Linear)
