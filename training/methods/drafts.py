"""The drafts of Medusa heads and of MTP modules; see `training.measure.drafts`.

Shape suffixes: N roots of a document, K depths, D model width, U draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from heads.medusa import MedusaHeads
from heads.mtp import MTPModule
from heads.seen_rows import SeenRows
from server.model.decoder_layer import DecoderLayer
from server.model.draft_heads import DraftHeads
from training.data.dataset import Document
from training.errors import RunError
from training.measure.drafts import Drafts
from training.methods.mtp_unroll import unroll
from training.states.encoded import EncodedDocument
from training.states.hidden_states import HiddenStates

# Depths of an MTP module that was never measured.
_DEFAULT_DEPTHS = 4


class MedusaDrafts(Drafts):
    """Drafts of Medusa heads.

    Args:
        states: Gives the base model's hidden states.
        heads: Heads in eval mode, on the device of the states.
    """

    def __init__(self, states: HiddenStates, heads: MedusaHeads) -> None:
        self.num_depths = heads.config.num_heads
        self.vocab_size = heads.config.vocab_size
        self._states = states
        self._heads = heads

    @property
    @override
    def draft_vocab_ids(self) -> Tensor:
        return self._heads.draft_vocab_ids

    @override
    @torch.no_grad()
    def states(self, documents: Sequence[Document]) -> list[Tensor]:
        encoded = self._states.encode(documents)
        return [
            self._heads(hidden_ND, document.token_ids_T[document.roots()].to(hidden_ND.device))
            for document, hidden_ND in zip(documents, encoded, strict=True)
        ]

    @override
    def draft_rows(self, depth: int) -> Tensor:
        return self._heads.draft_rows(depth)

    @override
    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        return self._heads.seen_rows(prompt_token_ids)


class MTPDrafts(Drafts):
    """Drafts of an MTP module; all depths share one unembedding.

    Args:
        states: Gives the base model's hidden states.
        module: Module in eval mode, on the device of the states.
        layer: Runs the module's layer.
        num_depths: Depths to draft.
    """

    def __init__(
        self, states: HiddenStates, module: MTPModule, layer: DecoderLayer, num_depths: int
    ) -> None:
        self.num_depths = num_depths
        self.vocab_size = module.config.vocab_size
        self._states = states
        self._module = module
        self._layer = layer

    @property
    @override
    def draft_vocab_ids(self) -> Tensor:
        return self._module.draft_vocab_ids

    @override
    @torch.no_grad()
    def states(self, documents: Sequence[Document]) -> list[Tensor]:
        encoded = self._states.encode_all(documents)
        return [
            self._unrolled(EncodedDocument(document, hidden_XD))
            for document, hidden_XD in zip(documents, encoded, strict=True)
        ]

    def _unrolled(self, item: EncodedDocument) -> Tensor:
        rows_UD = self._module.draft_rows_UD
        roots_N = item.document.roots().to(rows_UD.device)
        states_KND = rows_UD.new_zeros(self.num_depths, len(roots_N), rows_UD.shape[1])
        outputs = unroll(self._module, self._layer, [item], self.num_depths)
        for index, output in enumerate(outputs):
            at_N, places_T = roots_N + index, output.positions[0]
            is_drafted_N = torch.isin(at_N, places_T)
            rows = torch.searchsorted(places_T, at_N[is_drafted_N])
            states_KND[index, is_drafted_N] = output.states_TD[rows]
        return states_KND

    @override
    def draft_rows(self, depth: int) -> Tensor:
        return self._module.draft_rows_UD

    @override
    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        return self._module.seen_rows(prompt_token_ids)


def drafts_of(found: DraftHeads, states: HiddenStates, num_depths: int | None) -> Drafts:
    """Return the drafts of heads from a checkpoint.

    Args:
        found: Heads; turned to float32, because ranks must not depend on how a kernel rounds.
        states: Gives the base model's hidden states.
        num_depths: Depths to draft with an MTP module; None takes as many as its profile has.

    Raises:
        RunError: If the heads have a fixed number of depths, and another one is asked for.
    """
    found.heads.float()
    if isinstance(found.heads, MedusaHeads):
        if num_depths is not None:
            raise RunError(
                f"num_depths is {num_depths}, but the heads are Medusa heads, which have one depth "
                "each; leave it out"
            )
        return MedusaDrafts(states, found.heads)
    if found.layer is None:
        raise AssertionError("an MTP module came without its layer")
    if num_depths is None:
        num_depths = found.profile.max_depth if found.profile else _DEFAULT_DEPTHS
    return MTPDrafts(states, found.heads, found.layer, num_depths)
