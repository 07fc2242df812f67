"""What commands share: the base model and its options, and options that are saved."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.cli.options import Command, Count, to_toml_file
from server.config import DeviceName, DtypeName
from server.device.create import create_device
from server.model.loading import LoadedModel, load_model
from training.data.jsonl import replace_file
from training.resuming import MAY_CHANGE

_LOGGER = logging.getLogger("euryale.training")
# It says what to do to a directory, not how a run is made; a saved one would drop its own run.
_NOT_SAVED = {"overwrite"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Base model.

    Attributes:
        model: Hub id, directory, .gguf file, or `smollm2` for the built-in model.
        device: Where the model runs; `auto` takes CUDA if there is a device.
        dtype: Type of its weights; `auto` is float32 on CPU and bfloat16 on CUDA.
        num_threads: CPU threads; not given, torch decides.
    """

    model: str = "smollm2"
    device: DeviceName = field(default="auto", metadata=MAY_CHANGE)
    dtype: DtypeName = "auto"
    num_threads: Count | None = field(default=None, metadata=MAY_CHANGE)

    def load(
        self,
        heads: Path | None = None,
        is_packed: bool = True,
        device: str | None = None,
        dtype: str | None = None,
    ) -> LoadedModel:
        """Load the model.

        Args:
            heads: A heads checkpoint; an adapter that it carries is merged in.
            is_packed: Whether linear layers may be replaced by faster ones without gradients.
            device: Where to, in place of the option.
            dtype: Type of the weights, in place of the option.

        Raises:
            ModelError: If the model cannot be loaded.
            ConfigError: If the heads or their adapter cannot be read.
            HeadsMismatchError: If the heads belong to another base model.
        """
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        _LOGGER.info("loading model %s", self.model)
        where, weights = device or self.device, dtype or self.dtype
        loaded = load_model(self.model, where, weights, heads)
        if is_packed:
            create_device(loaded.device).pack(loaded.model)
        return loaded


def save_options(path: Path, command: Command, arguments: Mapping[str, Any]) -> None:
    """Write all options of a run, so that `--config` reads them again.

    Args:
        path: File to write; replaced whole.
        command: The command that was run.
        arguments: What it was run with, by the names of its settings.

    Raises:
        RunError: If the file cannot be written.
    """
    title = f"# python -m training {command.name} --config {path.name}\n"
    replace_file(path, (title + to_toml_file(command, arguments, _NOT_SAVED)).encode())
