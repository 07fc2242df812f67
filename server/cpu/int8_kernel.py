"""Our own int8 product for x86 CPUs with AVX-512 VNNI, built from `int8_kernel.cpp` when needed.

oneDNN's product prepares itself for some 30 microseconds at each call and leaves the codes and the
scales to others, which is most of the time of a step of few tokens. This one writes the codes,
multiplies and scales in a single call.

Shapes: I input features, O output features, P panels of 32 outputs, G groups of 4 inputs.
"""

import ctypes
import functools
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from server.cpu.own_library import load_library
from server.errors import CompilationError

_SOURCE = Path(__file__).parent / "kernels" / "int8_kernel.cpp"
_NEEDED = {"avx512f", "avx512bw", "avx512_vnni"}
# As in the source. Inputs go into whole registers of codes.
_PANEL, _GROUP, _LANES = 32, 4, 16
# More inputs could overflow a sum of 32 bits.
_MAX_INPUTS = 65_536
_OPERATOR = "euryale::vnni_linear"


class Int8Kernel:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._set_num_threads = library.euryale_set_num_threads
        self._set_num_threads.argtypes = [ctypes.c_int]
        self._set_num_threads.restype = None
        self._linear = library.euryale_int8_linear
        self._linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4
        self._linear.restype = ctypes.c_int
        self.follow_threads()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def follow_threads(self) -> None:
        """Compute with as many threads as torch does at present."""
        self._set_num_threads(torch.get_num_threads())

    @staticmethod
    def takes(num_inputs: int) -> bool:
        """Whether a layer's sums cannot overflow."""
        return num_inputs <= _MAX_INPUTS

    @staticmethod
    def pack(codes_OI: Tensor) -> Tensor:
        """Put int8 weights `[O, I]` in the order in which they are read, int8 `[P, G, 32, 4]`.

        Raises:
            ValueError: If it does not take so many inputs.
        """
        num_outputs, num_inputs = codes_OI.shape
        if not Int8Kernel.takes(num_inputs):
            raise ValueError(f"a layer has {num_inputs} inputs; the kernel takes {_MAX_INPUTS}")
        padded = F.pad(codes_OI, (0, -num_inputs % _LANES, 0, -num_outputs % _PANEL))
        panels = padded.view(-1, _PANEL, padded.shape[1] // _GROUP, _GROUP)
        return panels.transpose(1, 2).contiguous()

    def linear(
        self,
        input_I: Tensor,
        weight: Tensor,
        scale_O: Tensor,
        ones_O: Tensor,
        bias_O: Tensor | None,
    ) -> Tensor:
        """Multiply rows with a packed weight; a row's output depends on that row alone, to the bit.

        Args:
            input_I: Float32 `[..., I]` on the CPU. Rows that are not finite, or whose spread is
                not, give NaN.
            weight: A weight that `pack` has packed.
            scale_O: Scale of each output's weights.
            ones_O: The outputs of a row of ones.
            bias_O: Added to each row's output; None adds nothing.

        Returns:
            Float32 `[..., O]`.

        Raises:
            ValueError: If the input is of another type or does not fit the weight.
        """
        if torch.compiler.is_exporting():
            traced: Tensor = torch.ops.euryale.vnni_linear(
                input_I.contiguous(), weight, scale_O, ones_O, bias_O
            )
            return traced
        input_I = input_I.contiguous()
        num_inputs, num_outputs = input_I.shape[-1], scale_O.shape[0]
        num_padded = weight.shape[1] * _GROUP
        is_float = input_I.dtype is torch.float32 and input_I.device.type == "cpu"
        if not is_float or not num_padded - _LANES < num_inputs <= num_padded:
            raise ValueError(
                f"rows are {input_I.dtype} on {input_I.device} with {num_inputs} features; give "
                f"float32 on cpu with the weight's (at most {num_padded})"
            )
        output_O = input_I.new_empty(*input_I.shape[:-1], num_outputs)
        failed = self._linear(
            input_I.data_ptr(),
            weight.data_ptr(),
            scale_O.data_ptr(),
            ones_O.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            output_O.data_ptr(),
            input_I.numel() // num_inputs,
            num_inputs,
            num_padded,
            num_outputs,
        )
        if failed:
            raise MemoryError("there is no memory for the codes of a layer's rows")
        return output_O


def _traced_shape(
    input_I: Tensor, weight: Tensor, scale_O: Tensor, ones_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    return input_I.new_empty(*input_I.shape[:-1], scale_O.shape[0])


torch.library.define(
    _OPERATOR, "(Tensor input, Tensor weight, Tensor scale, Tensor ones, Tensor? bias) -> Tensor"
)
torch.library.register_fake(_OPERATOR, _traced_shape)
# It has no implementation: it only stands in exported graphs.

# For torch's compiler: the operator, and what compiled code calls in its place.
KERNEL_SHIMS = {
    torch.ops.euryale.vnni_linear.default: [
        "AOTITorchError aoti_torch_cpu_vnni_linear(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, AtenTensorHandle*)"
    ]
}


def load_int8_kernel() -> Int8Kernel:
    """Load the kernel, and build it if no earlier start did.

    Raises:
        CompilationError: If this CPU cannot run it, or it cannot be built, or computes nonsense.
    """
    kernel = load_library(_SOURCE, _NEEDED, _checked)
    kernel.follow_threads()
    return kernel


def _checked(library: ctypes.CDLL) -> Int8Kernel:
    kernel = Int8Kernel(library)
    _check(kernel)
    return kernel


@functools.cache
def _example() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, scales, bias and the outputs that belong to them."""
    generator = torch.Generator().manual_seed(0)
    rows_TI = torch.randn(7, 50, generator=generator)
    codes_OI = torch.randint(-127, 128, (35, 50), generator=generator, dtype=torch.int8)
    scale_O = torch.rand(35, generator=generator)
    bias_O = torch.randn(35, generator=generator)
    weight_OI = codes_OI.double() * scale_O.double()[:, None]
    output_TO = rows_TI.double() @ weight_OI.T + bias_O.double()
    return rows_TI, codes_OI, scale_O, bias_O, output_TO


def _check(kernel: Int8Kernel) -> None:
    rows_TI, codes_OI, scale_O, bias_O, expected_TO = _example()
    ones_O = codes_OI.sum(1) * scale_O
    output_TO = kernel.linear(rows_TI, kernel.pack(codes_OI), scale_O, ones_O, bias_O)
    distance = float((output_TO - expected_TO).norm() / expected_TO.norm())
    if not distance < 1e-3:
        raise CompilationError(
            f"the int8 kernel computes something else than the product, at a relative distance of "
            f"{distance:.3g}"
        )
