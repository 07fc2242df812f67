"""Merges the adapter that a heads checkpoint carries."""

import hashlib
from pathlib import Path

from torch import nn

from heads.checkpoint import BaseFingerprint, load_adapter
from heads.errors import HeadsCheckpointError, HeadsMismatchError
from heads.lora import AdapterFiles, merge_adapter


def merge_adapter_of(heads: Path, model: nn.Module, fingerprint: BaseFingerprint) -> str | None:
    """Merge the adapter of some heads into their base model's weights.

    Args:
        heads: Heads checkpoint.
        model: The base model with plain linear layers; changed in place.
        fingerprint: Fingerprint of the model as it is.

    Returns:
        Digest of the adapter; None, and nothing changed, if the heads have no adapter.

    Raises:
        HeadsMismatchError: If the heads belong to another base model.
        HeadsCheckpointError: If the checkpoint is missing or damaged, or the adapter does not fit.
    """
    try:
        files = load_adapter(heads, fingerprint)
        if files is None:
            return None
        merge_adapter(model, files)
    except HeadsMismatchError:
        raise
    except HeadsCheckpointError as error:
        raise HeadsCheckpointError(f"the base model for the heads in {heads}: {error}") from error
    return adapter_sha256(files)


def adapter_sha256(files: AdapterFiles) -> str:
    """Digest by which an adapter is recognised."""
    return hashlib.sha256(files.config + files.weights).hexdigest()
