"""Answers as documents: token sequences of which the model wrote some spans.

Only those spans are trained on and measured; what a user wrote is context. No label crosses the end
of a span, and documents never see each other.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.errors import DataError

# Stands where a depth has no label because the answer ends before, or the token is not drafted.
NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """The answers of one conversation.

    Attributes:
        turns: Pairs of everything before an answer and the answer, as token ids.
        where: File and line, for messages.
    """

    id: str
    category: str
    turns: tuple[tuple[list[int], list[int]], ...]
    where: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer) for _, answer in self.turns)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that a model must take."""
        return max(len(prompt) + len(answer) for prompt, answer in self.turns)


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `[start, end)` of a document that hold one answer."""

    start: int
    end: int

    @property
    def num_examples(self) -> int:
        """Roots in the span that have a token to draft after them."""
        return max(0, self.end - self.start - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A token sequence with its answers.

    Attributes:
        token_ids_T: Int64, on the CPU.
        spans: In order, apart, and none at position 0.
    """

    conversation_id: str
    category: str
    token_ids_T: Tensor
    spans: tuple[Span, ...]

    @property
    def num_examples(self) -> int:
        """Training examples in all spans."""
        return sum(span.num_examples for span in self.spans)

    def roots(self) -> Tensor:
        """Return the positions of all root tokens, int64 `[num_examples]`, in order."""
        ranges = [torch.arange(span.start, span.end - 1) for span in self.spans]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)

    def answers(self) -> Tensor:
        """Return the positions of all answer tokens, int64, in order: of roots and last tokens."""
        ranges = [torch.arange(span.start, span.end) for span in self.spans]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of some files, or a part of them."""

    documents: tuple[Document, ...]

    @property
    def num_examples(self) -> int:
        """Training examples of all documents."""
        return sum(document.num_examples for document in self.documents)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the model wrote."""
        return sum(span.end - span.start for doc in self.documents for span in doc.spans)


def build_corpus(conversations: Iterable[TokenizedConversation], vocab_size: int) -> Corpus:
    """Turn conversations into documents.

    Args:
        conversations: Conversations in the order of the documents.
        vocab_size: Size of the base model's vocabulary; every token id must be below it.

    Raises:
        DataError: If a token id is too large.
    """
    documents: list[Document] = []
    for conversation in conversations:
        found = conversation_documents(conversation)
        largest = max(int(document.token_ids_T.max()) for document in found)
        if largest >= vocab_size:
            raise DataError(
                f"{conversation.where}: conversation {conversation.id!r} has token id {largest}, "
                f"but the base model's vocabulary has {vocab_size}; distill with the model you "
                "train for"
            )
        documents += found
    return Corpus(tuple(documents))


def conversation_documents(conversation: TokenizedConversation) -> list[Document]:
    """Turn a conversation into documents.

    Turns share a document where the later one's prompt continues the earlier one's tokens; a chat
    template or tokeniser that rewrites the past begins a new one.
    """
    documents: list[tuple[list[int], list[Span]]] = []
    for prompt, answer in conversation.turns:
        if documents and prompt[: len(documents[-1][0])] == documents[-1][0]:
            spans = documents.pop()[1]
        else:
            spans = []
        spans.append(Span(len(prompt), len(prompt) + len(answer)))
        documents.append((prompt + answer, spans))
    return [
        Document(conversation.id, conversation.category, torch.tensor(ids), tuple(spans))
        for ids, spans in documents
    ]


@dataclass(frozen=True, slots=True)
class Split:
    """A corpus in two parts that share no conversation."""

    train: Corpus
    held_out: Corpus


def split(corpus: Corpus, held_out_fraction: float) -> Split:
    """Hold out a fraction of the conversations, chosen by their ids alone.

    A conversation stays on its side when others are added or left out.
    """
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in corpus.documents:
        # With a prefix of its own: a file may be ordered by the plain digests of its ids.
        digest = hashlib.sha256(f"held out {document.conversation_id}".encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64
        parts[is_held_out].append(document)
    return Split(Corpus(tuple(parts[0])), Corpus(tuple(parts[1])))


def frequent_tokens(documents: Sequence[Document], vocab_size: int, size: int) -> Tensor:
    """Return the `size` most frequent tokens of the answers, int64, most frequent first.

    Ties, and tokens that never occur, go by id.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for document in documents:
        for span in document.spans:
            answer = document.token_ids_T[span.start : span.end]
            counts_V += torch.bincount(answer, minlength=vocab_size)
    return counts_V.argsort(descending=True, stable=True)[:size].clone()


def draft_vocab_index(draft_vocab_ids: Tensor, vocab_size: int) -> Tensor:
    """Return for each token its place in the draft vocabulary, int64 [V + 1].

    `NO_LABEL` for tokens outside of it. The last entry too, so that -1 can be looked up.
    """
    index_V = draft_vocab_ids.new_full((vocab_size + 1,), NO_LABEL)
    index_V[draft_vocab_ids] = torch.arange(len(draft_vocab_ids), device=draft_vocab_ids.device)
    return index_V


def document_labels(document: Document, num_depths: int) -> Tensor:
    """Return the tokens after each root, int64 NK on the CPU; `NO_LABEL` behind the answer."""
    labels = [torch.zeros(0, num_depths, dtype=torch.int64)]
    for span in document.spans:
        answer = document.token_ids_T[span.start : span.end]
        padded = torch.cat((answer, answer.new_full((num_depths,), NO_LABEL)))
        labels.append(padded[1:].unfold(0, num_depths, 1)[: span.num_examples])
    return torch.cat(labels)
