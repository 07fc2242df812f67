"""Attention of an unrolled MTP module: what a draft of depth d sees when it is decoded.

A draft of depth d at position i has its root at r = i - d + 1. It attends to the tokens up to the
root as depth 1 saw them, and to the drafts between, each as its own depth saw it:

    position   0 ............ r     r + 1     r + 2    ...    i = r + d - 1
    keys of    depth 1 ...... 1     2         3        ...    d

Each depth adds its keys; those of earlier depths stay, so gradients flow through all of them. An
`AttentionBackend`, so that the layer's own code runs unchanged. Grouped heads, no sliding window.

Shape suffixes: T flat tokens, H attention heads, C channels per head, S keys of one document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from server.attention.backend import AttentionBackend, AttentionBatch
from server.errors import ModelError


@dataclass(slots=True)
class Unroll:
    """Keys, values and places of the depths that ran so far.

    Attributes:
        keys: For each depth the keys HTC of its flat row.
        values: For each depth the values HTC of its flat row.
        rows: For each depth and document the slice of the depth's flat row that is the document's.
        positions: For each depth the position of each flat token in its document, int64.
    """

    rows: list[list[slice]] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def begin_depth(self, positions: Sequence[Tensor]) -> None:
        """Announce the tokens of the next depth, one tensor of positions per document."""
        rows, start = [], 0
        for positions_X in positions:
            rows.append(slice(start, start + len(positions_X)))
            start += len(positions_X)
        self.rows.append(rows)
        self.positions.append(torch.cat(list(positions)))


def visible_keys(query_positions: Tensor, key_positions: Sequence[Tensor]) -> Tensor:
    """Which keys the queries of the newest depth see, `[queries, keys of all depths]`.

    Args:
        query_positions: Positions of the queries in the document.
        key_positions: Positions of the keys of each depth, the newest depth last.
    """
    depth = len(key_positions)
    roots = query_positions.unsqueeze(1) - (depth - 1)
    visible = [key_positions[0] <= roots]
    for index, positions in enumerate(key_positions[1:], start=1):
        visible.append(positions == roots + index)
    return torch.cat(visible, dim=1)


class UnrolledAttention(AttentionBackend):
    """Attends within documents, over all depths of an `Unroll`."""

    def prepare(self, batch: AttentionBatch) -> Unroll:
        """Not used: an `Unroll` is built depth by depth."""
        raise ModelError("unrolled attention has no paged cache; it trains MTP modules only")

    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: Unroll,
    ) -> Tensor:
        """Add the depth's keys and values, then attend; see `AttentionBackend.forward`."""
        if sliding_window is not None:
            raise ModelError(
                f"the layer attends to a window of {sliding_window}; MTP modules need one that "
                "attends to everything before"
            )
        metadata.keys.append(keys_HTC)
        metadata.values.append(values_HTC)
        outputs = []
        for document, rows in enumerate(metadata.rows[-1]):
            cuts = [depth_rows[document] for depth_rows in metadata.rows]
            keys_HSC = torch.cat([k[:, c] for k, c in zip(metadata.keys, cuts, strict=True)], 1)
            values_HSC = torch.cat([v[:, c] for v, c in zip(metadata.values, cuts, strict=True)], 1)
            positions = [p[c] for p, c in zip(metadata.positions, cuts, strict=True)]
            outputs.append(
                F.scaled_dot_product_attention(
                    queries_HTC[None, :, rows],
                    keys_HSC[None],
                    values_HSC[None],
                    attn_mask=visible_keys(positions[-1], positions),
                    scale=scaling,
                    enable_gqa=True,
                )[0]
            )
        return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()
