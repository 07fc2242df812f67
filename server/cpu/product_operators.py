"""oneDNN's products with packed weights, as operators that can stand in a compiled graph.

The compiler has lowerings of its own for these products, which want the weight to be a constant of
the graph. Under these names it calls them as they are, so that one graph serves many layers.

Shapes: T rows, I input features, O output features.
"""

import torch
from torch import Tensor

from heads.packed_product import packed_product

_INT8 = "euryale::int8_product"
_FLOAT = "euryale::float_product"


def int8_product(codes_TI: Tensor, weight: Tensor, scale_O: Tensor, zero_O: Tensor) -> Tensor:
    """Integer products of uint8 codes with a packed int8 weight, times the weight's scales.

    Args:
        codes_TI: Contiguous.
        weight: A weight that `onednn.qlinear_prepack` has packed.
        scale_O: Float32 scale of each output channel.
        zero_O: Int64 zeros.

    Returns:
        Float32 `[T, O]`.
    """
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes_TI, 1.0, 0, weight, scale_O, zero_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def float_product(input_I: Tensor, weight: Tensor, bias_O: Tensor | None, size: int) -> Tensor:
    """Product with a packed float weight.

    Args:
        input_I: `[..., I]`.
        weight: A weight that `heads.packed_product.pack` has packed.
        bias_O: Added if there is one.
        size: Output features, which the weight's layout does not show in a graph.

    Returns:
        `[..., O]` in the input's dtype.
    """
    return packed_product(input_I, weight, bias_O)


def _int8_shape(codes_TI: Tensor, weight: Tensor, scale_O: Tensor, zero_O: Tensor) -> Tensor:
    return codes_TI.new_empty(codes_TI.shape[0], scale_O.shape[0], dtype=torch.float32)


def _float_shape(input_I: Tensor, weight: Tensor, bias_O: Tensor | None, size: int) -> Tensor:
    return input_I.new_empty(*input_I.shape[:-1], size)


torch.library.define(_INT8, "(Tensor codes, Tensor weight, Tensor scale, Tensor zero) -> Tensor")
torch.library.define(_FLOAT, "(Tensor input, Tensor weight, Tensor? bias, int size) -> Tensor")
# Packed weights dispatch to a key of their own.
torch.library.impl(_INT8, ("CPU", "MkldnnCPU"), int8_product)
torch.library.impl(_FLOAT, ("CPU", "MkldnnCPU"), float_product)
torch.library.register_fake(_INT8, _int8_shape)
torch.library.register_fake(_FLOAT, _float_shape)

traceable_int8_product = torch.ops.euryale.int8_product
traceable_float_product = torch.ops.euryale.float_product
