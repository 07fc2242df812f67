"""Linear layers with weights packed by oneDNN, for CPU inference.

With packed weights a step of a few tokens costs nearly as little as a step of one, and long
prompts gain too. Shape suffixes: I input features, O output features.
"""

import torch
from torch import Tensor, nn

# The number of rows that oneDNN is told to choose the layout for; any number of rows works.
_ROWS_HINT = 8


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, without autograd.

    The packed weight is neither a parameter nor in the state dict, and `to` does not move it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._weight = _pack(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, input_I: Tensor) -> Tensor:
        """Map `[..., I]` to `[..., O]`."""
        output_O: Tensor = torch.ops.mkldnn._linear_pointwise(
            input_I, self._weight, self._bias, "none", [], ""
        )
        return output_O

    def extra_repr(self) -> str:
        """Name the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _pack(weight_OI: Tensor) -> Tensor:
    packed_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS_HINT)
    return packed_OI


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed layers run on this machine with such weights."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_linears(model: nn.Module) -> int:
    """Replace every `nn.Linear` by a packed one; does nothing where `can_pack` says no.

    A layer's plain weight is freed unless something else holds it, like a tied embedding.
    Subclasses of `nn.Linear` stay, as they may compute something else.

    Returns:
        The number of layers replaced.
    """
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight.device, child.weight.dtype):
                setattr(parent, name, PackedLinear(child))
                num_packed += 1
    return num_packed
