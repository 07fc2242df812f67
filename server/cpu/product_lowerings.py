"""How torch's compiler calls the products of `product_operators`: by its own C++ entry points.

Without these our operators are called by way of Python, four times in each decoder layer.

NOTE: These are parts of inductor that it does not promise to keep; where they are gone or changed,
the model runs uncompiled, with the reason.
"""

import functools
from typing import Any

import torch

from server.cpu.product_operators import traceable_float_product, traceable_int8_product


@functools.cache
def register_product_lowerings() -> None:
    """Make the products known to the compiler; imports it, which takes seconds."""
    from torch._inductor import ir, mkldnn_ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    def float_product(input_I: Any, weight: Any, bias_O: Any, size: int) -> Any:
        kernel = mkldnn_ir.LinearUnary
        input_I = kernel.require_contiguous(kernel.realize_input(input_I))
        # NOTE: `LinearUnary.create` would ask for a contiguous weight, and so read a packed one as
        # a plain one.
        tensors = [x for x in (weight, bias_O) if x is not None]
        product = kernel(
            layout=ir.FixedLayout(
                device=input_I.get_device(),
                dtype=input_I.get_dtype(),
                size=[*input_I.get_size()[:-1], size],
            ),
            inputs=[input_I, *(kernel.realize_input(x) for x in tensors)],
            constant_args=[*([None] if bias_O is None else []), "none", [-1], ""],
        )
        create_output: Any = mkldnn_ir._create_output_node
        return ir.TensorBox.create(create_output(product))

    def int8_product(codes_TI: Any, weight: Any, scale_O: Any, zero_O: Any) -> Any:
        scale = V.graph.add_tensor_constant(torch.tensor(1.0), name="code_scale")
        zero = V.graph.add_tensor_constant(torch.tensor(0, dtype=torch.int32), name="code_zero")
        create: Any = mkldnn_ir.QLinearPointwisePT2E.create
        tensors = (codes_TI, scale, zero, weight, scale_O, zero_O, None)
        return ir.TensorBox.create(create(*tensors, 1.0, 0, torch.float32, "none", [], ""))

    register_lowering(traceable_float_product.default, type_promotion_kind=None)(float_product)
    register_lowering(traceable_int8_product.default, type_promotion_kind=None)(int8_product)
