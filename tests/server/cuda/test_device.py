"""What a CUDA device leaves to torch; the rest needs one."""

import copy

import pytest
import torch

from server.cuda.device import CudaDevice
from server.device.base import AccelerateOptions
from server.kv.kv_cache import KVLayout
from tests.support.engine_tools import tiny_reference

DEVICE = CudaDevice(torch.device("cuda"))


def test_a_model_stays_as_it_is() -> None:
    model = copy.deepcopy(tiny_reference())
    before = dict(model.named_modules())
    layout = KVLayout(3, 2, 8, 16, torch.bfloat16, torch.device("cuda"))
    accelerated = DEVICE.accelerate(model, layout, AccelerateOptions(compile="auto"))

    assert (accelerated.attention, accelerated.quantization) == ("sdpa", "none")
    assert not accelerated.is_compiled
    accelerated.draft_products.replace_linears(model)
    assert dict(model.named_modules()) == before


def test_an_attention_backend_can_be_asked_for() -> None:
    layout = KVLayout(3, 2, 8, 16, torch.bfloat16, torch.device("cuda"))
    options = AccelerateOptions(attention="my_package:Backend")
    assert DEVICE.accelerate(tiny_reference(), layout, options).attention == "my_package:Backend"


def test_prompts_beside_streams_are_not_cut_in_small_chunks() -> None:
    assert CudaDevice.max_prefill_tokens is None


@pytest.mark.gpu
def test_a_share_of_its_free_memory_is_for_the_cache() -> None:
    device = CudaDevice(torch.device("cuda:0"))
    device.synchronize()
    assert device.model_name
    assert 0 < device.cache_bytes() < torch.cuda.mem_get_info(device.torch_device)[1]
