"""The order of an epoch: a function of the run's seed and the number of the epoch alone.

So a run that was interrupted within an epoch goes on with the batches that it would have had.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from training.data.dataset import Corpus, Document


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a corpus is put into batches.

    Attributes:
        size: What makes a batch full; the source of the batches says in which unit.
        group_size: Documents whose hidden states are computed together, where they are computed
            again in each epoch.
        is_cached: Whether all hidden states are kept in memory instead.
        seed: Decides the order of each epoch.
    """

    size: int
    seed: int
    is_cached: bool = True
    group_size: int = 512


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Return a random generator that depends on these three alone."""
    key = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


def shuffled(num_documents: int, seed: int, epoch: int) -> list[int]:
    """Return the indices of all documents in the order of an epoch."""
    generator = epoch_generator(seed, epoch, "documents")
    return torch.randperm(num_documents, generator=generator).tolist()


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Documents of one step; its length is the number of their examples."""

    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return sum(document.num_examples for document in self.documents)

    def divide(self, num_parts: int) -> "Sequence[DocumentBatch]":
        """Split the documents into parts, in order; some may be empty."""
        ends = [len(self.documents) * part // num_parts for part in range(num_parts + 1)]
        return [DocumentBatch(self.documents[a:b]) for a, b in pairwise(ends)]


class DocumentSource:
    """Batches of whole documents, without hidden states.

    Args:
        corpus: Has at least one example.
        plan: A batch is full when its documents have `size` examples; only the last batch of an
            epoch may have fewer.
    """

    def __init__(self, corpus: Corpus, plan: BatchPlan) -> None:
        self._documents = [doc for doc in corpus.documents if doc.num_examples]
        self._plan = plan

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch; epochs may differ by a few."""
        return len(self._batches(epoch))

    def batches(self, epoch: int, first: int = 0) -> Iterator[DocumentBatch]:
        """Yield an epoch's batches from number `first` on."""
        yield from self._batches(epoch)[first:]

    def _batches(self, epoch: int) -> list[DocumentBatch]:
        batches: list[list[Document]] = []
        num_examples = self._plan.size
        for index in shuffled(len(self._documents), self._plan.seed, epoch):
            if num_examples >= self._plan.size:
                batches.append([])
                num_examples = 0
            batches[-1].append(self._documents[index])
            num_examples += self._documents[index].num_examples
        return [DocumentBatch(tuple(documents)) for documents in batches]
