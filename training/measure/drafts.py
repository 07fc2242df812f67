"""Draft heads of any kind as measuring sees them: a state for every root and depth.

By teacher forcing: the state at depth d is the one that the heads have where everything between the
root and the drafted token is what the target model really drew.

Shape suffixes: N roots of a document, K depths, D model width, U draft vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from heads.seen_rows import SeenRows
from training.data.dataset import Document


class Drafts(Protocol):
    """What heads draft for documents.

    Attributes:
        num_depths: Depths that are drafted, K.
        vocab_size: Rows of the base model's unembedding.
    """

    num_depths: int
    vocab_size: int

    @property
    def draft_vocab_ids(self) -> Tensor:
        """Ids of the tokens that can be drafted, int64 [U]."""

    def states(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return KND for each document, in the order of `Document.roots`.

        A depth that lies behind the answer's end may hold anything.
        """

    def draft_rows(self, depth: int) -> Tensor:
        """Return the unembedding UD of a depth, counted from 0."""

    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        """Return what the heads can draft after a prompt in addition to the draft vocabulary."""
