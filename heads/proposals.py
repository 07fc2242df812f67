"""What the draft heads say about one sequence, in a form that trees can be built from.

Both kinds answer the same question, what may follow a node: Medusa heads by depth alone, an MTP
module by the node itself.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from heads.candidates import PAD_TOKEN, DraftTokens, draft_tokens
from heads.tree import DraftTree

ROOT_STATE = 0


class Child(NamedTuple):
    """A token that may follow a node.

    Attributes:
        probability: By its head, given that the node is accepted.
        state: Where to ask for what follows the token; None if the heads do not know.
    """

    token_id: int
    probability: float
    state: int | None


class HeadProposal(Protocol):
    """One sequence's candidates."""

    def children(self, state: int) -> Sequence[Child]:
        """What may follow a node, by falling probability; `ROOT_STATE` is the root's state."""

    def state_beside(self, state: int) -> int | None:
        """State behind a token that the heads did not propose there; None if unknown."""

    def own_tree(self) -> DraftTokens:
        """The tree that the heads would draft by themselves, nodes by falling value."""


class MedusaProposal:
    """Candidates by depth; a state is a depth.

    Args:
        tree: Shape of `own_tree`.
        root_token: The token that is known already.
        token_ids_KR: Row k holds the candidates at depth k + 1, by rank; -1 is padding.
        probabilities_KR: Of each under its head.
    """

    def __init__(
        self,
        tree: DraftTree,
        root_token: int,
        token_ids_KR: Sequence[Sequence[int]],
        probabilities_KR: Sequence[Sequence[float]],
    ) -> None:
        self._tree = tree
        self._root_token = root_token
        self._token_ids_KR = token_ids_KR
        self._children: list[list[Child]] = [
            [
                Child(token_id, probability, depth)
                for token_id, probability in zip(ids_R, probabilities_R, strict=True)
                if token_id != PAD_TOKEN
            ]
            for depth, (ids_R, probabilities_R) in enumerate(
                zip(token_ids_KR, probabilities_KR, strict=True), start=1
            )
        ]

    def children(self, state: int) -> Sequence[Child]:
        """See `HeadProposal.children`."""
        return self._children[state] if state < len(self._children) else ()

    def state_beside(self, state: int) -> int | None:
        """See `HeadProposal.state_beside`; the heads look at the depth alone."""
        return state + 1

    def own_tree(self) -> DraftTokens:
        """See `HeadProposal.own_tree`."""
        return draft_tokens(self._tree, self._root_token, self._token_ids_KR)


class GrownProposal:
    """A tree that was grown already; a state is a node.

    Args:
        drafts: Nodes by falling value.
        probabilities: Of each node below the root, given its parent.
    """

    def __init__(self, drafts: DraftTokens, probabilities: Sequence[float]) -> None:
        self._drafts = drafts
        self._children: list[list[Child]] = [[] for _ in drafts.token_ids]
        for node, probability in enumerate(probabilities, start=1):
            child = Child(drafts.token_ids[node], probability, node)
            self._children[drafts.tree.parents[node]].append(child)

    def children(self, state: int) -> Sequence[Child]:
        """See `HeadProposal.children`."""
        return self._children[state]

    def state_beside(self, state: int) -> int | None:
        """See `HeadProposal.state_beside`."""
        return None

    def own_tree(self) -> DraftTokens:
        """See `HeadProposal.own_tree`."""
        return self._drafts
