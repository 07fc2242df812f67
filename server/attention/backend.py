"""What the engine asks of an attention implementation.

A step packs the tokens of several sequences into one flat row of T tokens. Sequence by sequence,
the queries attend to the sequence's committed KV (slots `[0, context_len)`) and, among the step's
own tokens, to what the ancestor mask allows:

    slots of a sequence   0 ............ context_len ......................... num_slots
                          committed KV   tree nodes of passes   this pass's tokens (chunk of a
                                         before, if any         prompt, or nodes of a tree)

Shapes: T flat tokens, H attention heads, C channels per head, Q queries of a sequence, S of its
slots from `context_len` on.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """The part of a step that belongs to one sequence.

    Attributes:
        start: Index of the sequence's first token in the flat row.
        num_queries: Its tokens in this step.
        context_len: Tokens whose KV was computed before this step.
        block_table: Blocks that cover `num_slots` slots, in order.
        ancestor_mask_QS: Boolean: which of the slots from `context_len` on a query may see. The
            queries' own slots are the last ones; slots before them belong to nodes of the same
            tree that earlier passes computed. None means the queries' slots, in causal order.
        depths_S: How far the position of each of these slots is behind `context_len`; None means
            0, 1, 2, ...
    """

    start: int
    num_queries: int
    context_len: int
    block_table: list[int]
    ancestor_mask_QS: Tensor | None
    depths_S: Tensor | None

    @property
    def num_slots(self) -> int:
        """Slots of the sequence that hold KV at the end of the pass."""
        mask_QS = self.ancestor_mask_QS
        return self.context_len + (self.num_queries if mask_QS is None else mask_QS.shape[1])


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """All spans of a step.

    Attributes:
        spans: In the order of the flat row, without gaps.
        slots_T: Slot of every flat token, int64 on the model's device.
    """

    spans: tuple[AttentionSpan, ...]
    slots_T: Tensor


class AttentionBackend(ABC):
    """Writes the step's KV and computes the attention of all its sequences.

    A backend whose code other machine code can call names an `operator`, by which compiled decoder
    layers attend without Python; then it implements `enter_layer` too.

    Attributes:
        operator: Name of that operator, as `define_operator` of `hook` takes it; None if there is
            none, so that compiled layers call `forward` by way of Python.
    """

    operator: ClassVar[str | None] = None

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """Build what all layers of one step share; does not touch the KV cache."""

    @abstractmethod
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
            keys_HTC: Keys of the KV heads, with rotary positions applied.
            values_HTC: Values of the KV heads.
            layer: Index of the layer in the KV cache.
            scaling: Factor on the scores.
            sliding_window: A query sees keys of positions > its own minus this; None sees all.
            metadata: What `prepare` returned for this step.

        Returns:
            `[T, H, C]`, contiguous: compiled layers read it without a look at its strides.
        """

    def enter_layer(self, layer: int, metadata: Any) -> None:
        """Say what the operator attends with when this thread runs it next, which is once.

        Args:
            layer: Index of the layer in the KV cache.
            metadata: What `prepare` returned for this step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no operator for compiled layers")
