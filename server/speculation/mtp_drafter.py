"""Drafts with an MTP module: one attending decoder layer over the sequences' own KV blocks.

The module's KV lies in a layer of its own of the base model's cache, under the same block tables:

    slots   0 ........ num_drafter_tokens ........ root | root + 1 ..................
            computed from the base model's hidden       | nodes of the growing tree, level by
            states; what is missing up to the root      | level; overwritten after the step
            is computed first, prompts by chunks        |

After a verify step the accepted tokens and the new root run with the base model's hidden states;
these lie in the cache by slot, so tokens that were computed long ago, or for another sequence with
the same prefix, can be caught up with at any time. Then the tree grows level by level from the
module's own output.

Shape suffixes: B sequences, T flat tokens, W nodes that a level runs, D model width.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.candidates import Candidates
from heads.mtp import MTPModule
from heads.proposals import GrownProposal
from heads.seen_rows import SeenRows, top_candidates
from heads.tree_growth import Frontier, GrowingTrees
from server.attention.backend import AttentionBackend, AttentionBatch, AttentionSpan
from server.attention.hook import AttentionContext
from server.config import DraftMethod
from server.core.sequence import Sequence
from server.device.base import DraftProducts
from server.kv.block_manager import BlockManager
from server.kv.kv_cache import KVCache
from server.model.decoder_layer import DecoderLayer


@dataclass(frozen=True, slots=True)
class Growth:
    """How far trees grow.

    Attributes:
        num_nodes: Largest tree, root included.
        num_depths: Levels, at least 1.
        width: Nodes that a level runs.
        num_ranks: Candidates below each node.
    """

    num_nodes: int
    num_depths: int
    width: int = 8
    num_ranks: int = 8


@dataclass(slots=True, eq=False)
class _Lane:
    """A sequence's part of a pass: tokens from `first` on; the last is the root if it is one."""

    token_ids: list[int]
    first: int
    block_table: list[int]
    seen_rows: SeenRows | None

    @property
    def end(self) -> int:
        return self.first + len(self.token_ids)


class MTPDrafter:
    """Grows trees from an MTP module's own output.

    Args:
        module: In the model's dtype, on its device; its linear layers are replaced.
        layer: Runs the decoder layer `module.block`.
        cache: KV cache with the module's layer behind the base model's, and with hidden states.
        attention: Attends over that cache.
        products: How the module is to multiply.
        blocks: Gives the slots of growing trees.
        growth: How far trees grow.
        max_tokens: Largest number of tokens of a pass that catches up.
    """

    method: DraftMethod = "mtp"

    def __init__(
        self,
        module: MTPModule,
        layer: DecoderLayer,
        cache: KVCache,
        attention: AttentionBackend,
        products: DraftProducts,
        blocks: BlockManager,
        growth: Growth,
        max_tokens: int,
    ) -> None:
        products.replace_linears(module)
        self._module = module
        self._layer = layer
        self._cache = cache
        self._backend = attention
        self._blocks = blocks
        self._growth = growth
        self._max_tokens = max_tokens
        self._unembed = products.make(module.draft_rows_UD)

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        """See `Drafter.seen_rows`."""
        return self._module.seen_rows(prompt_token_ids)

    @torch.inference_mode()
    def propose(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        min_value: float = 0.0,
    ) -> None:
        """See `Drafter.propose`; the hidden states come from the cache."""
        growth = self._growth
        num_scratch = growth.width * (growth.num_depths - 1)
        ready: list[tuple[Sequence, _Lane]] = []
        behind: list[tuple[Sequence, _Lane]] = []
        num_left = self._max_tokens
        is_rooted = [True] * len(rooted) + [False] * len(prefilling)
        for sequence, has_root in zip((*rooted, *prefilling), is_rooted, strict=True):
            end = sequence.num_computed_tokens + has_root
            first = sequence.num_drafter_tokens
            count = min(end - first, num_left)
            is_ready = has_root and first + count == end
            if is_ready:
                is_ready = self._blocks.extend(sequence.block_table, end + num_scratch)
                # Without room for a tree there is none for the root's own slot either.
                count -= not is_ready
            if count > 0:
                tokens = sequence.token_ids[first : first + count]
                lane = _Lane(tokens, first, sequence.block_table, sequence.seen_rows)
                (ready if is_ready else behind).append((sequence, lane))
                num_left -= count
        lanes = [lane for _, lane in (*ready, *behind)]
        if not lanes:
            return
        states_TD = self._catch_up(lanes)
        for sequence, lane in (*ready, *behind):
            self._note_computed(sequence, lane)
        if ready:
            drafts = self._grow([lane for _, lane in ready], states_TD, min_value)
            for (sequence, _), proposal in zip(ready, drafts, strict=True):
                sequence.head_proposal = proposal

    @torch.inference_mode()
    def propose_for(self, num_sequences: int, context_len: int) -> None:
        """See `Drafter.propose_for`; all use the same blocks."""
        growth, size = self._growth, self._cache.layout.block_size
        num_slots = context_len + growth.width * (growth.num_depths - 1)
        table = list(range(-(-num_slots // size)))
        lanes = [_Lane([0, 0], context_len - 2, table, None) for _ in range(num_sequences)]
        self._grow(lanes, self._catch_up(lanes), min_value=0.0)

    def _note_computed(self, sequence: Sequence, lane: _Lane) -> None:
        sequence.num_drafter_tokens = lane.end
        size = self._cache.layout.block_size
        whole = slice(lane.first // size, lane.end // size)
        self._blocks.mark_drafted(sequence.block_table[whole])

    def _slot(self, lane: _Lane, position: int) -> int:
        size = self._cache.layout.block_size
        return lane.block_table[position // size] * size + position % size

    def _catch_up(self, lanes: Seq[_Lane]) -> Tensor:
        """Compute the module's KV and states TD of the lanes' tokens."""
        device = self._cache.layout.device
        tokens = [token for lane in lanes for token in lane.token_ids]
        positions = [p for lane in lanes for p in range(lane.first, lane.end)]
        slots = [self._slot(lane, p) for lane in lanes for p in range(lane.first, lane.end)]
        # The state of the token before; the first token has none, and gets zeros.
        before = [
            self._slot(lane, max(0, p - 1)) for lane in lanes for p in range(lane.first, lane.end)
        ]
        packed = torch.tensor((tokens, positions, slots, before), device=device)
        tokens_T, positions_T, slots_T, before_T = packed.unbind(0)
        states_TD = self._cache.hidden_SD[before_T]
        states_TD.masked_fill_((positions_T == 0).unsqueeze(1), 0.0)
        spans, start = [], 0
        for lane in lanes:
            count = len(lane.token_ids)
            spans.append(AttentionSpan(start, count, lane.first, lane.block_table, None, None))
            start += count
        return self._run(states_TD, tokens_T, positions_T, AttentionBatch(tuple(spans), slots_T))

    def _run(
        self, states_TD: Tensor, tokens_T: Tensor, positions_T: Tensor, batch: AttentionBatch
    ) -> Tensor:
        context = AttentionContext(self._backend, self._backend.prepare(batch))
        states: Tensor = self._module(states_TD, tokens_T, self._layer.runner(positions_T, context))
        return states

    def _grow(self, lanes: Seq[_Lane], states_TD: Tensor, min_value: float) -> list[GrownProposal]:
        """Grow a tree below the last token of each of the first lanes of a pass."""
        ends, end = [], -1
        for lane in lanes:
            end += len(lane.token_ids)
            ends.append(end)
        states_BWD = states_TD[ends].unsqueeze(1)
        seen = [lane.seen_rows for lane in lanes]
        trees = GrowingTrees(self._candidates(states_BWD, seen))
        for level in range(1, self._growth.num_depths):
            if min_value > 0.0 and trees.highest_value() < min_value:
                break
            frontier = trees.frontier(self._growth.width)
            rows = frontier.parents_BW.unsqueeze(2).expand(-1, -1, states_BWD.shape[2])
            states_BWD = self._run_level(lanes, level, frontier, states_BWD.gather(1, rows))
            trees.add(self._candidates(states_BWD, seen))
        roots = [lane.token_ids[-1] for lane in lanes]
        return trees.best(roots, self._growth.num_nodes)

    def _run_level(
        self, lanes: Seq[_Lane], level: int, frontier: Frontier, states_BWD: Tensor
    ) -> Tensor:
        """Run the nodes of one level; returns their states BWD.

        Node w of level l lies in slot `root + 1 + (l - 1) * W + w` for the time being.
        """
        width = frontier.token_ids_BW.shape[1]
        num_before = (level - 1) * width
        device = states_BWD.device
        places = [lane.end + num_before + w for lane in lanes for w in range(width)]
        owners = [lane for lane in lanes for _ in range(width)]
        slots = [self._slot(lane, place) for lane, place in zip(owners, places, strict=True)]
        positions = [lane.end + level - 1 for lane in owners]
        slots_T, positions_T = torch.tensor((slots, positions), device=device).unbind(0)
        depths_S = torch.arange(level).repeat_interleave(width)
        spans = tuple(
            AttentionSpan(index * width, width, lane.end, lane.block_table, visible_WE, depths_S)
            for index, (lane, visible_WE) in enumerate(
                zip(lanes, frontier.visible_BWE, strict=True)
            )
        )
        states_TD = self._run(
            states_BWD.flatten(0, 1),
            frontier.token_ids_BW.flatten(),
            positions_T,
            AttentionBatch(spans, slots_T),
        )
        return states_TD.view(len(lanes), width, -1)

    def _candidates(self, states_BWD: Tensor, seen: Seq[SeenRows | None]) -> Candidates:
        logits_BWU = self._unembed(states_BWD)
        ids_U = self._module.draft_vocab_ids
        return top_candidates(states_BWD, logits_BWU, ids_U, self._growth.num_ranks, seen)
