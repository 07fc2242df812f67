"""Hidden states that are computed once and kept on disk, for all later runs, files and methods.

A document's key is a digest of its tokens, the base model, the type that it computes in and the
type that is kept; so states of another base or type are not found rather than mistaken.

Shape suffixes: X tokens of one document, N roots, D model width.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from server.config import DtypeName
from server.errors import ModelError
from server.model.loading import LoadedModel
from training.dataset import Document
from training.errors import DataError, RunError
from training.hidden_states import HiddenStateEncoder
from training.hidden_store import HiddenStore
from training.options import HiddenCacheOptions

# What a killed run loses at most, and what is in memory while it is computed.
_FILE_BYTES = 64 << 20


class HiddenStateCache:
    """Reads hidden states, and computes and keeps those that are not there yet.

    Args:
        directory: Of the states; shared by processes and runs.
        encoder: Computes what is missing.
        loaded: The encoder's base model.
        dtype: Of the states on disk; `auto` is the base model's, which loses nothing.

    Attributes:
        dtype: Of the states that are returned.

    Raises:
        DataError: If a file in the directory is damaged or holds something else.
        RunError: If it is no directory.
    """

    def __init__(
        self,
        directory: Path,
        encoder: HiddenStateEncoder,
        loaded: LoadedModel,
        dtype: DtypeName = "auto",
    ) -> None:
        self.dtype = encoder.dtype
        self._encoder = encoder
        self._device = loaded.device
        self._hidden_size = loaded.hidden_size
        self._stored_dtype = self.dtype if dtype == "auto" else getattr(torch, dtype)
        self._base = _base_digest(loaded, self._stored_dtype)
        self._store = HiddenStore(directory)

    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `HiddenStateEncoder.encode` does."""
        return self._rows(documents, [document.roots() - 1 for document in documents])

    def encode_answers(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `HiddenStateEncoder.encode_answers` does."""
        return self._rows(documents, [document.answers() - 1 for document in documents])

    def encode_all(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `HiddenStateEncoder.encode_all` does.

        Raises:
            ModelError: If a document is longer than the model's context, or its states do not fit
                the type that is kept.
            DataError: If a file is damaged.
            RunError: If what is missing cannot be written.
        """
        self.fill(documents, lambda _: None)
        stored = self._store.read([self._key(document) for document in documents])
        for document, hidden_XD in zip(documents, stored, strict=True):
            self._check(document, hidden_XD)
        return [hidden_XD.to(self._device, self.dtype, copy=True) for hidden_XD in stored]

    def refresh(self) -> None:
        """Take note of what other processes have kept."""
        self._store.refresh()

    def missing(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents whose states are not kept yet, each once, in order."""
        by_key = {self._key(document): document for document in documents}
        return [document for key, document in by_key.items() if key not in self._store]

    def fill(self, documents: Sequence[Document], on_documents: Callable[[int], None]) -> None:
        """Compute and keep what is missing; see `encode_all`.

        Args:
            documents: Any.
            on_documents: Called with the number of documents that were added.
        """
        for group in self._groups(self.missing(documents)):
            encoded = self._encoder.encode_all(group)
            self._store.write(
                {
                    self._key(document): self._converted(document, hidden_XD)
                    for document, hidden_XD in zip(group, encoded, strict=True)
                }
            )
            on_documents(len(group))

    def _rows(self, documents: Sequence[Document], rows: Sequence[Tensor]) -> list[Tensor]:
        return [
            hidden_XD[rows_N.to(hidden_XD.device)]
            for rows_N, hidden_XD in zip(rows, self.encode_all(documents), strict=True)
        ]

    def _key(self, document: Document) -> str:
        token_ids = document.token_ids_T.numpy().astype("<i8").tobytes()
        return hashlib.sha256(self._base + token_ids).hexdigest()[:40]

    def _groups(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """Documents of one file each."""
        max_tokens = _FILE_BYTES // (self._hidden_size * self._stored_dtype.itemsize)
        group: list[Document] = []
        num_tokens = 0
        for document in documents:
            length = len(document.token_ids_T)
            if group and num_tokens + length > max_tokens:
                yield group
                group, num_tokens = [], 0
            group.append(document)
            num_tokens += length
        if group:
            yield group

    def _converted(self, document: Document, hidden_XD: Tensor) -> Tensor:
        kept_XD = hidden_XD.to(self._stored_dtype)
        if not torch.equal(kept_XD.isinf(), hidden_XD.isinf()):
            raise ModelError(
                f"hidden states of conversation {document.conversation_id!r} reach "
                f"{float(hidden_XD.abs().max()):.4g}, which {self._stored_dtype} cannot hold; give "
                "--hidden-cache-dtype bfloat16"
            )
        return kept_XD

    def _check(self, document: Document, hidden_XD: Tensor) -> None:
        expected = (len(document.token_ids_T) - 1, self._hidden_size)
        if hidden_XD.shape != expected or hidden_XD.dtype != self._stored_dtype:
            raise DataError(
                f"the hidden states kept for conversation {document.conversation_id!r} are "
                f"{tuple(hidden_XD.shape)} of {hidden_XD.dtype}, not {expected} of "
                f"{self._stored_dtype}; give another --hidden-cache"
            )


def open_cache(
    options: HiddenCacheOptions, encoder: HiddenStateEncoder, loaded: LoadedModel
) -> HiddenStateCache | None:
    """Return the cache that options ask for; None if they ask for none.

    Raises:
        DataError: If a file in it is damaged or holds something else.
        RunError: If it is no directory, or has a type but no name.
    """
    if options.hidden_cache is not None:
        dtype = options.hidden_cache_dtype
        return HiddenStateCache(options.hidden_cache, encoder, loaded, dtype)
    if options.hidden_cache_dtype != "auto":
        raise RunError(
            f"hidden_cache_dtype is {options.hidden_cache_dtype}, but there is no directory to "
            "keep hidden states in; give --hidden-cache too or leave it out"
        )
    return None


def _base_digest(loaded: LoadedModel, stored_dtype: torch.dtype) -> bytes:
    """Stands for everything but the tokens that hidden states hang on."""
    identity = {
        "fingerprint": asdict(loaded.fingerprint),
        "adapter_sha256": loaded.adapter_sha256,
        "dtype": str(loaded.dtype),
        "stored_dtype": str(stored_dtype),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
