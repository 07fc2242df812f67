"""Devices by name, and what is refused before a model is loaded."""

import pytest
import torch

from server.cpu.device import CpuDevice
from server.cuda.device import CudaDevice
from server.device.base import AccelerateOptions
from server.device.create import DEVICES, create_device
from server.errors import ConfigError

INT8 = AccelerateOptions(quantization="int8")


@pytest.fixture
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("_no_cuda")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    device = create_device("auto")
    assert type(device) is CpuDevice
    assert device.torch_device == torch.device("cpu")


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_is_taken_where_there_is_one(name: str | torch.device) -> None:
    device = create_device(name)
    assert type(device) is CudaDevice
    assert device.torch_device == torch.device("cuda" if name == "auto" else name)


@pytest.mark.usefixtures("_no_cuda")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{name}', but torch sees no CUDA device"):
        create_device(name)


@pytest.mark.parametrize("name", ["tpu", "meta", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{name}'"):
        create_device(name)


@pytest.mark.usefixtures("_cuda")
def test_members_carry_the_name_by_which_they_are_found() -> None:
    assert {kind: create_device(kind).kind for kind in DEVICES} == {kind: kind for kind in DEVICES}


@pytest.mark.usefixtures("_cuda")
def test_types_have_names_and_each_device_its_own() -> None:
    assert create_device("cpu").dtype("auto") == torch.float32
    assert create_device("cuda").dtype("auto") == torch.bfloat16
    assert create_device("cuda").dtype("float16") == torch.float16
    with pytest.raises(ConfigError, match="dtype is 'int4'; give 'auto' or one of"):
        create_device("cpu").dtype("int4")


class TestCheck:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_int8_is_for_float32(self, dtype: str) -> None:
        with pytest.raises(ConfigError, match=f"'int8' with {dtype} on cpu.*give device 'cpu'"):
            create_device("cpu").check(getattr(torch, dtype), INT8)

    @pytest.mark.usefixtures("_cuda")
    def test_int8_is_for_the_cpu(self) -> None:
        with pytest.raises(ConfigError, match="'int8' with float32 on cuda, but it is for float32"):
            create_device("cuda").check(torch.float32, INT8)

    def test_int8_is_refused_where_the_cpu_cannot_do_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="no int8 product for this CPU; give 'none'"):
            create_device("cpu").check(torch.float32, INT8)

    @pytest.mark.usefixtures("_cuda")
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("name", ["int4", "fp8", "awq", ""])
    def test_an_unknown_quantization_is_refused(self, device: str, name: str) -> None:
        options = AccelerateOptions(quantization=name)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"quantization is '{name}'; give 'none' or"):
            create_device(device).check(torch.float32, options)

    @pytest.mark.usefixtures("_cuda")
    def test_compiling_is_for_the_cpu(self) -> None:
        for device, compile_on in (("cpu", True), ("cuda", False)):
            create_device(device).check(torch.float32, AccelerateOptions(compile="auto"))
            assert create_device(device).can_compile == compile_on
        create_device("cpu").check(torch.float32, AccelerateOptions(compile="on"))
        with pytest.raises(ConfigError, match="the model is on cuda; it is for cpu, give 'off'"):
            create_device("cuda").check(torch.float32, AccelerateOptions(compile="on"))
