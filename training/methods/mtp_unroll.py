"""Unrolled training of an MTP module: depth d learns from the module's own output at depth d - 1.

Depth 1 runs at every token of a document, the prompt's included, since drafts attend to it; before
the first token the state is zero. Depth d > 1 runs where its root is an answer token with a token
to draft. Loss: the sum over depths of decay ** (d - 1) times cross-entropy over the draft
vocabulary, answer tokens only.

Source: DeepSeek-V3, arXiv:2412.19437, 2.2; unrolling as in HASS, arXiv:2408.15766.

Shape suffixes: T flat tokens of one depth, D model width, X tokens of one document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.mtp import MTPModule
from server.attention.hook import AttentionContext
from server.model.decoder_layer import DecoderLayer
from training.data.dataset import NO_LABEL, Document
from training.methods.unrolled_attention import Unroll, UnrolledAttention
from training.states.encoded import EncodedDocument


@dataclass(frozen=True, slots=True, eq=False)
class DepthOutput:
    """One depth of an unrolled pass over several documents.

    Attributes:
        states_TD: The module's output.
        labels_T: Int64 id of the token after each row's own; `NO_LABEL` where nothing is learnt.
        positions: For each document the positions of its rows.
    """

    states_TD: Tensor
    labels_T: Tensor
    positions: tuple[Tensor, ...]


def unroll(
    module: MTPModule, layer: DecoderLayer, batch: Sequence[EncodedDocument], num_depths: int
) -> Iterator[DepthOutput]:
    """Run the module over documents, depth by depth.

    Args:
        module: Module that is built around `layer.module`.
        layer: Runs the module's decoder layer.
        batch: Documents, which do not see each other.
        num_depths: Depths to yield; fewer come where no answer is long enough for more.
    """
    memory = Unroll()
    context = AttentionContext(UnrolledAttention(), memory)
    device = module.draft_vocab_ids.device
    documents = [item.document for item in batch]
    tokens = [document.token_ids_T.to(device) for document in documents]
    # At depth 1 the state before position i is hidden i - 1, and nothing is before position 0.
    before = [F.pad(item.hidden_XD, (0, 0, 1, 0)) for item in batch]
    places = [torch.arange(len(tokens_X), device=device) for tokens_X in tokens]
    for depth in range(1, num_depths + 1):
        # Not every class can run on no token at all.
        if not any(len(at) for at in places):
            return
        memory.begin_depth(places)
        tokens_T = torch.cat([tokens_X[at] for tokens_X, at in zip(tokens, places, strict=True)])
        states_TD = module(torch.cat(before), tokens_T, layer.runner(torch.cat(places), context))
        learnt = [draft_positions(document, depth).to(device) for document in documents]
        labels = [
            torch.where(torch.isin(at, learnt_X), tokens_X.roll(-1)[at], NO_LABEL)
            for tokens_X, at, learnt_X in zip(tokens, places, learnt, strict=True)
        ]
        yield DepthOutput(states_TD, torch.cat(labels), tuple(places))
        states = states_TD.split([len(at) for at in places])
        upcoming = [draft_positions(document, depth + 1).to(device) for document in documents]
        before = [
            # The state before position i is this depth's output at i - 1.
            states_XD[torch.searchsorted(at, later - 1)]
            for states_XD, at, later in zip(states, places, upcoming, strict=True)
        ]
        places = upcoming


def draft_positions(document: Document, depth: int) -> Tensor:
    """Return where a depth's labels are, int64: the root and the token to draft are of one answer.

    A depth beyond the first runs nowhere else.
    """
    ranges = [
        torch.arange(span.start + depth - 1, max(span.start + depth - 1, span.end - 1))
        for span in document.spans
    ]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
