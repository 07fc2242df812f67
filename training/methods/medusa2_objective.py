"""Medusa-2: heads and a LoRA adapter of the backbone learn together.

The loss is the heads' own plus the divergence of the adapted model from itself without the adapter,
on the answers: hidden states come to say more about the tokens that follow, while the model's own
distribution stays as it is. Source: Medusa, arXiv:2401.10774, 2.2.2 and 2.3.2.

Shape suffixes: N examples, M answer tokens, D model width, K draft heads, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heads.medusa import MedusaHeads
from training.data.batches import DocumentBatch
from training.data.dataset import Document
from training.methods.divergence import frozen_divergence
from training.methods.lora import AdaptedBase
from training.methods.medusa_objective import MedusaObjective
from training.states.examples import Examples, document_examples
from training.states.hidden_states import HiddenStateEncoder

DIVERGENCE = "divergence"


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
        heads: Heads with float32 weights.
        base: Their adapted base model.
        encoder: Runs that model, forwards and backwards.
        unembedding_VD: That model's unembedding.
        compute_dtype: Type of the heads' matrix products.
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
