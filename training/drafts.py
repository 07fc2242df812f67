"""Draft heads of either kind as evaluation sees them: a state for every root and depth.

By teacher forcing: the state at depth d is the one that the heads have where everything between the
root and the drafted token is what the target model really drew.

Shape suffixes: N roots of a document, K depths, D model width, U draft vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from heads.medusa import MedusaHeads
from heads.mtp import MTPModule
from heads.seen_rows import SeenRows
from server.model.decoder_layer import DecoderLayer
from training.dataset import Document
from training.hidden_states import HiddenStates
from training.mtp_source import EncodedDocument
from training.mtp_unroll import unroll


class Drafts(Protocol):
    """What heads draft for documents.

    Attributes:
        num_depths: K.
        vocab_size: Of the base model.
    """

    num_depths: int
    vocab_size: int

    @property
    def draft_vocab_ids(self) -> Tensor:
        """Int64 [U]."""

    def states(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return KND for each document, in the order of `Document.roots`.

        A depth that lies behind the answer's end may hold anything.
        """

    def draft_rows(self, depth: int) -> Tensor:
        """Return the unembedding UD of a depth, from 0."""

    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        """Return what the heads can draft beside the draft vocabulary after that prompt."""


class MedusaDrafts:
    """Drafts of Medusa heads; see `Drafts`.

    Args:
        encoder: Gives the base model's hidden states.
        heads: In eval mode, on the encoder's device.
    """

    def __init__(self, encoder: HiddenStates, heads: MedusaHeads) -> None:
        self.num_depths = heads.config.num_heads
        self.vocab_size = heads.config.vocab_size
        self._encoder = encoder
        self._heads = heads

    @property
    def draft_vocab_ids(self) -> Tensor:
        """See `Drafts.draft_vocab_ids`."""
        return self._heads.draft_vocab_ids

    @torch.no_grad()
    def states(self, documents: Sequence[Document]) -> list[Tensor]:
        """See `Drafts.states`."""
        encoded = self._encoder.encode(documents)
        return [
            self._heads(hidden_ND, document.token_ids_T[document.roots()].to(hidden_ND.device))
            for document, hidden_ND in zip(documents, encoded, strict=True)
        ]

    def draft_rows(self, depth: int) -> Tensor:
        """See `Drafts.draft_rows`."""
        return self._heads.draft_rows(depth)

    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        """See `Drafts.seen_rows`."""
        return self._heads.seen_rows(prompt_token_ids)


class MTPDrafts:
    """Drafts of an MTP module; see `Drafts`.

    Args:
        encoder: Gives the base model's hidden states.
        module: In eval mode, on the encoder's device.
        block: Runs the module's block.
        num_depths: Depths to draft.
    """

    def __init__(
        self, encoder: HiddenStates, module: MTPModule, block: DecoderLayer, num_depths: int
    ) -> None:
        self.num_depths = num_depths
        self.vocab_size = module.config.vocab_size
        self._encoder = encoder
        self._module = module
        self._block = block

    @property
    def draft_vocab_ids(self) -> Tensor:
        """See `Drafts.draft_vocab_ids`."""
        return self._module.draft_vocab_ids

    @torch.no_grad()
    def states(self, documents: Sequence[Document]) -> list[Tensor]:
        """See `Drafts.states`."""
        encoded = self._encoder.encode_all(documents)
        return [
            self._unrolled(EncodedDocument(document, hidden_XD))
            for document, hidden_XD in zip(documents, encoded, strict=True)
        ]

    def _unrolled(self, item: EncodedDocument) -> Tensor:
        rows_UD = self._module.draft_rows_UD
        roots_N = item.document.roots().to(rows_UD.device)
        states_KND = rows_UD.new_zeros(self.num_depths, len(roots_N), rows_UD.shape[1])
        outputs = unroll(self._module, self._block, [item], self.num_depths)
        for index, output in enumerate(outputs):
            at_N, places_T = roots_N + index, output.positions[0]
            is_drafted_N = torch.isin(at_N, places_T)
            rows = torch.searchsorted(places_T, at_N[is_drafted_N])
            states_KND[index, is_drafted_N] = output.states_TD[rows]
        return states_KND

    def draft_rows(self, depth: int) -> Tensor:
        """See `Drafts.draft_rows`; all depths share one."""
        return self._module.draft_rows_UD

    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        """See `Drafts.seen_rows`."""
        return self._module.seen_rows(prompt_token_ids)
