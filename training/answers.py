"""The answers that a command works on: one or more files, checked against the base model."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from server.model.loading import LoadedModel
from training.base_model import check_base
from training.dataset import Corpus, build_corpus
from training.distilled import DistilledTurns, read_distilled
from training.errors import DataError
from training.jsonl import file_sha256


@dataclass(frozen=True, slots=True)
class Answers:
    """What all files hold together.

    Attributes:
        sha256: Of the file; of all files' digests, in order, if there are several.
    """

    corpus: Corpus
    sha256: str


def load_answers(paths: Sequence[Path], loaded: LoadedModel, limit: int | None = None) -> Answers:
    """Read files whose answers the base model wrote.

    Args:
        paths: What `distill` wrote, compressed or not; read one after the other.
        loaded: The base model.
        limit: Number of conversations to read; None reads all.

    Raises:
        DataError: If a file is broken or of another base model, if a conversation is there twice,
            or if no answer has two tokens.
    """
    for path in paths:
        check_base(path, loaded)
    corpus = build_corpus(islice(_conversations(paths), limit), loaded.vocab_size)
    if corpus.num_examples == 0:
        names = ", ".join(map(str, paths))
        raise DataError(f"{names}: no answer has two tokens; distill more")
    return Answers(corpus, data_sha256(paths))


def data_sha256(paths: Sequence[Path]) -> str:
    """Hex digest of a file as it lies on disk, or of the digests of several."""
    digests = [file_sha256(path) for path in paths]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _conversations(paths: Sequence[Path]) -> Iterator[DistilledTurns]:
    seen: dict[str, str] = {}
    for path in paths:
        for conversation in read_distilled(path):
            if conversation.id in seen:
                raise DataError(
                    f"{conversation.where}: conversation {conversation.id!r} is also at "
                    f"{seen[conversation.id]}; give each conversation once"
                )
            seen[conversation.id] = conversation.where
            yield conversation
