"""Drafts with an MTP module: one attending decoder layer over the sequences' own KV blocks.

The module's KV lies in a layer of its own of the base model's cache, under the same block tables:

    slots   0 ........ state.num_tokens ........ root | root + 1 ..................
            computed from the base model's hidden     | nodes of the growing tree, level by
            states; what is missing up to the root    | level; overwritten after the step
            is computed first, prompts by chunks      |

After a verify step the accepted tokens and the new root run with the base model's hidden states;
these lie in the cache by slot, so tokens that were computed long ago, or for another sequence with
the same prefix, can be caught up with at any time. Then the tree grows level by level from the
module's own output.

Shape suffixes: B sequences, T flat tokens, W nodes that a level runs, D model width.
"""

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.candidates import Candidates
from heads.mtp import MTPModule
from heads.proposals import GrownProposal, Proposal
from heads.seen_rows import SeenRows, top_candidates
from heads.tree_growth import Frontier, GrowingTrees
from server.attention.backend import AttentionBackend, AttentionBatch, AttentionSpan
from server.attention.hook import AttentionContext
from server.device.base import DraftProducts
from server.executor.executor import Drafting
from server.kv.kv_cache import KVCache
from server.model.decoder_layer import DecoderLayer

NAME = "mtp"


@dataclass(frozen=True, slots=True)
class Growth:
    """How far trees grow.

    Attributes:
        num_nodes: Largest tree, root included.
        num_depths: Number of levels, at least 1.
        width: Nodes that a level runs.
        num_ranks: Candidates below each node.
    """

    num_nodes: int
    num_depths: int
    width: int = 8
    num_ranks: int = 8

    @property
    def num_scratch(self) -> int:
        """Slots behind the root that a growing tree needs."""
        return self.width * (self.num_depths - 1)


@dataclass(slots=True)
class MTPState:
    """An MTP module's state of one sequence.

    Attributes:
        seen_rows: Unembedding rows of prompt tokens that the draft vocabulary lacks.
        num_tokens: Tokens whose KV the module has computed.
        has_room: Whether slots for a growing tree are reserved behind the step under way.
    """

    seen_rows: SeenRows | None
    num_tokens: int = 0
    has_room: bool = False


@dataclass(frozen=True, slots=True, eq=False)
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
        growth: How far trees grow.
        max_tokens: Largest number of tokens of a pass that catches up.
    """

    def __init__(
        self,
        module: MTPModule,
        layer: DecoderLayer,
        cache: KVCache,
        attention: AttentionBackend,
        products: DraftProducts,
        growth: Growth,
        max_tokens: int,
    ) -> None:
        products.replace_linears(module)
        self._module = module
        self._layer = layer
        self._cache = cache
        self._backend = attention
        self.growth = growth
        self._max_tokens = max_tokens
        self._unembed = products.make(module.draft_rows_UD)

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        """Unembedding rows of prompt tokens that the draft vocabulary lacks."""
        return self._module.seen_rows(prompt_token_ids)

    @torch.inference_mode()
    def draft(
        self,
        rooted: Seq[Drafting],
        hidden_BD: Tensor,
        following: Seq[Drafting],
        min_value: float,
    ) -> list[Proposal | None]:
        """Catch up with all sequences, then grow trees; hidden states come from the cache."""
        lanes: list[_Lane] = []
        ready: dict[int, int] = {}
        num_left = self._max_tokens
        for index, drafting in enumerate((*rooted, *following)):
            lane, is_ready = _next_lane(drafting, index < len(rooted), num_left)
            if lane is not None:
                num_left -= len(lane.token_ids)
                if is_ready:
                    ready[index] = len(lanes)
                lanes.append(lane)
                drafting.sequence.drafting[NAME].num_tokens = lane.end
        proposals: list[Proposal | None] = [None] * len(rooted)
        if not lanes:
            return proposals
        states_TD = self._catch_up(lanes)
        if ready:
            ends = _ends(lanes)
            rows = [ends[place] for place in ready.values()]
            growing = [lanes[place] for place in ready.values()]
            grown = self._grow(growing, states_TD[rows], min_value)
            for index, proposal in zip(ready, grown, strict=True):
                proposals[index] = proposal
        return proposals

    @torch.inference_mode()
    def draft_for(self, num_sequences: int, context_len: int) -> None:
        """Draft for sequences that all use the same blocks."""
        num_slots = context_len + self.growth.num_scratch
        table = list(range(-(-num_slots // self._cache.layout.block_size)))
        lanes = [_Lane([0, 0], context_len - 2, table, None) for _ in range(num_sequences)]
        self._grow(lanes, self._catch_up(lanes)[_ends(lanes)], min_value=0.0)

    def _catch_up(self, lanes: Seq[_Lane]) -> Tensor:
        """Compute the module's KV and states TD of the lanes' tokens."""
        device = self._cache.layout.device
        tokens = [token for lane in lanes for token in lane.token_ids]
        positions = [p for lane in lanes for p in range(lane.first, lane.end)]
        layout = self._cache.layout
        slots, before = [], []
        for lane in lanes:
            slots += layout.slots(lane.block_table, lane.first, lane.end)
            # The state of the token before; the first token has none, and gets zeros.
            before += [layout.slot(lane.block_table, max(0, lane.first - 1))]
            before += layout.slots(lane.block_table, lane.first, lane.end - 1)
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

    def _grow(self, lanes: Seq[_Lane], states_BD: Tensor, min_value: float) -> list[GrownProposal]:
        """Grow a tree below the last token of each lane, whose states are given."""
        states_BWD = states_BD.unsqueeze(1)
        seen = [lane.seen_rows for lane in lanes]
        trees = GrowingTrees(self._candidates(states_BWD, seen))
        for level in range(1, self.growth.num_depths):
            if min_value > 0.0 and trees.highest_value() < min_value:
                break
            frontier = trees.frontier(self.growth.width)
            rows = frontier.parents_BW.unsqueeze(2).expand(-1, -1, states_BWD.shape[2])
            states_BWD = self._run_level(lanes, level, frontier, states_BWD.gather(1, rows))
            trees.add(self._candidates(states_BWD, seen))
        roots = [lane.token_ids[-1] for lane in lanes]
        return trees.best(roots, self.growth.num_nodes)

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
        slot = self._cache.layout.slot
        slots = [slot(lane.block_table, p) for lane, p in zip(owners, places, strict=True)]
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
        return top_candidates(states_BWD, logits_BWU, ids_U, self.growth.num_ranks, seen)


def _next_lane(drafting: Drafting, has_root: bool, num_left: int) -> tuple[_Lane | None, bool]:
    """What a pass computes of a sequence, and whether a tree can grow behind it then."""
    state: MTPState = drafting.sequence.drafting[NAME]
    end = drafting.num_computed_tokens + has_root
    first = state.num_tokens
    count = min(end - first, num_left)
    is_ready = has_root and first + count == end
    if is_ready and not state.has_room:
        # Without room for a tree there is none for the root's own slot either.
        is_ready = False
        count -= 1
    if count <= 0:
        return None, False
    tokens = drafting.tokens(first, first + count)
    return _Lane(tokens, first, drafting.sequence.block_table, state.seen_rows), is_ready


def _ends(lanes: Seq[_Lane]) -> list[int]:
    """Row of each lane's last token in a pass."""
    return [end - 1 for end in itertools.accumulate(len(lane.token_ids) for lane in lanes)]
