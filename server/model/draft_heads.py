"""Loads draft heads for a loaded base model."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from heads.checkpoint import load_heads
from heads.errors import HeadsMismatchError
from heads.kinds import BaseParts
from heads.lora import AdapterFiles
from heads.medusa import MedusaHeads
from heads.mtp import MTPModule
from heads.tree_search import AcceptanceProfile
from server.model.adapter import adapter_sha256
from server.model.decoder_block import DecoderBlock
from server.model.loading import LoadedModel
from server.model.native_mtp import load_native_mtp


@dataclass(frozen=True, slots=True, eq=False)
class DraftHeads:
    """Draft heads of either kind, in eval mode.

    Attributes:
        block: Runs `heads.block` of an MTP module; None for Medusa heads.
        profile: Measured accept rates, if the checkpoint has them.
        base_name: Name of the base model that the heads were trained for.
        adapter: What is merged into that base model, if anything.
    """

    heads: MedusaHeads | MTPModule
    block: DecoderBlock | None
    profile: AcceptanceProfile | None
    base_name: str
    adapter: AdapterFiles | None = None


def load_draft_heads(directory: Path, loaded: LoadedModel) -> DraftHeads:
    """Load a heads checkpoint onto the base model's device, in its dtype.

    Raises:
        HeadsMismatchError: If the heads belong to another base model, or to the same one with
            another adapter.
        HeadsCheckpointError: If the checkpoint is missing, damaged or of an unknown kind.
        ModelError: If it holds an MTP module, and the base model has no plain decoder blocks.
    """
    # Only an MTP module asks for a block, and not every base model has one to copy.
    blocks: list[DecoderBlock] = []

    def make_block() -> nn.Module:
        blocks.append(DecoderBlock(loaded.model))
        return blocks[-1].module

    found = load_heads(
        directory,
        BaseParts(loaded.unembedding(), loaded.input_embedding(), make_block),
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
    block = blocks[0] if blocks else None
    return DraftHeads(found.heads, block, found.profile, found.base_name, found.adapter)


def native_draft_heads(loaded: LoadedModel) -> DraftHeads:
    """Take the MTP layer that the base model's own checkpoint ships.

    Raises:
        ModelError: If it ships none, or one that cannot be read.
    """
    native = load_native_mtp(loaded)
    return DraftHeads(native.module, native.block, None, loaded.name)
