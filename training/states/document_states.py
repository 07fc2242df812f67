"""The hidden states on disk of the documents of one base model.

A document's key is a digest of its tokens, the base model, the type that it computes in and the
type that is kept; so states of another base or type are not found rather than mistaken.

Shape suffixes: X tokens of one document, D model width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from server.config import DtypeName
from server.errors import ModelError
from server.model.loading import LoadedModel
from training.data.dataset import Document
from training.errors import DataError
from training.states.hidden_store import HiddenStore

# What a killed run loses at most, and what is in memory before it is written.
_FILE_BYTES = 64 << 20


class DocumentStates:
    """Keeps hidden states of all tokens of a document but the last, after the final norm.

    Args:
        directory: Holds the states; processes and runs may share it.
        loaded: Base model that the states are of.
        dtype: Type of the states on disk; `auto` is the base model's, which loses nothing.

    Attributes:
        dtype: Type of the states on disk.
        max_tokens: Tokens of the documents that should go into one file.

    Raises:
        DataError: If a file in the directory is damaged or holds something else.
        RunError: If it is no directory.
    """

    def __init__(self, directory: Path, loaded: LoadedModel, dtype: DtypeName = "auto") -> None:
        self.dtype: torch.dtype = loaded.dtype if dtype == "auto" else getattr(torch, dtype)
        self.max_tokens = _FILE_BYTES // (loaded.hidden_size * self.dtype.itemsize)
        self._hidden_size = loaded.hidden_size
        self._base = _base_digest(loaded, self.dtype)
        self._store = HiddenStore(directory)

    def refresh(self) -> None:
        """Take note of what other processes have kept."""
        self._store.refresh()

    def missing(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents whose states are not kept yet, each once, in order."""
        by_key = {self._key(document): document for document in documents}
        return [document for key, document in by_key.items() if key not in self._store]

    def add(self, documents: Sequence[Document], states: Sequence[Tensor]) -> None:
        """Keep the states XD of documents, in one file.

        Raises:
            ModelError: If they do not fit the type that is kept.
            RunError: If the disk is full or fails.
        """
        self._store.write(
            {
                self._key(document): self._converted(document, hidden_XD)
                for document, hidden_XD in zip(documents, states, strict=True)
            }
        )

    def read(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return the states XD of documents that are not missing, on the CPU.

        Raises:
            DataError: If a file is damaged.
        """
        stored = self._store.read([self._key(document) for document in documents])
        for document, hidden_XD in zip(documents, stored, strict=True):
            expected = (len(document.token_ids_T) - 1, self._hidden_size)
            if hidden_XD.shape != expected or hidden_XD.dtype != self.dtype:
                raise DataError(
                    f"the hidden states kept for conversation {document.conversation_id!r} are "
                    f"{tuple(hidden_XD.shape)} of {hidden_XD.dtype}, not {expected} of "
                    f"{self.dtype}; give another --hidden-cache"
                )
        return stored

    def _key(self, document: Document) -> str:
        token_ids = document.token_ids_T.numpy().astype("<i8").tobytes()
        return hashlib.sha256(self._base + token_ids).hexdigest()[:40]

    def _converted(self, document: Document, hidden_XD: Tensor) -> Tensor:
        kept_XD = hidden_XD.to(self.dtype)
        if not torch.equal(kept_XD.isinf(), hidden_XD.isinf()):
            raise ModelError(
                f"hidden states of conversation {document.conversation_id!r} reach "
                f"{float(hidden_XD.abs().max()):.4g}, which {self.dtype} cannot hold; give "
                "--hidden-cache-dtype bfloat16"
            )
        return kept_XD


def _base_digest(loaded: LoadedModel, stored_dtype: torch.dtype) -> bytes:
    """Stands for everything but the tokens that hidden states depend on."""
    identity = {
        "fingerprint": asdict(loaded.fingerprint),
        "adapter_sha256": loaded.adapter_sha256,
        "dtype": str(loaded.dtype),
        "stored_dtype": str(stored_dtype),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
