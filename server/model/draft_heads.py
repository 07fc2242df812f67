"""Finds draft heads and loads them for a loaded base model."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

import heads as heads_package
from heads.checkpoint import load_heads
from heads.errors import HeadsMismatchError
from heads.kinds import BaseParts
from heads.lora import AdapterFiles
from heads.medusa import MedusaHeads
from heads.mtp import MTPModule
from heads.tree_search import AcceptanceProfile
from server.config import NATIVE_HEADS, SHIPPED_HEADS
from server.errors import ConfigError
from server.model.adapter import adapter_sha256
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel
from server.model.native_mtp import load_native_mtp

# Of the heads that ship for the built-in model; docs/benchmarks.md says why.
_DEFAULT_KIND = "medusa"


@dataclass(frozen=True, slots=True, eq=False)
class DraftHeads:
    """Draft heads of either kind, in eval mode.

    Attributes:
        layer: Runs the decoder layer of an MTP module, `heads.block`; None for Medusa heads.
        profile: Measured accept rates; None if the checkpoint has none.
        base_name: Name of the base model that the heads were trained for.
        adapter: What must be merged into that base model; None if nothing is.
    """

    heads: MedusaHeads | MTPModule
    layer: DecoderLayer | None
    profile: AcceptanceProfile | None
    base_name: str
    adapter: AdapterFiles | None = None


def heads_directory(heads: str, model: str) -> Path | None:
    """Find the checkpoint of the heads that the option `heads` names.

    Args:
        heads: As in `EngineConfig`.
        model: The base model, as in `EngineConfig`.

    Returns:
        Its directory; None if `heads` names no checkpoint or, with `auto`, if none ships for the
        model.

    Raises:
        ConfigError: If there is no such directory.
    """
    if heads in ("none", NATIVE_HEADS):
        return None
    if heads in ("auto", *SHIPPED_HEADS):
        kind = _DEFAULT_KIND if heads == "auto" else heads
        shipped = Path(heads_package.__path__[0]) / "pretrained" / f"{model}-{kind}"
        if model.isidentifier() and shipped.is_dir():
            return shipped
        if heads != "auto":
            raise ConfigError(
                f"heads is {heads!r}, but none of that kind ship for {model}; give a heads "
                "checkpoint, 'auto' or 'none'"
            )
        return None
    path = Path(heads)
    if not path.is_dir():
        raise ConfigError(
            f"heads is {heads!r}, which is no directory; give a heads checkpoint, 'auto', 'native' "
            "or 'none', or the kind of the heads that ship: 'medusa' or 'mtp'"
        )
    return path


def load_draft_heads(directory: Path, loaded: LoadedModel) -> DraftHeads:
    """Load a heads checkpoint onto the base model's device, in its dtype.

    Raises:
        HeadsMismatchError: If the heads belong to another base model, or to the same one with
            another adapter.
        HeadsCheckpointError: If the checkpoint is missing, damaged or of an unknown kind.
        ModelError: If it holds an MTP module, and the base model has no plain decoder layers.
    """
    # Only an MTP module asks for a layer, and not every base model has one to copy.
    layers: list[DecoderLayer] = []

    def make_layer() -> nn.Module:
        layers.append(DecoderLayer(loaded.model))
        return layers[-1].module

    found = load_heads(
        directory,
        BaseParts(loaded.unembedding(), loaded.input_embedding(), make_layer),
        loaded.fingerprint,
        loaded.device,
        loaded.dtype,
    )
    needed = None if found.adapter is None else adapter_sha256(found.adapter)
    if needed != loaded.adapter_sha256:
        raise HeadsMismatchError(
            f"the heads in {directory} belong to {loaded.name} with the adapter {needed}, but it "
            f"was loaded with the adapter {loaded.adapter_sha256}; load the model for these heads"
        )
    layer = layers[0] if layers else None
    return DraftHeads(found.heads, layer, found.profile, found.base_name, found.adapter)


def native_draft_heads(loaded: LoadedModel) -> DraftHeads:
    """Take the MTP layer that the base model's own checkpoint ships.

    Raises:
        ModelError: If it ships none, or one that cannot be read.
    """
    native = load_native_mtp(loaded)
    return DraftHeads(native.module, native.layer, None, loaded.name)
