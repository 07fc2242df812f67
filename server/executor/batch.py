"""Packs a step into the flat tensors of one ragged forward pass.

Shapes: T flat tokens, S rows of logits (all tree nodes of all verified sequences, in order).
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from server.attention.backend import AttentionBatch, AttentionSpan
from server.core.step import StepEntry
from server.kv.kv_cache import KVLayout


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Input of one forward pass.

    Attributes:
        input_ids_T: Tokens of all sequences, one sequence after the other.
        positions_T: Position of each token in its sequence; siblings share one.
        logits_rows_S: Indices into T of the tokens whose logits are needed; never empty.
        attention: What each sequence attends to.
        first_rows: For each entry the index into S of its tree's root; -1 if it is not verified.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    logits_rows_S: Tensor
    attention: AttentionBatch
    first_rows: tuple[int, ...]


def build_batch(entries: Seq[StepEntry], layout: KVLayout) -> StepBatch:
    """Lay out the tokens of a step, whose blocks are reserved."""
    device = layout.device
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logits_rows: list[int] = []
    first_rows: list[int] = []
    spans = []
    for entry in entries:
        sequence, tree = entry.sequence, entry.drafts.tree
        start, first = len(input_ids), sequence.num_computed_tokens
        root = entry.root_position
        input_ids += sequence.token_ids[first : root + 1]
        input_ids += entry.drafts.token_ids[1:]
        positions += range(first, root + 1)
        positions += [root + depth for depth in tree.depths[1:]]
        table = sequence.block_table
        slots += layout.slots(table, first, first + entry.num_tokens)
        first_rows.append(len(logits_rows) if entry.is_verified else -1)
        if entry.is_verified:
            logits_rows += range(start + entry.num_committed - 1, start + entry.num_tokens)
        is_tree = tree.num_nodes > 1
        spans.append(
            AttentionSpan(
                start=start,
                num_queries=entry.num_tokens,
                context_len=first,
                block_table=table,
                ancestor_mask_QS=tree.ancestor_mask() if is_tree else None,
                depths_S=torch.tensor(tree.depths) if is_tree else None,
            )
        )
    return StepBatch(
        torch.tensor(input_ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(logits_rows or [0], device=device),
        AttentionBatch(tuple(spans), torch.tensor(slots, device=device)),
        tuple(first_rows),
    )
