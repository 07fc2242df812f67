"""Batches of whole documents with hidden states, for MTP modules.

An MTP module attends to the prompt, so its examples come with the whole document. The batches of
an epoch depend on the seed and the epoch alone, with or without a cache.

Shape suffixes: X tokens of one document, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.batches import BatchPlan, shuffled
from training.data.dataset import Corpus, Document
from training.states.hidden_states import HiddenStates

# A prompt's tokens count too, and in float32 a million of them take gigabytes.
_CACHE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDocument:
    """A document with the base model's hidden states.

    Attributes:
        document: The document.
        hidden_XD: Hidden state of every token but the last, after the final norm.
    """

    document: Document
    hidden_XD: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBatch:
    """Documents of one step; its length is the number of their roots."""

    documents: tuple[EncodedDocument, ...]

    def __len__(self) -> int:
        return sum(item.document.num_examples for item in self.documents)

    def divide(self, num_parts: int) -> Sequence["EncodedBatch"]:
        """Split the documents into parts of about as many tokens, in order; some may be empty."""
        lengths = torch.tensor([len(item.document.token_ids_T) for item in self.documents])
        # A document is of the part in which its middle lies.
        middles = lengths.cumsum(0) - lengths / 2
        owners = (middles * num_parts / lengths.sum()).long().tolist()
        parts: list[list[EncodedDocument]] = [[] for _ in range(num_parts)]
        for item, owner in zip(self.documents, owners, strict=True):
            parts[owner].append(item)
        return [EncodedBatch(tuple(part)) for part in parts]


class EncodedSource:
    """The batches of each epoch.

    Args:
        corpus: Has at least one example.
        states: Gives the hidden states of its documents.
        plan: A batch has at most `size` tokens, prompts included; a longer document is alone.
    """

    def __init__(self, corpus: Corpus, states: HiddenStates, plan: BatchPlan) -> None:
        self._documents = [doc for doc in corpus.documents if doc.num_examples]
        self._states = states
        self._plan = plan
        self._cache: list[Tensor] | None = None

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch; epochs may differ by a few."""
        return len(self._batches(epoch))

    def fill_cache(self, on_documents: Callable[[int], None]) -> None:
        """Compute all hidden states now if the plan has a cache.

        Args:
            on_documents: Called with the number of documents after each group.
        """
        if not self._plan.is_cached or self._cache is not None:
            return
        cache: list[Tensor] = []
        for start in range(0, len(self._documents), self._plan.group_size):
            group = self._documents[start : start + self._plan.group_size]
            cache += [hidden_XD.to(_CACHE_DTYPE) for hidden_XD in self._states.encode_all(group)]
            on_documents(len(group))
        self._cache = cache

    def batches(self, epoch: int, first: int = 0) -> Iterator[EncodedBatch]:
        """Yield an epoch's batches from number `first` on, without computing those before."""
        self.fill_cache(lambda _: None)
        for group in self._groups(self._batches(epoch)):
            if first < len(group):
                states = self._states_of(sorted({index for batch in group for index in batch}))
                for batch in group[first:]:
                    yield EncodedBatch(
                        tuple(EncodedDocument(self._documents[i], states[i]) for i in batch)
                    )
            first = max(0, first - len(group))

    def _states_of(self, indices: Sequence[int]) -> dict[int, Tensor]:
        if self._cache is not None:
            return {index: self._cache[index] for index in indices}
        encoded = self._states.encode_all([self._documents[index] for index in indices])
        return dict(zip(indices, encoded, strict=True))

    def _batches(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        num_tokens = 0
        for index in shuffled(len(self._documents), self._plan.seed, epoch):
            length = len(self._documents[index].token_ids_T)
            if not batches or num_tokens + length > self._plan.size:
                batches.append([])
                num_tokens = 0
            batches[-1].append(index)
            num_tokens += length
        return batches

    def _groups(self, batches: Sequence[list[int]]) -> list[list[list[int]]]:
        """Consecutive batches that are encoded together, from the epoch's beginning on."""
        groups: list[list[list[int]]] = []
        num_documents = 0
        for batch in batches:
            if not groups or num_documents >= self._plan.group_size:
                groups.append([])
                num_documents = 0
            groups[-1].append(batch)
            num_documents += len(batch)
        return groups
