"""What trees are made of: the heads' own, or all draft sources together."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from heads.calibration import Calibrator
from heads.candidates import DraftTokens
from heads.merged_tree import TreeLimits, TreeMerger
from server.core.sequence import Sequence

_NUM_MATCHES = 4
_MAX_DEPTH = 24


class TreeBuilder(Protocol):
    """Makes the trees out of what the draft sources say."""

    uses_lookup: bool

    def build(self, sequence: Sequence, min_value: float) -> DraftTokens | None:
        """A sequence's tree, nodes by falling value; None if there is nothing to draft.

        Args:
            sequence: Its last token is the root.
            min_value: Nodes that are worth less may be left out.
        """

    def learn(self, sequence: Sequence, drafts: DraftTokens, path: Seq[int]) -> None:
        """Take note of which drafts were accepted."""


@dataclass(slots=True)
class MergedTrees:
    """Trees by calibrated values, from heads and prompt lookup.

    Attributes:
        max_nodes: Of a tree, root included.
        uses_lookup: Whether prompt lookup takes part.
    """

    max_nodes: int
    uses_lookup: bool = True
    calibrator: Calibrator = field(default_factory=Calibrator)

    def build(self, sequence: Sequence, min_value: float) -> DraftTokens | None:
        """See `TreeBuilder.build`."""
        matches = []
        if sequence.lookup is not None:
            sequence.lookup.catch_up(sequence.token_ids)
            matches = sequence.lookup.matches(_NUM_MATCHES, _MAX_DEPTH)
        limits = TreeLimits(
            min(self.max_nodes, sequence.drafts_allowed),
            min(_MAX_DEPTH, sequence.num_lacking_tokens - 1),
            min_value,
        )
        return TreeMerger(self.calibrator).merge(
            sequence.token_ids[-1],
            sequence.head_proposal,
            matches,
            sequence.calibration,
            limits,
        )

    def learn(self, sequence: Sequence, drafts: DraftTokens, path: Seq[int]) -> None:
        """See `TreeBuilder.learn`."""
        outcomes = drafts.outcomes(path)
        self.calibrator.learn(outcomes)
        sequence.calibration.learn(outcomes)
