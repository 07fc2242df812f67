"""One sequence's share of a step."""

from dataclasses import dataclass

from heads.candidates import DraftTokens
from server.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A sequence's share of a step: committed tokens, then the draft tree's nodes.

    Attributes:
        num_committed: Committed tokens computed in this step; the last one is the tree's root if
            `is_verified`.
        drafts: The tree below the root; root only for prompts.
        is_verified: Whether the step reaches the last committed token, so that tokens are drawn.
        is_decoding: Whether this is a verify step rather than the end of a prompt.
    """

    sequence: Sequence
    num_committed: int
    drafts: DraftTokens
    is_verified: bool
    is_decoding: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that the sequence puts into the step."""
        return self.num_committed + self.drafts.tree.num_nodes - 1
