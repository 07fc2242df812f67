"""Medusa-2: heads and a LoRA adapter of the backbone learn together.

The loss is the heads' own plus the divergence of the adapted model from itself without the adapter,
on the answers: the model moves to where its hidden states say more about the tokens to come, but
what it says itself stays. Source: Medusa, arXiv:2401.10774, 2.2.2 and 2.3.2.

Shape suffixes: N examples, M answer tokens, D model width, K draft heads, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from heads.medusa import MedusaHeads
from training.data.dataset import Corpus, Document
from training.methods.divergence import frozen_divergence
from training.methods.lora import AdaptedBase
from training.methods.losses import MedusaObjective
from training.states.examples import Examples, document_examples
from training.states.hidden_states import HiddenStateEncoder

DIVERGENCE = "divergence"


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Documents of one step; as long as their examples are many."""

    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return sum(document.num_examples for document in self.documents)

    def divide(self, num_parts: int) -> "Sequence[DocumentBatch]":
        """Split the documents into parts, in order; some may be empty."""
        ends = [len(self.documents) * part // num_parts for part in range(num_parts + 1)]
        return [DocumentBatch(self.documents[a:b]) for a, b in pairwise(ends)]


class DocumentSource:
    """Whole documents in an order that the seed and the epoch give.

    Args:
        corpus: With at least one example.
        batch_size: Examples of a step, at least; only the last step of an epoch may have fewer.
        seed: Of the order.
    """

    def __init__(self, corpus: Corpus, batch_size: int, seed: int) -> None:
        self._documents = [doc for doc in corpus.documents if doc.num_examples]
        self._batch_size = batch_size
        self._seed = seed

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch; epochs may differ by a few."""
        return len(self._batches(epoch))

    def batches(self, epoch: int, first: int = 0) -> Iterator[DocumentBatch]:
        """Yield an epoch's batches from number `first` on."""
        yield from self._batches(epoch)[first:]

    def _batches(self, epoch: int) -> list[DocumentBatch]:
        key = hashlib.sha256(f"{self._seed}/{epoch}/documents".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        batches: list[list[Document]] = []
        num_examples = self._batch_size
        for index in torch.randperm(len(self._documents), generator=generator).tolist():
            if num_examples >= self._batch_size:
                batches.append([])
                num_examples = 0
            batches[-1].append(self._documents[index])
            num_examples += self._documents[index].num_examples
        return [DocumentBatch(tuple(documents)) for documents in batches]


class Medusa2Module(nn.Module):
    """The weights that are trained, and no others: the heads and the adapter of their base."""

    def __init__(self, heads: MedusaHeads, base: AdaptedBase) -> None:
        super().__init__()
        self.heads = heads
        # A name of a parameter has no dots.
        self.adapter = nn.ParameterDict(
            {name.replace(".", "/"): weight for name, weight in base.parameters.items()}
        )


class Medusa2Objective:
    """Sums the losses of the heads and, last, the divergence of the base, over whole documents.

    Args:
        heads: Float32.
        base: Their adapted base model.
        encoder: Of that model; it is run forwards and backwards.
        unembedding_VD: Of that model.
        compute_dtype: Of the heads' matrix products.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        base: AdaptedBase,
        encoder: HiddenStateEncoder,
        unembedding_VD: Tensor,
        compute_dtype: torch.dtype,
    ) -> None:
        self._base = base
        self._encoder = encoder
        self._unembedding_VD = unembedding_VD
        self._num_heads = heads.config.num_heads
        self._device = unembedding_VD.device
        self._of_heads = MedusaObjective(heads, compute_dtype)

    def num_labels(self, batch: DocumentBatch) -> Tensor:
        """Count each head's labels and, last, the answer tokens, int64 K + 1."""
        sizes = [torch.zeros(len(doc.answers()), 0, device=self._device) for doc in batch.documents]
        labels_K = self._of_heads.num_labels(self._examples(batch.documents, sizes))
        num_answer_tokens = sum(map(len, sizes))
        return torch.cat((labels_K, labels_K.new_tensor([num_answer_tokens])))

    def __call__(self, batch: DocumentBatch) -> Tensor:
        """Sum each head's cross-entropy and, last, the divergence, K + 1, on the base's device."""
        documents = batch.documents
        with self._base.without():
            teacher = self._encoder.encode_answers(documents)
        hidden = self._encoder.encode_answers_with_gradient(documents)
        examples = self._examples(documents, hidden)
        divergence = frozen_divergence(torch.cat(hidden), torch.cat(teacher), self._unembedding_VD)
        return torch.cat((self._of_heads(examples), divergence.unsqueeze(0)))

    def _examples(self, documents: Sequence[Document], hidden: Sequence[Tensor]) -> Examples:
        return Examples.join(
            [
                document_examples(document, states_MD, self._num_heads)
                for document, states_MD in zip(documents, hidden, strict=True)
            ]
        )
