"""CUDA GPUs as devices."""

import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from heads.packed_product import PackedProduct
from server.device.base import Accelerated, AccelerateOptions, Device, DraftProducts
from server.kv.kv_cache import KVLayout

_MEMORY_SHARE = 0.85


class CudaDevice(Device):
    """A CUDA GPU."""

    kind = "cuda"
    default_dtype = torch.bfloat16

    @staticmethod
    @override
    def is_available() -> bool:
        return torch.cuda.is_available()

    @property
    @override
    def model_name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    @override
    def cache_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0] * _MEMORY_SHARE)

    @override
    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    @override
    def pack(self, module: nn.Module) -> None:
        """Leave the layers as they are: plain ones are fast."""

    @override
    def accelerate(
        self, model: PreTrainedModel, layout: KVLayout, options: AccelerateOptions
    ) -> Accelerated:
        return Accelerated(
            attention="sdpa" if options.attention == "auto" else options.attention,
            draft_products=DraftProducts(PackedProduct, self.pack),
            quantization=options.quantization,
            is_compiled=False,
            own_code={},
        )
