"""The devices by name; a new one is a room with a `Device` and a line in the table."""

import pkgutil
from types import MappingProxyType

import torch

from server.device.base import Device
from server.errors import ConfigError

# `auto` takes the first one that this machine has. Names and not imports, as the members lie in
# rooms above this one.
DEVICES = MappingProxyType(
    {
        "cuda": "server.cuda.device:CudaDevice",
        "cpu": "server.cpu.device:CpuDevice",
    }
)


def create_device(name: str | torch.device) -> Device:
    """Find a device.

    Args:
        name: As torch names it, such as `cpu` or `cuda:1`; `auto` takes the best there is.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        return next(found(torch.device(kind)) for kind in DEVICES if (found := _member(kind)))
    try:
        torch_device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {str(name)!r}; give 'auto', 'cpu' or 'cuda'") from error
    kind = torch_device.type
    if kind not in DEVICES:
        raise ConfigError(f"device is {str(name)!r}, which is not supported; give 'cpu' or 'cuda'")
    member = _member(kind)
    if member is None:
        raise ConfigError(
            f"device is {str(name)!r}, but torch sees no {kind.upper()} device; give 'cpu'"
        )
    return member(torch_device)


def _member(kind: str) -> type[Device] | None:
    """The class of a device; None if this machine has no such device."""
    found: type[Device] = pkgutil.resolve_name(DEVICES[kind])
    return found if found.is_available() else None
