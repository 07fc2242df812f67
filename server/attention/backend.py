"""What the engine asks of an attention implementation.

A step packs the tokens of several sequences into one flat row of T tokens. Sequence by sequence,
the queries attend to the sequence's committed KV (slots `[0, context_len)`) and, among the step's
own tokens, to what `visible` allows:

    slots of a sequence   0 ............ context_len ............ context_len + num_queries
                          committed KV   this step's tokens (chunk of a prompt, or a draft tree)

Shapes: T flat tokens, H attention heads, C channels per head.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """The part of a step that belongs to one sequence.

    Attributes:
        start: Index of the sequence's first token in the flat row.
        num_queries: Its tokens in this step.
        context_len: Tokens whose KV was computed before this step.
        block_table: Blocks that cover `context_len + num_queries` slots, in order.
        ancestor_mask_NN: Boolean `[num_queries, num_queries]`: row i may see column j of this
            step's tokens; None means causal order.
        depths_N: Depth of each of this step's tokens below the first; None means 0, 1, 2, ...
    """

    start: int
    num_queries: int
    context_len: int
    block_table: list[int]
    ancestor_mask_NN: Tensor | None
    depths_N: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """All spans of a step.

    Attributes:
        spans: In the order of the flat row, without gaps.
        slots_T: Slot of every flat token, int64 on the model's device.
    """

    spans: tuple[AttentionSpan, ...]
    slots_T: Tensor


class AttentionBackend(Protocol):
    """Writes the step's KV and computes the attention of all its sequences."""

    def prepare(self, batch: AttentionBatch) -> Any:
        """Build what all layers of one step share; does not touch the KV cache."""

    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: Any,
    ) -> Tensor:
        """Store the step's keys and values, then attend.

        Args:
            queries_HTC: Queries with rotary positions applied.
            keys_HTC: Keys of the KV heads, likewise.
            values_HTC: Values of the KV heads.
            layer: Index of the layer in the KV cache.
            scaling: Factor on the scores.
            sliding_window: A query sees keys of positions > its own minus this; None sees all.
            metadata: What `prepare` returned for this step.

        Returns:
            `[T, H, C]`, contiguous.
        """
