"""What depends on the device that a model runs on.

Whoever must know something of this kind asks a `Device`; nobody else asks which one it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.config import CompileName, QuantizationName
from server.errors import ConfigError
from server.kv.kv_cache import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class AccelerateOptions:
    """How fast a model is to be made.

    Attributes:
        quantization: `int8` stores the weights of its linear layers in 8 bits.
        compile: Whether code is compiled on this machine; `auto` does so where it can.
        attention: Name of an attention backend; `auto` takes the device's best one.
        has_heads: Whether draft heads will run along with the model.
    """

    quantization: QuantizationName = "none"
    compile: CompileName = "off"
    attention: str = "auto"
    has_heads: bool = False


@dataclass(frozen=True, slots=True)
class DraftProducts:
    """How draft heads multiply on a device.

    Attributes:
        make: Makes the product with the transpose of a matrix [outputs, inputs] that nobody writes
            to any more.
        replace_linears: Replaces the linear layers of a module, in place, by faster ones without
            autograd.
        is_own: Whether these are products of our own machine code, several of which in a row beat
            one batched product of torch.
    """

    make: Callable[[Tensor], Callable[[Tensor], Tensor]]
    replace_linears: Callable[[nn.Module], object]
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class Accelerated:
    """What a device made of a model.

    Attributes:
        attention: Name of the attention backend that the model is to run with.
        draft_products: How draft heads are to multiply.
        quantization: How the weights of the model's linear layers are stored: `int8`, or `none` for
            the model's own type.
        is_compiled: Whether the model's decoder layers run compiled.
        own_code: Which other parts of a step run machine code that was compiled here; like the
            attention, something that the cost of a step depends on.
    """

    attention: str
    draft_products: DraftProducts
    quantization: QuantizationName
    is_compiled: bool
    own_code: Mapping[str, bool]


class Device(ABC):
    """A place where models run.

    Args:
        torch_device: The device as torch names it.

    Attributes:
        kind: The device's type, as torch and the option `device` name it.
        can_compile: Whether decoder layers can be compiled for it.
        default_dtype: Type of weights and activations if none is asked for.
        max_prefill_tokens: Prompt tokens of a step in which sequences decode, if the options give
            no number; None sets no limit.
    """

    kind: ClassVar[str]
    default_dtype: ClassVar[torch.dtype]
    can_compile: ClassVar[bool] = False
    max_prefill_tokens: ClassVar[int | None] = None

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Whether this machine has such a device."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The hardware's name, such as that of the processor."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Memory that a KV cache may take at present if the options give no size."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was launched has been computed."""

    @abstractmethod
    def accelerate(
        self, model: PreTrainedModel, layout: KVLayout, options: AccelerateOptions
    ) -> Accelerated:
        """Make a model as fast as the device can, in place; it must not be moved or cast later.

        Args:
            model: A model on this device, without gradients.
            layout: Layout of the KV cache that the model will run with.
            options: Options that `check` has passed.

        Raises:
            ConfigError: If something that the options insist on is impossible.
        """

    @abstractmethod
    def pack(self, module: nn.Module) -> None:
        """Replace a module's linear layers, in place, by faster ones that compute the same.

        They have no gradients and no parameters; a device on which plain ones are fast leaves them.
        """

    def check(self, dtype: torch.dtype, options: AccelerateOptions) -> None:
        """Refuse options that this device cannot follow, before a model is loaded.

        Raises:
            ConfigError: Names the option, its value and the remedy.
        """
        if options.quantization not in ("none", "int8"):
            raise ConfigError(f"quantization is {options.quantization!r}; give 'none' or 'int8'")
        if options.quantization == "int8":
            self._check_int8(dtype)
        if options.compile == "on" and not self.can_compile:
            raise ConfigError(
                f"compile is 'on', but the model is on {self.torch_device}; it is for cpu, give "
                "'off'"
            )

    def _check_int8(self, dtype: torch.dtype) -> None:
        """Refuse int8 weights with activations of this type."""
        raise ConfigError(
            f"quantization is 'int8' with {str(dtype).removeprefix('torch.')} on {self.kind}, but "
            "it is for float32 on cpu; give device 'cpu' with dtype 'float32', or quantization "
            "'none'"
        )

    def dtype(self, name: str) -> torch.dtype:
        """Find the type of a name; `auto` is the device's own.

        Raises:
            ConfigError: If there is no such type.
        """
        if name == "auto":
            return self.default_dtype
        if name not in DTYPES:
            raise ConfigError(f"dtype is {name!r}; give 'auto' or one of {sorted(DTYPES)}")
        return DTYPES[name]
