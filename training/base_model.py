"""The base model that a command works with, checked against the data."""

from pathlib import Path

import torch

from server.device.create import create_device
from server.model.loading import LoadedModel, load_model
from training.distilled import Manifest
from training.errors import DataError
from training.options import ModelOptions
from training.progress import note


def load_base(
    options: ModelOptions,
    heads: Path | None = None,
    is_packed: bool = True,
    device: torch.device | None = None,
) -> LoadedModel:
    """Load the base model that the options name.

    Args:
        options: Name, device and dtype.
        heads: A heads checkpoint; an adapter that it carries is merged in.
        is_packed: Whether linear layers may be replaced by faster ones without autograd.
        device: Where to, instead of the options' device.

    Raises:
        ModelError: If that fails.
        ConfigError: If the heads or their adapter cannot be read.
        HeadsMismatchError: If the heads belong to another base model.
    """
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    note(f"loading model {options.model}")
    where = options.device if device is None else str(device)
    loaded = load_model(options.model, where, options.dtype, heads)
    if is_packed:
        create_device(loaded.device).pack(loaded.model)
    return loaded


def check_base(data: Path, loaded: LoadedModel) -> bool:
    """Refuse data that another base model wrote; False if no manifest says which one did.

    Raises:
        DataError: If the data's manifest is damaged or names another base.
    """
    manifest = Manifest.load(data)
    if manifest is None:
        return False
    difference = manifest.fingerprint.difference(loaded.fingerprint)
    if difference is not None:
        raise DataError(
            f"{data} holds answers of {manifest.model}, not of {loaded.name}: "
            f"{difference}; distill with the model you train for"
        )
    return True
