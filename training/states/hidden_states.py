"""Hidden states of the frozen base model by teacher forcing: what draft heads get as input.

Documents of similar length share a forward pass, padded on the right: attention is causal, so no
token sees the padding or another document.

Shape suffixes: B documents, T positions, N examples, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from server.errors import ModelError
from server.model.loading import LoadedModel
from training.data.dataset import Document


class HiddenStates(Protocol):
    """Hidden states of documents, wherever they come from.

    Each method returns tensors ND, one for each document, in the model's dtype and on its device.

    Attributes:
        dtype: Type of the hidden states.
    """

    dtype: torch.dtype

    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return the states that the roots were drawn from, in the order of `Document.roots`.

        Raises:
            ModelError: If a document is longer than the model's context.
        """

    def encode_all(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return the states of all tokens of each document but the last; see `encode`."""

    def encode_answers(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return the states that all answer tokens were drawn from; see `encode`.

        They are in the order of `Document.answers`.
        """


class HiddenStateEncoder(HiddenStates):
    """Runs the base model over documents.

    Args:
        loaded: Base model; its attention is set to torch's own, so no engine may use it any more.
        max_batch_tokens: Padded tokens of one forward pass; a longer document has its own.

    Attributes:
        dtype: Type of the hidden states.
        device: Device of the hidden states.
        has_plain_logits: Whether the model's logits are the product of its hidden states and its
            unembedding, without a bias, a scale or a cap.

    Raises:
        ModelError: If the model's unembedding gets something else than its last hidden state.
    """

    def __init__(self, loaded: LoadedModel, max_batch_tokens: int = 2048) -> None:
        self.dtype = loaded.dtype
        self.device = loaded.device
        self._max_model_len = loaded.max_model_len
        self._max_batch_tokens = max_batch_tokens
        loaded.model.set_attn_implementation("sdpa")
        self._decoder = loaded.model.base_model
        self._check(loaded)

    @torch.no_grad()
    def _check(self, loaded: LoadedModel) -> None:
        seen: list[Tensor] = []
        unembedding = loaded.model.get_output_embeddings()
        handle = unembedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        ids_1T = torch.arange(1, 5, device=self.device).unsqueeze(0)
        try:
            logits_1TV = loaded.model(input_ids=ids_1T, use_cache=False).logits
        finally:
            handle.remove()
        if len(seen) != 1 or not torch.allclose(seen[0], self._decode(ids_1T), rtol=1e-3):
            raise ModelError(
                f"model {loaded.name!r} changes its last hidden states before the unembedding; "
                "draft heads for such models are not supported"
            )
        product_1TV = F.linear(seen[0], loaded.unembedding())
        self.has_plain_logits = torch.allclose(logits_1TV, product_1TV, rtol=1e-2, atol=1e-2)

    def _decode(self, ids_BT: Tensor) -> Tensor:
        hidden_BTD: Tensor = self._decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    @override
    @torch.no_grad()
    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        return self._encode(documents, [document.roots() - 1 for document in documents])

    @override
    @torch.no_grad()
    def encode_all(self, documents: Sequence[Document]) -> list[Tensor]:
        rows = [torch.arange(len(document.token_ids_T) - 1) for document in documents]
        return self._encode(documents, rows)

    @override
    @torch.no_grad()
    def encode_answers(self, documents: Sequence[Document]) -> list[Tensor]:
        return self.encode_answers_with_gradient(documents)

    def encode_answers_with_gradient(self, documents: Sequence[Document]) -> list[Tensor]:
        """Do what `encode_answers` does; gradients flow to the weights that are trained."""
        return self._encode(documents, [document.answers() - 1 for document in documents])

    def _encode(self, documents: Sequence[Document], rows: Sequence[Tensor]) -> list[Tensor]:
        # The result owns its memory, so that the padded batch it is cut from is freed.
        encoded: list[Tensor] = [torch.zeros(0)] * len(documents)
        for batch in self._batches(documents):
            longest = len(documents[batch[-1]].token_ids_T)
            ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, index in enumerate(batch):
                token_ids_T = documents[index].token_ids_T
                ids_BT[row, : len(token_ids_T)] = token_ids_T
            hidden_BTD = self._decode(ids_BT.to(self.device))
            for row, index in enumerate(batch):
                encoded[index] = hidden_BTD[row, rows[index].to(self.device)]
        return encoded

    def _batches(self, documents: Sequence[Document]) -> list[list[int]]:
        """Indices of documents that go together; in each batch the longest comes last."""
        by_length = sorted(range(len(documents)), key=lambda i: len(documents[i].token_ids_T))
        batches: list[list[int]] = []
        for index in by_length:
            length = len(documents[index].token_ids_T)
            if length > self._max_model_len:
                raise ModelError(
                    f"conversation {documents[index].conversation_id!r} has {length} tokens, but "
                    f"the model's context has {self._max_model_len}; leave it out"
                )
            if batches and (len(batches[-1]) + 1) * length <= self._max_batch_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches


class KeptStates(HiddenStates):
    """Hidden states of documents that are measured again and again, computed once.

    Args:
        states: Computes them; of a model that does not change.
    """

    def __init__(self, states: HiddenStates) -> None:
        self.dtype = states.dtype
        self._states = states
        self._kept: dict[tuple[str, Document], Tensor] = {}

    @override
    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        return self._of("roots", documents, self._states.encode)

    @override
    def encode_all(self, documents: Sequence[Document]) -> list[Tensor]:
        return self._of("all", documents, self._states.encode_all)

    @override
    def encode_answers(self, documents: Sequence[Document]) -> list[Tensor]:
        return self._of("answers", documents, self._states.encode_answers)

    def _of(
        self,
        which: str,
        documents: Sequence[Document],
        encode: Callable[[Sequence[Document]], list[Tensor]],
    ) -> list[Tensor]:
        missing = [document for document in documents if (which, document) not in self._kept]
        if missing:
            for document, hidden in zip(missing, encode(missing), strict=True):
                self._kept[which, document] = hidden
        return [self._kept[which, document] for document in documents]
