"""Paged tree attention on `scaled_dot_product_attention`: CPU, and the reference for others.

Each sequence is attended on its own. Where its blocks are neighbours the KV is read in place;
otherwise it is gathered first. Masks are additive and built once per step, not per layer.

Shapes: T flat tokens, H attention heads, C channels per head, S slots of one sequence.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from server.attention.backend import AttentionBackend, AttentionBatch, AttentionSpan
from server.kv.kv_cache import KVCache

# Steps of few queries (decoding, trees) are several times faster with grouped heads, above all in
# bfloat16; for prompt chunks the repeated mask would cost more than that.
_MAX_GROUPED_QUERIES = 64


@dataclass(slots=True)
class _SequencePlan:
    """How to attend one sequence; masks are filled in per window size on first use.

    Attributes:
        where: The slots, if they are neighbours, else the blocks to gather.
    """

    span: AttentionSpan
    where: range | Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SDPAMetadata:
    """Shared by all layers of one step."""

    plans: tuple[_SequencePlan, ...]
    slots_T: Tensor
    num_tokens: int


class SDPABackend(AttentionBackend):
    """Attention over the paged cache, one call of SDPA per sequence.

    Args:
        kv_cache: Holds the keys and values of all sequences.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self._kv = kv_cache
        self._layout = kv_cache.layout
        # As SDPA takes them; making the view in every layer would take as long as the attention.
        self._keys_1HSC = [keys_SHC.transpose(0, 1).unsqueeze(0) for keys_SHC in kv_cache.keys]
        self._values_1HSC = [values.transpose(0, 1).unsqueeze(0) for values in kv_cache.values]

    @override
    def prepare(self, batch: AttentionBatch) -> SDPAMetadata:
        plans = tuple(_SequencePlan(span, self._find_kv(span)) for span in batch.spans)
        return SDPAMetadata(plans, batch.slots_T, batch.slots_T.shape[0])

    @override
    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: SDPAMetadata,
    ) -> Tensor:
        keys_THC, values_THC = keys_HTC.transpose(0, 1), values_HTC.transpose(0, 1)
        self._kv.write(layer, metadata.slots_T, keys_THC, values_THC)
        outputs = [
            self._attend(plan, queries_HTC, layer, scaling, sliding_window)
            for plan in metadata.plans
        ]
        return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)

    def _attend(
        self,
        plan: _SequencePlan,
        queries_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """The output of one sequence, `[Q, H, C]`."""
        span, num_kv_heads = plan.span, self._layout.num_kv_heads
        queries_HQC = queries_HTC.narrow(1, span.start, span.num_queries)
        # The heads of a group share their KV, so they can pass as further queries of one head.
        num_groups = queries_HQC.shape[0] // num_kv_heads
        if span.num_queries > _MAX_GROUPED_QUERIES:
            num_groups = 1
        # A whole prompt needs no mask, and half of the work.
        is_whole = num_groups == 1 and span.context_len == 0 and span.ancestor_mask_QS is None
        is_whole = is_whole and (sliding_window is None or span.num_queries <= sliding_window)
        if not is_whole and sliding_window not in plan.masks:
            mask = self._build_mask(span, sliding_window)
            plan.masks[sliding_window] = None if mask is None else mask.repeat(num_groups, 1)
        output_1HXC = F.scaled_dot_product_attention(
            queries_HQC.reshape(1, -1, num_groups * span.num_queries, self._layout.head_dim),
            self._read(self._keys_1HSC[layer], self._kv.keys[layer], plan),
            self._read(self._values_1HSC[layer], self._kv.values[layer], plan),
            attn_mask=None if is_whole else plan.masks[sliding_window],
            is_causal=is_whole and span.num_queries > 1,
            scale=scaling,
            enable_gqa=True,
        )
        if num_groups == 1:
            return output_1HXC[0].transpose(0, 1)
        sizes = (num_kv_heads, num_groups, span.num_queries, self._layout.head_dim)
        return output_1HXC.reshape(sizes).permute(2, 0, 1, 3).flatten(1, 2)

    def _read(self, all_1HSC: Tensor, slots_XHC: Tensor, plan: _SequencePlan) -> Tensor:
        """The keys or values of a sequence, `[1, H, S, C]`, from all slots of a layer."""
        if isinstance(plan.where, range):
            return all_1HSC.narrow(2, plan.where.start, len(plan.where))
        # Whole blocks are copied several times faster than single slots.
        blocks = slots_XHC.view(-1, self._layout.block_size, *slots_XHC.shape[1:])
        found_SHC = blocks.index_select(0, plan.where).flatten(0, 1)[: plan.span.num_slots]
        return found_SHC.transpose(0, 1).unsqueeze(0)

    def _find_kv(self, span: AttentionSpan) -> range | Tensor:
        block_size, num_slots = self._layout.block_size, span.num_slots
        table = span.block_table[: -(-num_slots // block_size)]
        first = table[0]
        if table[-1] - first == len(table) - 1 and table == list(range(first, table[-1] + 1)):
            return range(first * block_size, first * block_size + num_slots)
        return torch.tensor(table, device=self._layout.device)

    def _build_mask(self, span: AttentionSpan, sliding_window: int | None) -> Tensor | None:
        num_queries, num_slots = span.num_queries, span.num_slots
        is_causal = span.ancestor_mask_QS is None
        if (
            is_causal
            and num_queries == 1
            and (sliding_window is None or num_slots <= sliding_window)
        ):
            return None
        device = self._layout.device
        visible = torch.ones(num_queries, num_slots, dtype=torch.bool, device=device)
        if span.ancestor_mask_QS is None:
            visible[:, span.context_len :].tril_()
        else:
            visible[:, span.context_len :] = span.ancestor_mask_QS
        if sliding_window is not None:
            slot_positions = torch.arange(num_slots, device=device)
            if span.depths_S is not None:
                slot_positions[span.context_len :] = span.context_len + span.depths_S.to(device)
            query_positions = slot_positions[-num_queries:]
            visible &= query_positions[:, None] - slot_positions < sliding_window
        mask = torch.zeros(num_queries, num_slots, dtype=self._layout.dtype, device=device)
        return mask.masked_fill_(~visible, float("-inf"))
