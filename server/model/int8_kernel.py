"""Our own int8 product for x86 CPUs with AVX-512 VNNI, built from `int8_kernel.cpp` when needed.

oneDNN's product prepares itself for some 30 microseconds at each call and leaves the codes and the
scales to others, which is most of the time of a step of few tokens. This one writes the codes,
multiplies and scales at once.

It needs a C++ compiler once; the library stays in the cache under a digest of all that it hangs on.

NOTE: A kept library is machine code. The cache directory must be as safe as the installation.

Shapes: I input features, O output features, P panels of 32 outputs, G groups of 4 inputs.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from server.errors import CompilationError
from server.model.cache import cache_dir, partial_directory
from server.model.cpu_features import cpu_features

_SOURCE = Path(__file__).with_name("int8_kernel.cpp")
_NEEDED = {"avx512f", "avx512bw", "avx512_vnni"}
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 300.0
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
        self._linear.restype = None
        self.follow_threads()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def follow_threads(self) -> None:
        """Compute with as many threads as torch does at present."""
        self._set_num_threads(torch.get_num_threads())

    @staticmethod
    def pack(codes_OI: Tensor) -> Tensor:
        """Put int8 weights `[O, I]` in the order in which they are read, int8 `[P, G, 32, 4]`.

        Raises:
            ValueError: If there are so many inputs that a sum could overflow.
        """
        num_outputs, num_inputs = codes_OI.shape
        if num_inputs > _MAX_INPUTS:
            raise ValueError(f"a layer has {num_inputs} inputs, more than {_MAX_INPUTS}")
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
        """Multiply rows with a packed weight; a row's output hangs on that row alone, to the bit.

        Args:
            input_I: Float32 `[..., I]`. Rows that are not finite give NaN.
            weight: From `pack`.
            scale_O: Of each output's weights.
            ones_O: What a row of ones gives.
            bias_O: Added if there is one.

        Returns:
            Float32 `[..., O]`.
        """
        if torch.compiler.is_exporting():
            traced: Tensor = torch.ops.euryale.vnni_linear(
                input_I.contiguous(), weight, scale_O, ones_O, bias_O
            )
            return traced
        input_I = input_I.contiguous()
        num_inputs, num_outputs = input_I.shape[-1], scale_O.shape[0]
        output_O = input_I.new_empty(*input_I.shape[:-1], num_outputs)
        self._linear(
            input_I.data_ptr(),
            weight.data_ptr(),
            scale_O.data_ptr(),
            ones_O.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            output_O.data_ptr(),
            input_I.numel() // num_inputs,
            num_inputs,
            weight.shape[1] * _GROUP,
            num_outputs,
        )
        return output_O


def _traced_shape(
    input_I: Tensor, weight: Tensor, scale_O: Tensor, ones_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    return input_I.new_empty(*input_I.shape[:-1], scale_O.shape[0])


torch.library.define(
    _OPERATOR, "(Tensor input, Tensor weight, Tensor scale, Tensor ones, Tensor? bias) -> Tensor"
)
torch.library.register_fake(_OPERATOR, _traced_shape)

# For torch's compiler: the operator, and what compiled code calls in its place.
KERNEL_SHIMS = {
    torch.ops.euryale.vnni_linear.default: [
        "AOTITorchError aoti_torch_cpu_vnni_linear(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, AtenTensorHandle*)"
    ]
}


def load_int8_kernel(report: Callable[[str], None]) -> Int8Kernel:
    """Load the kernel, and build it if no earlier start did.

    Args:
        report: Called with a short line if it must be built.

    Raises:
        CompilationError: If this CPU cannot run it, or it cannot be built, or computes nonsense.
    """
    kernel = _loaded(report)
    kernel.follow_threads()
    return kernel


_kernels: dict[str, Int8Kernel] = {}


def _loaded(report: Callable[[str], None]) -> Int8Kernel:
    missing = _NEEDED - set(cpu_features().split())
    if missing:
        raise CompilationError(f"this CPU has no {', '.join(sorted(missing))}")
    digest = _digest()
    if digest not in _kernels:
        _kernels[digest] = _kept_or_built(cache_dir() / "kernels" / f"int8_{digest}.so", report)
    return _kernels[digest]


def _kept_or_built(path: Path, report: Callable[[str], None]) -> Int8Kernel:
    if path.exists():
        try:
            return _open(path)
        except CompilationError as error:
            report(f"{path} cannot be used, so it is made anew: {error}")
            path.unlink(missing_ok=True)
    report(f"building the int8 kernel (once; kept in {path})")
    try:
        _build(path)
    except OSError as error:
        raise CompilationError(f"the int8 kernel cannot be built: {error}") from error
    return _open(path)


def _open(path: Path) -> Int8Kernel:
    try:
        # Compiled blocks find its functions among the symbols of the process.
        kernel = Int8Kernel(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    except (OSError, AttributeError) as error:
        raise CompilationError(f"the int8 kernel cannot be loaded: {error}") from error
    _check(kernel)
    return kernel


def _build(path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    torch_root = Path(torch.__file__).parent
    with partial_directory(path) as partial:
        if path.exists():
            return
        built = partial / path.name
        places = [f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}"]
        command = [compiler, *_FLAGS, *places, str(_SOURCE), "-ltorch_cpu", "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CompilationError(f"{compiler} takes longer than {_SECONDS:.0f} s") from error
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise CompilationError(f"{compiler} cannot build the int8 kernel: {first}")
        built.replace(path)


def _digest() -> str:
    parts = (_SOURCE.read_text(encoding="utf-8"), _FLAGS, torch.__version__, cpu_features())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


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
