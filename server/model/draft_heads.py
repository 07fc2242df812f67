"""Loads draft heads for a loaded base model, with the server's own errors."""

from pathlib import Path

from heads.checkpoint import LoadedHeads, load_heads
from heads.errors import HeadsCheckpointError
from heads.errors import HeadsMismatchError as CheckpointMismatchError
from server.errors import ConfigError, HeadsMismatchError
from server.model.adapter import adapter_sha256
from server.model.loading import LoadedModel


def load_draft_heads(directory: Path, loaded: LoadedModel) -> LoadedHeads:
    """Load a heads checkpoint onto the base model's device, in its dtype.

    Raises:
        HeadsMismatchError: If the heads belong to another base model, or to the same one with
            another adapter.
        ConfigError: If the checkpoint is missing, damaged or of an unknown kind.
    """
    try:
        found = load_heads(
            directory,
            loaded.unembedding(),
            loaded.input_embedding(),
            loaded.fingerprint,
            loaded.device,
            loaded.dtype,
        )
    except CheckpointMismatchError as error:
        raise HeadsMismatchError(str(error)) from error
    except HeadsCheckpointError as error:
        raise ConfigError(str(error)) from error
    needed = None if found.adapter is None else adapter_sha256(found.adapter)
    if needed != loaded.adapter_sha256:
        raise HeadsMismatchError(
            f"the heads in {directory} belong to {loaded.name} with the adapter {needed}, but it "
            f"was loaded with the adapter {loaded.adapter_sha256}; load the model for these heads"
        )
    return found
