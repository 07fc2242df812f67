"""The answers that a command works on: files or data sets, checked against the base model.

Each may hold distilled conversations, whose tokens stand as the base model drew them, or those of
others (see `training.data.supervised`), tokenised here; a line shows by its fields which it is.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from server.model.loading import LoadedModel
from training.data.data_source import DataSource, OpenData, open_data
from training.data.dataset import Corpus, TokenizedConversation, build_corpus
from training.data.distilled import Manifest, distilled_conversation, is_distilled
from training.data.prompts import given_id
from training.data.supervised import tokenize_row
from training.errors import DataError

_LOGGER = logging.getLogger("euryale.training")
_NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class Answers:
    """What all sources hold together.

    Attributes:
        corpus: The answers as documents.
        sha256: Digest of the source; of all sources' digests, in order, if there are several.
    """

    corpus: Corpus
    sha256: str


def load_answers(
    sources: Sequence[DataSource], loaded: LoadedModel, limit: int | None = None
) -> Answers:
    """Read all sources; conversations beyond the context are left out, counted and noted.

    Args:
        sources: Files and data sets, read one after the other.
        loaded: Base model that wrote the answers or is to learn from them.
        limit: Number of conversations to read; None reads all.

    Raises:
        DataError: If a source is broken or of another base model, if a conversation is there twice,
            or if no answer has two tokens.
    """
    opened = [open_data(source) for source in sources]
    checked = [isinstance(s, Path) and check_base(s, loaded) for s in sources]
    found = islice(_conversations(zip(opened, checked, strict=True), loaded), limit)
    corpus = build_corpus(_fitting(found, loaded.max_model_len), loaded.vocab_size)
    if corpus.num_examples == 0:
        names = ", ".join(map(str, sources))
        raise DataError(
            f"{names}: no answer has two tokens and fits the context of {loaded.max_model_len}; "
            "give more answers"
        )
    return Answers(corpus, data_sha256(opened))


def check_base(data: Path, loaded: LoadedModel) -> bool:
    """Check that no other base model wrote the data; False if no manifest says which one did.

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


def data_sha256(opened: Sequence[OpenData]) -> str:
    """Hex digest of a source, or of the digests of several."""
    digests = [data.sha256() for data in opened]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _conversations(
    opened: Iterable[tuple[OpenData, bool]], loaded: LoadedModel
) -> Iterator[TokenizedConversation]:
    """All rows of all sources, which come with whether a manifest names this base model."""
    seen: dict[str, str] = {}
    for data, is_checked in opened:
        is_noted = False
        for row in data.rows():
            name = given_id(row)
            if name in seen:
                raise row.error(
                    f"conversation {name!r} is also at {seen[name]}; give each conversation once"
                )
            if name is not None:
                seen[name] = row.where
            if not is_distilled(row):
                yield tokenize_row(row, loaded.tokenizer)
                continue
            if not (is_checked or is_noted):
                _LOGGER.info(
                    "%s has no manifest: whether %s wrote it is not checked",
                    data.source,
                    loaded.name,
                )
                is_noted = True
            yield distilled_conversation(row)


def _fitting(
    conversations: Iterable[TokenizedConversation], max_model_len: int
) -> Iterator[TokenizedConversation]:
    """Drop what is longer than the context, and say so at the end."""
    too_long: list[str] = []
    for conversation in conversations:
        if conversation.length <= max_model_len:
            yield conversation
        else:
            too_long.append(f"{conversation.where} ({conversation.length} tokens)")
    if too_long:
        more = "" if len(too_long) <= _NUM_NAMED else ", and so on"
        _LOGGER.info(
            "left out %d conversations longer than the context of %d tokens: %s%s",
            len(too_long),
            max_model_len,
            ", ".join(too_long[:_NUM_NAMED]),
            more,
        )
