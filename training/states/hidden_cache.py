"""Hidden states that are computed once and kept on disk, for all later runs, files and methods.

Shape suffixes: X tokens of one document, N roots, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from server.config import DtypeName
from server.model.loading import LoadedModel
from training.data.dataset import Document
from training.errors import RunError
from training.resuming import MAY_CHANGE
from training.states.document_states import DocumentStates
from training.states.hidden_states import HiddenStateEncoder


@dataclass(frozen=True, kw_only=True)
class HiddenCacheOptions:
    """Where hidden states are kept on disk.

    Attributes:
        hidden_cache: Directory of hidden states, which runs may share; not given, none are kept.
        hidden_cache_dtype: Type of the states on disk; `auto` is the base model's, which loses
            nothing.

    Raises:
        RunError: If there is a type but no directory.
    """

    hidden_cache: Path | None = field(default=None, metadata=MAY_CHANGE)
    hidden_cache_dtype: DtypeName = "auto"

    def __post_init__(self) -> None:
        if self.hidden_cache is None and self.hidden_cache_dtype != "auto":
            raise RunError(
                f"hidden_cache_dtype is {self.hidden_cache_dtype}, but there is no directory to "
                "keep hidden states in; give --hidden-cache too or leave it out"
            )

    def open_states(self, loaded: LoadedModel) -> DocumentStates | None:
        """Return the states of a base model's documents on disk; None without a directory.

        Raises:
            DataError: If a file in the directory is damaged or holds something else.
            RunError: If it is no directory.
        """
        if self.hidden_cache is None:
            return None
        return DocumentStates(self.hidden_cache, loaded, self.hidden_cache_dtype)

    def open_cache(
        self, encoder: HiddenStateEncoder, loaded: LoadedModel
    ) -> "HiddenStateCache | None":
        """Return the same with what computes states that are missing; see `open_states`."""
        kept = self.open_states(loaded)
        return None if kept is None else HiddenStateCache(kept, encoder)


class HiddenStateCache:
    """Reads hidden states, and computes and keeps those that are not there yet.

    Args:
        kept: States on disk of the encoder's base model.
        encoder: Computes what is missing.

    Attributes:
        dtype: Type of the states that are returned.
    """

    def __init__(self, kept: DocumentStates, encoder: HiddenStateEncoder) -> None:
        self.dtype = encoder.dtype
        self._kept = kept
        self._encoder = encoder

    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `HiddenStates.encode` does."""
        return self._rows(documents, [document.roots() - 1 for document in documents])

    def encode_answers(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `HiddenStates.encode_answers` does."""
        return self._rows(documents, [document.answers() - 1 for document in documents])

    def encode_all(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `HiddenStates.encode_all` does.

        Raises:
            ModelError: If a document is longer than the model's context, or its states do not fit
                the type that is kept.
            DataError: If a file is damaged.
            RunError: If what is missing cannot be written.
        """
        self.fill(documents, lambda _: None)
        stored = self._kept.read(documents)
        device = self._encoder.device
        return [hidden_XD.to(device, self.dtype, copy=True) for hidden_XD in stored]

    def refresh(self) -> None:
        """Take note of what other processes have kept."""
        self._kept.refresh()

    def missing(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents whose states are not kept yet, each once, in order."""
        return self._kept.missing(documents)

    def fill(self, documents: Sequence[Document], on_documents: Callable[[int], None]) -> None:
        """Compute and keep what is missing; see `encode_all`.

        Args:
            documents: Any documents.
            on_documents: Called with the number of documents after each group.
        """
        for group in self._groups(self._kept.missing(documents)):
            self._kept.add(group, self._encoder.encode_all(group))
            on_documents(len(group))

    def _groups(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """Documents of one file each."""
        group: list[Document] = []
        num_tokens = 0
        for document in documents:
            length = len(document.token_ids_T)
            if group and num_tokens + length > self._kept.max_tokens:
                yield group
                group, num_tokens = [], 0
            group.append(document)
            num_tokens += length
        if group:
            yield group

    def _rows(self, documents: Sequence[Document], rows: Sequence[Tensor]) -> list[Tensor]:
        return [
            hidden_XD[rows_N.to(hidden_XD.device)]
            for rows_N, hidden_XD in zip(rows, self.encode_all(documents), strict=True)
        ]
