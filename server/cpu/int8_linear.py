"""Linear layers with int8 weights, for CPU inference.

A weight is stored as 8 bits with one scale per output channel, a quarter of float32's bytes, and
multiplied in integers. Activations stay as good as exact: each row is written in codes of 16 bits,
with a scale and a minimum of the row's own, and the high and the low 8 bits are two rows of the
same product. So a token depends on no other token of the step, outliers need no care, and a
layer's error is that of its weights. A second row costs little where reading the weights is what
takes the time.

Our own kernel computes this where it can be built; elsewhere oneDNN multiplies, and the rest are
operations of torch.

Shapes: T rows, I input features, O output features; 2T stands for high parts, then low ones.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.cpu.int8_kernel import Int8Kernel
from server.cpu.product_operators import int8_product, traceable_int8_product
from server.cpu.shared_input import joined_bias, replace_linears

# Largest weight; -128 stays unused.
_MAX_WEIGHT = 127
# The least scale, so that nothing is divided by zero.
_TINY = torch.finfo(torch.float32).tiny
# The number of rows that oneDNN is asked to choose the layout for; any number of rows works.
_ROWS_HINT = 8


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows as `(high * base + low) * scale + minimum`, where the base is 2 to the bits of a part.

    Attributes:
        parts: Uint8 `[2T, I]`.
        scale: Float32 `[T, 1]`.
        minimum: Float32 `[T, 1]`.
    """

    parts: Tensor
    scale: Tensor
    minimum: Tensor


class Int8Linear(nn.Module):
    """Computes what an `nn.Linear` with weights rounded to 8 bits computes, without autograd.

    The weight is no parameter and not in the state dict.

    Args:
        linears: In float32 on the CPU, with the same number of inputs; their outputs come side by
            side.
        kernel: Our own product, used if it takes so many inputs; None leaves that to oneDNN.
    """

    _weight: Tensor
    _scale_O: Tensor
    _zero_O: Tensor
    _ones_O: Tensor
    _bias_O: Tensor | None

    def __init__(self, *linears: nn.Linear, kernel: Int8Kernel | None = None) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self._kernel = kernel if kernel is not None and kernel.takes(self.in_features) else None
        self.out_features = sum(linear.out_features for linear in linears)
        codes_OI, scale_O, ones_O = _rounded([linear.weight.detach() for linear in linears])
        if self._kernel is None:
            self._part_bits = _part_bits()
            packed = torch.ops.onednn.qlinear_prepack(codes_OI, [_ROWS_HINT, self.in_features])
            zero_O = torch.zeros(self.out_features, dtype=torch.int64)
            self.register_buffer("_zero_O", zero_O, persistent=False)
        else:
            packed = self._kernel.pack(codes_OI)
        self.register_buffer("_weight", packed, persistent=False)
        self.register_buffer("_scale_O", scale_O, persistent=False)
        self.register_buffer("_ones_O", ones_O, persistent=False)
        self.register_buffer("_bias_O", joined_bias(linears), persistent=False)

    def forward(self, input_I: Tensor) -> Tensor:
        """Map float32 `[..., I]` to `[..., O]`."""
        if self._kernel is not None:
            return self._kernel.linear(
                input_I, self._weight, self._scale_O, self._ones_O, self._bias_O
            )
        input_TI = input_I.reshape(-1, self.in_features)
        if torch.compiler.is_exporting():
            output_TO = self._compute(input_TI, traceable_int8_product)
        elif input_TI.shape[0] == 0:
            output_TO = input_TI.new_zeros(0, self.out_features)
        else:
            output_TO = self._compute(input_TI, int8_product)
        return output_TO.view(*input_I.shape[:-1], self.out_features)

    def _compute(self, input_TI: Tensor, product: Callable[..., Tensor]) -> Tensor:
        num_rows = input_TI.shape[0]
        rows = _split(input_TI, self._part_bits)
        parts_2TO = product(rows.parts, self._weight, self._scale_O, self._zero_O)
        output_TO = parts_2TO[:num_rows] * float(1 << self._part_bits) + parts_2TO[num_rows:]
        output_TO = output_TO * rows.scale + rows.minimum * self._ones_O
        return output_TO if self._bias_O is None else output_TO + self._bias_O

    @property
    def is_one_call(self) -> bool:
        """Whether there is nothing in it for a compiler."""
        return self._kernel is not None

    def extra_repr(self) -> str:
        """Name the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Product:
    """Product of float32 rows with the transpose of a matrix, rounded to 8 bits.

    Args:
        weight_OI: In float32 on the CPU; not kept.
        kernel: Our own product.
    """

    def __init__(self, weight_OI: Tensor, kernel: Int8Kernel) -> None:
        codes_OI, self._scale_O, self._ones_O = _rounded([weight_OI])
        self._weight = kernel.pack(codes_OI)
        self._kernel = kernel

    def __call__(self, input_I: Tensor) -> Tensor:
        """Map `[..., I]` to `[..., O]`."""
        return self._kernel.linear(input_I, self._weight, self._scale_O, self._ones_O, None)


def _rounded(weights_OI: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of 8 bits side by side, their scales, and what a row of ones gives.

    A row's minimum counts once for each input feature, hence what a row of ones gives.
    """
    # A single weight is not copied: a vocabulary's may be the largest tensor there is.
    weight_OI = weights_OI[0] if len(weights_OI) == 1 else torch.cat(list(weights_OI))
    scale_O = (weight_OI.abs().amax(1) / _MAX_WEIGHT).clamp_min(_TINY)
    codes_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
    return codes_OI, scale_O, codes_OI.sum(1) * scale_O


def _split(input_TI: Tensor, part_bits: int) -> _Rows:
    """Write rows in codes of two parts; a row of equal values has codes of 0."""
    minimum = input_TI.amin(1, keepdim=True)
    spread = input_TI.amax(1, keepdim=True) - minimum
    scale = (spread / ((1 << 2 * part_bits) - 1)).clamp_min(_TINY)
    base = float(1 << part_bits)
    codes_TI = torch.round((input_TI - minimum) * (1.0 / scale))
    high_TI = torch.floor(codes_TI * (1.0 / base))
    parts = torch.cat((high_TI, codes_TI - high_TI * base)).to(torch.uint8)
    return _Rows(parts, scale, minimum)


@functools.cache
def _part_bits() -> int:
    """How many bits of an activation this machine multiplies at once: 8 or 7.

    Without VNNI, x86 adds pairs of products in 16 bits, which overflow with codes of 8 bits and
    not with codes of 7: 2 * 127 * 127 is less than 2**15.

    Raises:
        RuntimeError: If this build of torch does not multiply integers on this machine.
    """
    num_features = 64
    weight = torch.full((16, num_features), _MAX_WEIGHT, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [_ROWS_HINT, num_features])
    for part_bits in (8, 7):
        largest = (1 << part_bits) - 1
        codes = torch.full((2, num_features), largest, dtype=torch.uint8)
        product = int8_product(codes, packed, torch.ones(16), torch.zeros(16, dtype=torch.int64))
        if bool((product == largest * _MAX_WEIGHT * num_features).all()):
            return part_bits
    raise RuntimeError("integer products are wrong")


def can_quantize() -> bool:
    """Whether this machine and this build of torch multiply with int8 weights."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        _part_bits()
    except RuntimeError:
        return False
    return True


def quantize_linears(model: nn.Module, kernel: Int8Kernel | None = None) -> int:
    """Replace every `nn.Linear` by one with int8 weights; see `replace_linears`.

    Args:
        model: In float32 on the CPU; changed in place.
        kernel: Our own product for these layers; None leaves that to oneDNN.

    Returns:
        The number of layers replaced.
    """
    return replace_linears(model, functools.partial(Int8Linear, kernel=kernel))
