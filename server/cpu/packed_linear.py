"""Linear layers with weights packed by oneDNN, for CPU inference.

With packed weights a step of a few tokens costs nearly as little as a step of one, and long
prompts gain too. Shape suffixes: I input features, O output features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heads.packed_product import can_pack, pack
from server.cpu.product_operators import float_product, traceable_float_product
from server.cpu.shared_input import joined_bias, replace_linears


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, without autograd.

    The packed weight is no parameter and not in the state dict.

    Args:
        linears: Layers with the same number of inputs; their outputs come side by side.
    """

    _weight: Tensor
    _bias_O: Tensor | None

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        packed = pack(_joined([linear.weight.detach() for linear in linears]))
        self.register_buffer("_weight", packed, persistent=False)
        self.register_buffer("_bias_O", joined_bias(linears), persistent=False)

    def forward(self, input_I: Tensor) -> Tensor:
        """Map `[..., I]` to `[..., O]`."""
        product = traceable_float_product if torch.compiler.is_exporting() else float_product
        output_O: Tensor = product(input_I, self._weight, self._bias_O, self.out_features)
        return output_O

    def extra_repr(self) -> str:
        """Name the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _joined(weights_OI: Sequence[Tensor]) -> Tensor:
    # A single weight is not copied first: an unembedding may be the largest tensor there is.
    return weights_OI[0] if len(weights_OI) == 1 else torch.cat(list(weights_OI))


def pack_linears(model: nn.Module) -> int:
    """Replace every `nn.Linear` for which `can_pack` holds; see `replace_linears`.

    Returns:
        The number of layers replaced.
    """
    return replace_linears(
        model, PackedLinear, lambda linear: can_pack(linear.weight.device, linear.weight.dtype)
    )
