"""One tree from draft heads and prompt lookup, its nodes by falling calibrated value.

Best-first: a frontier holds, for every node that is in the tree, its best child that is not. A
node's value never exceeds its parent's, so whatever is taken next is worth no more than what was
taken before, and the first n nodes are the best tree of n nodes. Sources: EAGLE-2,
arXiv:2406.16858, 4.2, for dynamic trees by confidence; Sequoia, arXiv:2402.12374, for optimality.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from heads.calibration import (
    MAX_PROBABILITY,
    Calibrator,
    DraftSource,
    Estimate,
    RequestCalibration,
    both_cell,
    head_cell,
    lookup_cell,
    lookup_prior,
)
from heads.candidates import DraftTokens
from heads.lookup import Match
from heads.proposals import ROOT_STATE, HeadProposal
from heads.tree import NO_PARENT, DraftTree


@dataclass(slots=True, eq=False)
class _Copied:
    """A node of the trie of looked-up continuations."""

    length: int
    is_longest: bool
    reference_place: int = -1
    below: "dict[int, _Copied]" = field(default_factory=dict)


class _Draft(NamedTuple):
    """A token that may follow a node of the tree, and what may follow it."""

    token_id: int
    probability: float
    raw: float
    cell: int
    state: int | None
    copied: _Copied | None


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Where a tree ends.

    Attributes:
        num_nodes: Root included.
        max_depth: Edges below the root.
        min_value: A node that is worth less is left out.
    """

    num_nodes: int
    max_depth: int
    min_value: float = 0.0


class TreeMerger:
    """Builds the trees of one server.

    Args:
        calibrator: Of all traffic; read only.
    """

    def __init__(self, calibrator: Calibrator) -> None:
        self._calibrator = calibrator

    def merge(
        self,
        root_token: int,
        proposal: HeadProposal | None,
        matches: Sequence[Match],
        calibration: RequestCalibration,
        limits: TreeLimits,
    ) -> DraftTokens:
        """Build a sequence's tree.

        Args:
            root_token: The token that is known already.
            proposal: What the heads say, if they were asked.
            matches: What prompt lookup found, the longest first.
            calibration: Of the sequence's request; read only.
            limits: Of the tree.
        """
        factors = [calibration.factor(source) for source in DraftSource]
        drafts = _Drafts(proposal, self._calibrator, factors)
        tokens, parents, ranks, depths = [root_token], [NO_PARENT], [-1], [0]
        estimates: list[Estimate] = []
        values = [1.0]
        children: list[Sequence[_Draft]] = []
        frontier: list[tuple[float, int, int]] = []

        def push(node: int, rank: int) -> None:
            if rank < len(children[node]):
                value = values[node] * children[node][rank].probability
                if value > limits.min_value:
                    heapq.heappush(frontier, (-value, node, rank))

        def open_node(state: int | None, copied: _Copied | None) -> None:
            depth = depths[-1]
            children.append(drafts.below(state, copied, depth) if depth < limits.max_depth else ())
            push(len(children) - 1, 0)

        open_node(ROOT_STATE if proposal else None, _trie(matches))
        while frontier and len(tokens) < limits.num_nodes:
            negative_value, parent, rank = heapq.heappop(frontier)
            draft = children[parent][rank]
            push(parent, rank + 1)
            tokens.append(draft.token_id)
            parents.append(parent)
            ranks.append(rank)
            depths.append(depths[parent] + 1)
            values.append(-negative_value)
            place = -1 if draft.copied is None else draft.copied.reference_place
            estimates.append(
                Estimate(-negative_value, draft.probability, draft.raw, draft.cell, place)
            )
            open_node(draft.state, draft.copied)
        return DraftTokens(DraftTree(tuple(parents), tuple(ranks)), tuple(tokens), tuple(estimates))


class _Drafts:
    """What may follow the nodes of one tree."""

    def __init__(
        self, proposal: HeadProposal | None, calibrator: Calibrator, factors: Sequence[float]
    ) -> None:
        self._proposal = proposal
        self._correct = calibrator.probability
        self._factors = factors
        # Of the heads alone, by state and depth; as they come, and as they follow a node behind
        # which nothing was looked up. Most nodes of a tree share one of a few states.
        self._from_heads: dict[tuple[int, int], list[_Draft]] = {}
        self._without_lookup: dict[tuple[int, int], list[_Draft]] = {}

    def below(self, state: int | None, copied: _Copied | None, depth: int) -> list[_Draft]:
        """What may follow a node of that depth, by falling probability."""
        if copied is not None and copied.below:
            return _ranked(self._with_lookup(state, copied, depth))
        if state is None:
            return []
        known = self._without_lookup.get((state, depth))
        if known is None:
            known = _ranked(self._heads(state, depth))
            self._without_lookup[state, depth] = known
        return known

    def _heads(self, state: int | None, depth: int) -> list[_Draft]:
        if self._proposal is None or state is None:
            return []
        known = self._from_heads.get((state, depth))
        if known is None:
            factor = self._factors[DraftSource.HEADS]
            known = []
            for token_id, raw, state_below in self._proposal.children(state):
                cell = head_cell(depth + 1, raw)
                probability = self._correct(cell, raw) * factor
                known.append(_Draft(token_id, probability, raw, cell, state_below, None))
            self._from_heads[state, depth] = known
        return known

    def _with_lookup(self, state: int | None, copied: _Copied, depth: int) -> list[_Draft]:
        beside = None
        if self._proposal is not None and state is not None:
            beside = self._proposal.state_beside(state)
        looked_up: dict[int, _Draft] = {}
        for token_id, below in copied.below.items():
            raw = lookup_prior(below.length, below.is_longest)
            cell = lookup_cell(below.length, below.is_longest)
            probability = self._correct(cell, raw) * self._factors[DraftSource.LOOKUP]
            looked_up[token_id] = _Draft(token_id, probability, raw, cell, beside, below)
        drafts = [
            self._agreed(draft, looked_up.pop(draft.token_id))
            if draft.token_id in looked_up
            else draft
            for draft in self._heads(state, depth)
        ]
        return [*drafts, *looked_up.values()]

    def _agreed(self, draft: _Draft, twin: _Draft) -> _Draft:
        """A token that heads and lookup draft: as if they erred independently, then corrected."""
        raw = 1.0 - (1.0 - min(1.0, draft.probability)) * (1.0 - min(1.0, twin.probability))
        cell = both_cell(raw)
        corrected = self._correct(cell, raw) * self._factors[DraftSource.BOTH]
        probability = min(MAX_PROBABILITY, corrected)
        return _Draft(draft.token_id, probability, raw, cell, draft.state, twin.copied)


def _ranked(drafts: Sequence[_Draft]) -> list[_Draft]:
    """By falling probability; siblings together are no likelier than one token can be."""
    ranked = sorted(drafts, key=lambda draft: -draft.probability)
    total = sum(draft.probability for draft in ranked)
    if total <= 1.0:
        return ranked
    return [draft._replace(probability=draft.probability / total) for draft in ranked]


def _trie(matches: Sequence[Match]) -> _Copied | None:
    """Merge continuations; where they part, the longest match's is told from the others'."""
    if not matches:
        return None
    root = _Copied(0, is_longest=True)
    for match in matches:
        node = root
        for depth, token_id in enumerate(match.continuation):
            below = node.below.get(token_id)
            if below is None:
                is_longest = node.is_longest and not node.below
                below = node.below[token_id] = _Copied(match.length + depth, is_longest)
            if below.reference_place < 0 <= match.reference_place:
                below.reference_place = match.reference_place + depth
            node = below
    return root
