"""A product with a frozen matrix, as fast as the device allows at a few rows of input.

The plain CPU product streams the whole matrix several times over when its input has 2 to 8 rows,
which is what draft heads have at batch 1; with the matrix packed by oneDNN once, it does not.
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

_NUM_EXPECTED_ROWS = 8


class FrozenLinear:
    """Product with the transpose of a matrix that must not be written to any more.

    NOTE: packing takes a second copy of the matrix, for float32 on CPU only; no gradient flows.

    Attributes:
        weight: The matrix, [outputs, inputs].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: Tensor | None = None
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self._packed = torch.ops.mkldnn._reorder_linear_weight(
                weight.detach(), _NUM_EXPECTED_ROWS
            )

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # A packed matrix cannot be copied, and a matrix that nobody writes to need not be.
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` [..., inputs] times the transposed matrix, [..., outputs]."""
        if self._packed is None:
            return F.linear(x, self.weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product
