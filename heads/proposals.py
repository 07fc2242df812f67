"""What a draft source says about one sequence, in a form that trees can be built from.

All sources answer the same question, what may follow a node: Medusa heads by the node's depth, an
MTP module by the node itself, prompt lookup by the place in the text that is copied.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from heads.calibration import head_cell
from heads.candidates import PAD_TOKEN, DraftTokens

ROOT_STATE = 0


class Child(NamedTuple):
    """A token that may follow a node.

    Attributes:
        probability: Probability that its source gives it, if the node is accepted.
        state: Where to ask for what follows the token; None if the source does not know.
        cell: Its cell among those that the source is calibrated by.
        prediction_place: As in `Estimate`.
    """

    token_id: int
    probability: float
    state: int | None
    cell: int
    prediction_place: int = -1


class Proposal(Protocol):
    """One source's candidates for one sequence.

    Attributes:
        source: The source's name.
    """

    source: str

    def children(self, state: int) -> Sequence[Child]:
        """What may follow a node, by falling probability; `ROOT_STATE` is the root's state."""

    def state_after_other(self, state: int) -> int | None:
        """State behind a token that this source did not propose there; None if it has none."""


class MedusaProposal:
    """Candidates by depth; a state is a depth.

    Args:
        token_ids_KR: Row k holds the candidates at depth k + 1, by rank; -1 is padding.
        probabilities_KR: Probability of each under its head.
        source: Name of the source.
    """

    def __init__(
        self,
        token_ids_KR: Sequence[Sequence[int]],
        probabilities_KR: Sequence[Sequence[float]],
        source: str = "medusa",
    ) -> None:
        self.source = source
        self._children: list[list[Child]] = [
            [
                Child(token_id, probability, depth, head_cell(depth, probability))
                for token_id, probability in zip(ids_R, probabilities_R, strict=True)
                if token_id != PAD_TOKEN
            ]
            for depth, (ids_R, probabilities_R) in enumerate(
                zip(token_ids_KR, probabilities_KR, strict=True), start=1
            )
        ]

    def children(self, state: int) -> Sequence[Child]:
        """Candidates of the head at that depth."""
        return self._children[state] if state < len(self._children) else ()

    def state_after_other(self, state: int) -> int | None:
        """The next depth: the heads look at the depth alone."""
        return state + 1


class GrownProposal:
    """A tree that was grown already; a state is a node.

    Args:
        drafts: Nodes by falling value.
        probabilities: Probability of each node below the root, given its parent.
        source: Name of the source.
    """

    def __init__(
        self, drafts: DraftTokens, probabilities: Sequence[float], source: str = "mtp"
    ) -> None:
        self.source = source
        self.drafts = drafts
        self._children: list[list[Child]] = [[] for _ in drafts.token_ids]
        tree = drafts.tree
        for node, probability in enumerate(probabilities, start=1):
            cell = head_cell(tree.depths[node], probability)
            child = Child(drafts.token_ids[node], probability, node, cell)
            self._children[tree.parents[node]].append(child)

    def children(self, state: int) -> Sequence[Child]:
        """The node's children."""
        return self._children[state]

    def state_after_other(self, state: int) -> int | None:
        """None: the module did not run behind such a token."""
        return None
