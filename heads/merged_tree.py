"""One tree from the proposals of all draft sources, its nodes by falling calibrated value.

Best-first: a frontier holds, for every node that is in the tree, its best child that is not. A
node's value never exceeds its parent's, so whatever is taken next is worth no more than what was
taken before, and the first n nodes are the best tree of n nodes. Sources: EAGLE-2,
arXiv:2406.16858, 4.2, for dynamic trees by confidence; Sequoia, arXiv:2402.12374, for optimality.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from heads.calibration import (
    AGREED,
    MAX_PROBABILITY,
    Calibrator,
    Estimate,
    RequestCalibration,
    probability_bin,
)
from heads.candidates import DraftTokens
from heads.proposals import ROOT_STATE, Proposal
from heads.tree import NO_PARENT, DraftTree

# Says whether a token may follow the draft tokens of a path.
Allows = Callable[[Sequence[int], int], bool]
# Each proposal's state at a node; None where it has nothing to say.
_States = tuple[int | None, ...]


class _Draft(NamedTuple):
    """A token that may follow a node of the tree, and each proposal's state behind it."""

    token_id: int
    probability: float
    raw: float
    source: str
    cell: int
    states: _States
    prediction_place: int


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Where a tree ends.

    Attributes:
        num_nodes: Largest number of nodes, root included.
        max_depth: Largest number of edges below the root.
        min_value: A node that is worth less is left out.
        allows: Tokens that it denies are left out; None allows all.
    """

    num_nodes: int
    max_depth: int
    min_value: float = 0.0
    allows: Allows | None = None


def merge_proposals(
    root_token: int,
    proposals: Sequence[Proposal],
    calibrator: Calibrator,
    calibration: RequestCalibration,
    limits: TreeLimits,
) -> DraftTokens:
    """Build a sequence's tree.

    Args:
        root_token: The token that is known already.
        proposals: What each source says; sources that were not asked are left out.
        calibrator: What all traffic taught; read only.
        calibration: What the sequence's request taught; read only.
        limits: Largest number of nodes and depth, and least value.
    """
    drafts = _Drafts(proposals, calibrator, calibration)
    tree = _GrowingTree(root_token, limits)
    states: _States = (ROOT_STATE,) * len(proposals)
    while True:
        tree.open(drafts.below(states) if tree.has_depth_left else ())
        if not tree.has_room:
            return tree.finished()
        states = tree.take().states


class _GrowingTree:
    """The nodes taken so far, and for each of them the best child that is not taken."""

    def __init__(self, root_token: int, limits: TreeLimits) -> None:
        self._limits = limits
        self._token_ids, self._parents, self._ranks = [root_token], [NO_PARENT], [-1]
        self._depths, self._values = [0], [1.0]
        self._estimates: list[Estimate] = []
        self._children: list[Sequence[_Draft]] = []
        self._frontier: list[tuple[float, int, int]] = []

    @property
    def has_depth_left(self) -> bool:
        """Whether the newest node may have children."""
        return self._depths[-1] < self._limits.max_depth

    @property
    def has_room(self) -> bool:
        """Whether there is a node to take and a place for it."""
        return bool(self._frontier) and len(self._token_ids) < self._limits.num_nodes

    def open(self, children: Sequence[_Draft]) -> None:
        """Let these drafts, by falling probability, follow the newest node."""
        allows = self._limits.allows
        if allows is not None and children:
            path = self._path()
            children = [draft for draft in children if allows(path, draft.token_id)]
        self._children.append(children)
        self._push(len(self._children) - 1, 0)

    def take(self) -> _Draft:
        """Make the most valuable draft of the frontier a node."""
        negative_value, parent, rank = heapq.heappop(self._frontier)
        draft = self._children[parent][rank]
        self._push(parent, rank + 1)
        self._token_ids.append(draft.token_id)
        self._parents.append(parent)
        self._ranks.append(rank)
        self._depths.append(self._depths[parent] + 1)
        self._values.append(-negative_value)
        self._estimates.append(
            Estimate(
                -negative_value,
                draft.probability,
                draft.raw,
                draft.source,
                draft.cell,
                draft.prediction_place,
            )
        )
        return draft

    def finished(self) -> DraftTokens:
        """The tree of all nodes taken."""
        tree = DraftTree(tuple(self._parents), tuple(self._ranks))
        return DraftTokens(tree, tuple(self._token_ids), tuple(self._estimates))

    def _push(self, node: int, rank: int) -> None:
        if rank < len(self._children[node]):
            value = self._values[node] * self._children[node][rank].probability
            if value > self._limits.min_value:
                heapq.heappush(self._frontier, (-value, node, rank))

    def _path(self) -> list[int]:
        """Draft tokens from below the root to the newest node."""
        node, path = len(self._token_ids) - 1, []
        while node:
            path.append(self._token_ids[node])
            node = self._parents[node]
        return path[::-1]


class _Drafts:
    """What may follow the nodes of one tree, by the states of all proposals there."""

    def __init__(
        self,
        proposals: Sequence[Proposal],
        calibrator: Calibrator,
        calibration: RequestCalibration,
    ) -> None:
        self._proposals = proposals
        self._correct = calibrator.probability
        self._factors = [calibration.factor(proposal.source) for proposal in proposals]
        self._agreed_factor = calibration.factor(AGREED)
        # Most nodes of a tree share one of a few states.
        self._ranked: dict[_States, Sequence[_Draft]] = {}
        self._own: dict[tuple[int, int, _States], list[_Draft]] = {}

    def below(self, states: _States) -> Sequence[_Draft]:
        """What may follow a node, by falling probability."""
        known = self._ranked.get(states)
        if known is None:
            known = self._ranked[states] = _ranked(self._merged(states))
        return known

    def _merged(self, states: _States) -> Sequence[_Draft]:
        """What the proposals say; a token that several of them say comes once."""
        after = tuple(
            None if state is None else proposal.state_after_other(state)
            for proposal, state in zip(self._proposals, states, strict=True)
        )
        drafts: dict[int, _Draft] = {}
        misses: dict[int, float] = {}
        for index, state in enumerate(states):
            for draft in () if state is None else self._of(index, state, after):
                token_id, miss = draft.token_id, 1.0 - min(1.0, draft.probability)
                twin = drafts.get(token_id)
                if twin is not None:
                    miss *= misses[token_id]
                    draft = self._agreed(twin, draft, index, 1.0 - miss)
                drafts[token_id], misses[token_id] = draft, miss
        return list(drafts.values())

    def _of(self, index: int, state: int, after: _States) -> Sequence[_Draft]:
        """What one proposal says, with the others' states behind tokens that they did not say."""
        before, behind = after[:index], after[index + 1 :]
        key = (index, state, before + behind)
        known = self._own.get(key)
        if known is None:
            proposal, factor = self._proposals[index], self._factors[index]
            source, known = proposal.source, []
            for token_id, raw, state_below, cell, place in proposal.children(state):
                probability = self._correct(source, cell, raw) * factor
                states = (*before, state_below, *behind)
                known.append(_Draft(token_id, probability, raw, source, cell, states, place))
            self._own[key] = known
        return known

    def _agreed(self, twin: _Draft, draft: _Draft, index: int, raw: float) -> _Draft:
        """A token that several sources say: as if they erred independently, then corrected."""
        cell = probability_bin(raw)
        corrected = self._correct(AGREED, cell, raw) * self._agreed_factor
        return _Draft(
            draft.token_id,
            min(MAX_PROBABILITY, corrected),
            raw,
            AGREED,
            cell,
            (*twin.states[:index], draft.states[index], *twin.states[index + 1 :]),
            max(twin.prediction_place, draft.prediction_place),
        )


def _ranked(drafts: Sequence[_Draft]) -> Sequence[_Draft]:
    """By falling probability; siblings together are no likelier than one token can be."""
    ranked = sorted(drafts, key=lambda draft: -draft.probability)
    total = sum(draft.probability for draft in ranked)
    if total <= 1.0:
        return ranked
    return [draft._replace(probability=draft.probability / total) for draft in ranked]
