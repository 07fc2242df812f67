"""What changes a request's logits by the tokens before them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class LogitProcessor(Protocol):
    """State of one sequence that turns the model's logits into those of its target distribution.

    A processor is asked about many places of a draft tree before it is known which path is
    accepted, so only `commit` changes it. Members are listed in `server.sampling.processors`.

    Attributes:
        restricts: Whether `allows` can deny a token; others are not asked.
    """

    restricts: bool

    def apply(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        """Process one row.

        Args:
            logits_V: Float32; not modified.
            path: Draft tokens that lead to the row, behind the committed tokens.
        """

    def allows(self, path: Sequence[int], token_id: int) -> bool:
        """Whether the token may follow a path; drafts that may not never enter a tree."""

    def commit(self, token_ids: Sequence[int]) -> None:
        """Take note of tokens that were added to the sequence."""
