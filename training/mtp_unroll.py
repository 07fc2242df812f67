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
from server.model.attention_hook import AttentionContext
from server.model.decoder_block import DecoderBlock
from training.dataset import Document
from training.examples import NO_LABEL
from training.unrolled_attention import Unroll, UnrolledAttention


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDocument:
    """A document with the base model's hidden states.

    Attributes:
        hidden_XD: Of every token but the last, after the final norm.
    """

    document: Document
    hidden_XD: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DepthOutput:
    """One depth of an unrolled pass over several documents.

    Attributes:
        states_TD: The module's output.
        labels_T: Int64 id of the token after each one; `NO_LABEL` where nothing is learnt.
        positions: For each document the positions of its rows.
    """

    states_TD: Tensor
    labels_T: Tensor
    positions: tuple[Tensor, ...]


def unroll(
    module: MTPModule, block: DecoderBlock, batch: Sequence[EncodedDocument], num_depths: int
) -> Iterator[DepthOutput]:
    """Run the module over documents, depth by depth.

    Args:
        module: Built around `block.module`.
        block: Runs it.
        batch: Documents; they do not see each other.
        num_depths: Depths to yield.
    """
    memory = Unroll()
    context = AttentionContext(UnrolledAttention(), memory)
    # At depth 1 the state before position i is hidden i - 1, and nothing is before position 0.
    before = [F.pad(item.hidden_XD, (0, 0, 1, 0)) for item in batch]
    places = [torch.arange(len(item.document.token_ids_T)) for item in batch]
    for depth in range(1, num_depths + 1):
        memory.begin_depth(places)
        tokens_T = torch.cat(
            [item.document.token_ids_T[at] for item, at in zip(batch, places, strict=True)]
        )
        states_TD = module(torch.cat(before), tokens_T, block.runner(torch.cat(places), context))
        labels = [_labels(item.document, at, depth) for item, at in zip(batch, places, strict=True)]
        yield DepthOutput(states_TD, torch.cat(labels), tuple(places))
        states = states_TD.split([len(at) for at in places])
        upcoming = [_positions(item.document, depth + 1) for item in batch]
        before = [
            # The state before position i is this depth's output at i - 1.
            states_XD[torch.searchsorted(at, later - 1)]
            for states_XD, at, later in zip(states, places, upcoming, strict=True)
        ]
        places = upcoming


def _positions(document: Document, depth: int) -> Tensor:
    """Where depth > 1 runs: the root is an answer token, and so is the token to draft."""
    ranges = [
        torch.arange(span.start + depth - 1, max(span.start + depth - 1, span.end - 1))
        for span in document.spans
    ]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


def _labels(document: Document, positions: Tensor, depth: int) -> Tensor:
    """The token after each position, where its root lies in the same answer."""
    token_ids_T = document.token_ids_T
    is_learnt = torch.zeros(len(token_ids_T), dtype=torch.bool)
    is_learnt[_positions(document, depth)] = True
    labels = token_ids_T.roll(-1)[positions]
    return torch.where(is_learnt[positions], labels, NO_LABEL)
