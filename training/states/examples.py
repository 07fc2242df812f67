"""Training examples: a hidden state, the root token drawn from it, and the tokens after the root.

With a cache, all hidden states are kept in memory; without, they are asked for again in each epoch
for one group of documents at a time. Either way the batches of an epoch depend on
the seed and the epoch alone, so that a run can be taken up again in its middle.

Shape suffixes: N examples, M answer tokens, D model width, K draft heads.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.dataset import Corpus, Document
from training.states.hidden_states import HiddenStates

# Stands where a head has no label because the answer ends before.
NO_LABEL = -100


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Any number of examples, all on one device, and the hidden states that they point into.

    Attributes:
        states_MD: Last hidden states of the base model, one for each answer token: the one that it
            was drawn from. Those of an answer are next to each other, in order.
        rows_N: Int64; where each root's own state is.
        roots_N: Int64 tokens drawn from them.
        labels_NK: Int64; head k is to draft the (k + 1)th token after the root, or `NO_LABEL`.
    """

    states_MD: Tensor
    rows_N: Tensor
    roots_N: Tensor
    labels_NK: Tensor

    def __len__(self) -> int:
        return len(self.roots_N)

    @property
    def hidden_ND(self) -> Tensor:
        """A copy of the states that the roots were drawn from."""
        return self.states_MD[self.rows_N]

    def label_states(self, head: int) -> Tensor:
        """Copy the states ND that a head's labels were drawn from; any where it has no label."""
        return self.states_MD[(self.rows_N + head + 1).clamp(max=len(self.states_MD) - 1)]

    def take(self, indices_N: Tensor) -> "Examples":
        """Return the examples of these indices; they point into the same states."""
        at = indices_N.to(self.roots_N.device)
        return Examples(self.states_MD, self.rows_N[at], self.roots_N[at], self.labels_NK[at])

    def divide(self, num_parts: int) -> Sequence["Examples"]:
        """Split the examples into parts, in order; some may be empty."""
        columns = (self.rows_N, self.roots_N, self.labels_NK)
        split = (column.tensor_split(num_parts) for column in columns)
        return [Examples(self.states_MD, *parts) for parts in zip(*split, strict=True)]

    @classmethod
    def join(cls, parts: Sequence["Examples"]) -> "Examples":
        """Put examples one after the other; the states are copied."""
        starts = itertools.accumulate((len(part.states_MD) for part in parts), initial=0)
        rows = [part.rows_N + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            torch.cat([part.states_MD for part in parts]),
            torch.cat(rows),
            torch.cat([part.roots_N for part in parts]),
            torch.cat([part.labels_NK for part in parts]),
        )


def document_examples(document: Document, states_MD: Tensor, num_heads: int) -> Examples:
    """Make the examples of a document.

    Args:
        document: Gives roots and labels.
        states_MD: What `HiddenStateEncoder.encode_answers` returned for it.
        num_heads: K.
    """
    device, roots_N = states_MD.device, document.roots()
    rows_N = torch.searchsorted(document.answers(), roots_N)
    token_ids_N, labels_NK = document.token_ids_T[roots_N], document_labels(document, num_heads)
    return Examples(states_MD, *(x.to(device) for x in (rows_N, token_ids_N, labels_NK)))


def document_labels(document: Document, num_depths: int) -> Tensor:
    """Return the tokens after each root, int64 NK on the CPU; `NO_LABEL` behind the answer."""
    labels = [torch.zeros(0, num_depths, dtype=torch.int64)]
    for span in document.spans:
        answer = document.token_ids_T[span.start : span.end]
        padded = torch.cat((answer, answer.new_full((num_depths,), NO_LABEL)))
        labels.append(padded[1:].unfold(0, num_depths, 1)[: span.num_examples])
    return torch.cat(labels)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How examples are put into batches.

    Attributes:
        batch_size: Examples of a batch; the last one of a group may be smaller.
        group_size: Documents whose hidden states are in memory together when there is no cache;
            examples are shuffled inside a group.
        is_cached: Keep all hidden states in memory; the corpus is one group.
        seed: Of the order.
    """

    batch_size: int = 2048
    group_size: int = 512
    is_cached: bool = True
    seed: int = 0


class ExampleSource:
    """The batches of each epoch.

    Args:
        corpus: With at least one example.
        encoder: Gives the hidden states.
        num_heads: K.
        plan: Sizes and order.
    """

    def __init__(
        self, corpus: Corpus, encoder: HiddenStates, num_heads: int, plan: BatchPlan
    ) -> None:
        self._documents = [doc for doc in corpus.documents if doc.num_examples]
        self._encoder = encoder
        self._num_heads = num_heads
        self._plan = plan
        self._cache: Examples | None = None

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch; without a cache, epochs may differ by a few."""
        return sum(self._num_batches(group) for group in self._groups(epoch))

    def fill_cache(self, on_documents: Callable[[int], None]) -> None:
        """Compute all hidden states now if they are to be kept.

        Args:
            on_documents: Called with the number of documents that were added.
        """
        if not self._plan.is_cached or self._cache is not None:
            return
        parts = []
        size = self._plan.group_size
        for start in range(0, len(self._documents), size):
            indices = range(start, min(start + size, len(self._documents)))
            parts.append(self._examples(indices))
            on_documents(len(indices))
        self._cache = Examples.join(parts)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Examples]:
        """Yield an epoch's batches from number `first` on, without computing those before."""
        self.fill_cache(lambda _: None)
        generator = self._generator(epoch, "examples")
        for group in self._groups(epoch):
            num_examples = sum(self._documents[i].num_examples for i in group)
            order_N = torch.randperm(num_examples, generator=generator)
            num_batches = self._num_batches(group)
            if first >= num_batches:
                first -= num_batches
                continue
            examples = self._examples(group) if self._cache is None else self._cache
            for indices_N in torch.split(order_N, self._plan.batch_size)[first:]:
                yield examples.take(indices_N)
            first = 0

    def _groups(self, epoch: int) -> list[Sequence[int]]:
        if self._plan.is_cached:
            return [range(len(self._documents))]
        generator = self._generator(epoch, "documents")
        order = torch.randperm(len(self._documents), generator=generator).tolist()
        size = self._plan.group_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _generator(self, epoch: int, purpose: str) -> torch.Generator:
        key = hashlib.sha256(f"{self._plan.seed}/{epoch}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))

    def _num_batches(self, group: Sequence[int]) -> int:
        num_examples = sum(self._documents[i].num_examples for i in group)
        return -(-num_examples // self._plan.batch_size)

    def _examples(self, group: Sequence[int]) -> Examples:
        documents = [self._documents[i] for i in group]
        encoded = self._encoder.encode_answers(documents)
        return Examples.join(
            [
                document_examples(document, states_MD, self._num_heads)
                for document, states_MD in zip(documents, encoded, strict=True)
            ]
        )
