"""Products with a matrix that oneDNN packed once, which are faster on CPU at a few rows of input.

The plain CPU product streams the whole matrix several times over when its input has 2 to 8 rows,
as that of draft heads and of small steps has; with a packed matrix it does not.

Shapes: I input features, O output features.
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

# The number of rows that oneDNN is asked to choose the layout for; any number of rows works.
_NUM_EXPECTED_ROWS = 8


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of this type can be packed there, on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(weight_OI: Tensor) -> Tensor:
    """Copy a matrix for which `can_pack` holds into oneDNN's layout; no gradient flows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _NUM_EXPECTED_ROWS)
    return packed


def packed_product(input_I: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiply `[..., I]` with the transpose of a matrix that `pack` packed; returns `[..., O]`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input_I, packed, bias_O, "none", [], "")
    return product


class PackedProduct:
    """Product with the transpose of a matrix that must not be written to any more.

    NOTE: Packing takes a second copy of the matrix, for float32 on CPU only; other matrices are
    multiplied as they are.

    Attributes:
        weight_OI: The matrix.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI
        is_packed = weight_OI.dtype == torch.float32 and can_pack(weight_OI.device, torch.float32)
        self._packed = pack(weight_OI) if is_packed else None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # A packed matrix cannot be copied, and a matrix that nobody writes to need not be.
        return self

    def __call__(self, input_I: Tensor) -> Tensor:
        """Map `[..., I]` to `[..., O]`."""
        if self._packed is None:
            return F.linear(input_I, self.weight_OI)
        return packed_product(input_I, self._packed)
