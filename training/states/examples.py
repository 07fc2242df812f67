"""Training examples: a hidden state, the root token drawn from it, and the tokens after the root.

With a cache, all hidden states are kept in memory; without one, each epoch computes them again for
one group of documents at a time, and examples are shuffled within a group. Either way the batches
of an epoch depend on the seed and the epoch alone.

Shape suffixes: N examples, M answer tokens, D model width, K draft heads.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.batches import BatchPlan, epoch_generator, shuffled
from training.data.dataset import Corpus, Document, document_labels
from training.states.hidden_states import HiddenStates


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Any number of examples on one device, and the hidden states that they point into.

    Attributes:
        states_MD: Last hidden states of the base model, one for each answer token: the one that it
            was drawn from. Those of an answer are next to each other, in order.
        rows_N: Int64; each root's own state is this row of `states_MD`.
        roots_N: Int64; the tokens drawn from these states.
        labels_NK: Int64; the (k + 1)th token after the root, which head k is to draft, or
            `NO_LABEL`.
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
        document: Roots and labels come from it.
        states_MD: What `HiddenStates.encode_answers` returned for it.
        num_heads: Number of labels of each example, K.
    """
    device, roots_N = states_MD.device, document.roots()
    rows_N = torch.searchsorted(document.answers(), roots_N)
    token_ids_N, labels_NK = document.token_ids_T[roots_N], document_labels(document, num_heads)
    return Examples(states_MD, *(x.to(device) for x in (rows_N, token_ids_N, labels_NK)))


class ExampleSource:
    """The batches of each epoch.

    Args:
        corpus: Has at least one example.
        states: Gives the hidden states of its documents.
        num_heads: Number of labels of each example, K.
        plan: A batch is full when it has `size` examples; with a cache, the corpus is one group.
    """

    def __init__(
        self, corpus: Corpus, states: HiddenStates, num_heads: int, plan: BatchPlan
    ) -> None:
        self._documents = [doc for doc in corpus.documents if doc.num_examples]
        self._states = states
        self._num_heads = num_heads
        self._plan = plan
        self._cache: Examples | None = None

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch; without a cache, epochs may differ by a few."""
        return sum(self._num_batches(group) for group in self._groups(epoch))

    def fill_cache(self, on_documents: Callable[[int], None]) -> None:
        """Compute all hidden states now if the plan has a cache.

        Args:
            on_documents: Called with the number of documents after each group.
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
        generator = epoch_generator(self._plan.seed, epoch, "examples")
        for group in self._groups(epoch):
            num_examples = sum(self._documents[i].num_examples for i in group)
            order_N = torch.randperm(num_examples, generator=generator)
            num_batches = self._num_batches(group)
            if first >= num_batches:
                first -= num_batches
                continue
            examples = self._examples(group) if self._cache is None else self._cache
            for indices_N in torch.split(order_N, self._plan.size)[first:]:
                yield examples.take(indices_N)
            first = 0

    def _groups(self, epoch: int) -> list[Sequence[int]]:
        if self._plan.is_cached:
            return [range(len(self._documents))]
        order = shuffled(len(self._documents), self._plan.seed, epoch)
        size = self._plan.group_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _num_batches(self, group: Sequence[int]) -> int:
        num_examples = sum(self._documents[i].num_examples for i in group)
        return -(-num_examples // self._plan.size)

    def _examples(self, group: Sequence[int]) -> Examples:
        documents = [self._documents[i] for i in group]
        encoded = self._states.encode_answers(documents)
        return Examples.join(
            [
                document_examples(document, states_MD, self._num_heads)
                for document, states_MD in zip(documents, encoded, strict=True)
            ]
        )
