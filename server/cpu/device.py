"""The CPU as a device."""

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from server.cpu.accelerate import accelerate
from server.cpu.cpu_info import cpu_name
from server.cpu.int8_linear import can_quantize
from server.cpu.packed_linear import pack_linears
from server.device.base import Accelerated, AccelerateOptions, Device
from server.errors import ConfigError
from server.kv.kv_cache import KVLayout

_MAX_CACHE_BYTES = 4 << 30
_MEMORY_SHARE = 0.25


class CpuDevice(Device):
    """The CPU, with all of its cores."""

    kind = "cpu"
    default_dtype = torch.float32
    can_compile = True
    # About three times the time of a decode step of the built-in model.
    max_prefill_tokens = 64

    @staticmethod
    @override
    def is_available() -> bool:
        return True

    @property
    @override
    def model_name(self) -> str:
        return cpu_name()

    @override
    def cache_bytes(self) -> int:
        available = psutil.virtual_memory().available
        return min(int(available * _MEMORY_SHARE), _MAX_CACHE_BYTES)

    @override
    def synchronize(self) -> None:
        """Return at once: a CPU has computed when a call returns."""

    @override
    def _check_int8(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            super()._check_int8(dtype)
        if not can_quantize():
            raise ConfigError(
                "quantization is 'int8', but this build of torch has no int8 product for this CPU; "
                "give 'none'"
            )

    @override
    def pack(self, module: nn.Module) -> None:
        pack_linears(module)

    @override
    def accelerate(
        self, model: PreTrainedModel, layout: KVLayout, options: AccelerateOptions
    ) -> Accelerated:
        return accelerate(model, layout, options)
