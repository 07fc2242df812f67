"""Linear layers that read the same input, computed as one.

A model's own code calls its query, key and value projections one after the other with one tensor.
The first call computes all of them and the others hand out their share, so the model's code stays
as it is.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Siblings in the decoder layers of `transformers`, by attribute name. A wrong guess would cost
# time and change no result: a layer that gets another input than its siblings is computed again.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    """One layer whose outputs, next to each other, belong to several.

    Args:
        layer: Maps `[..., I]` to the siblings' outputs side by side.
        sizes: Output features of each sibling.
    """

    def __init__(self, layer: nn.Module, sizes: Sequence[int]) -> None:
        self.layer = layer
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def take(self, index: int, input_I: Tensor) -> Tensor:
        """The output of one sibling, a view; each is computed once for a tensor and kept once.

        NOTE: Tensors are told apart by identity. Nobody may write to one between two siblings.
        """
        if input_I is not self._input or index not in self._outputs:
            self._input = input_I
            self._outputs = dict(enumerate(self.layer(input_I).split(self._sizes, dim=-1)))
        output_O = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output_O


class Sibling(nn.Module):
    """Stands where the model calls a layer that is computed together with others.

    The first of them has the common layer as a submodule.
    """

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        if index == 0:
            self.layer = shared.layer

    def forward(self, input_I: Tensor) -> Tensor:
        """Map `[..., I]` to this sibling's `[..., O]`."""
        return self._shared.take(self._index, input_I)

    def extra_repr(self) -> str:
        """Name the layer that computes it."""
        return f"{self._index} of {self._shared.layer!r}"


def joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    """The biases side by side, zeros for a layer that has none; None if no layer has one."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features)
            if linear.bias is None
            else linear.bias.detach()
            for linear in linears
        ]
    )


def replace_linears(
    model: nn.Module,
    make: Callable[..., nn.Module],
    is_wanted: Callable[[nn.Linear], bool] = lambda linear: True,
) -> int:
    """Replace every `nn.Linear`; siblings are computed together.

    A layer's plain weight is freed unless something else holds it, like a tied embedding.
    Subclasses of `nn.Linear` stay, as they may compute something else.

    Args:
        model: Changed in place.
        make: Builds one layer from linear layers of the same input, whose outputs it puts side by
            side.
        is_wanted: Says which to replace.

    Returns:
        The number of layers replaced.
    """
    num_replaced = 0
    for parent in list(model.modules()):
        plain = {
            name: child
            for name, child in parent.named_children()
            if type(child) is nn.Linear and is_wanted(child)
        }
        num_replaced += len(plain)
        for names in SIBLINGS:
            if all(name in plain for name in names):
                linears = [plain.pop(name) for name in names]
                shared = SharedInput(make(*linears), [one.out_features for one in linears])
                for index, name in enumerate(names):
                    setattr(parent, name, Sibling(shared, index))
        for name, linear in plain.items():
            setattr(parent, name, make(linear))
    return num_replaced
