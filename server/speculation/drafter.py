"""What the engine asks of a draft source, and the one of Medusa heads.

A drafter leaves a `head_proposal` on each sequence that it drafts for; trees are made of it later.

Shapes: B sequences, D model width.
"""

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from heads.medusa import MedusaHeads
from heads.proposals import MedusaProposal
from heads.seen_rows import SeenRows
from heads.tree import DraftTree
from server.config import DraftMethod
from server.core.sequence import Sequence

# Candidates of each head that dynamic trees choose from.
_NUM_RANKS = 8


class Drafter(Protocol):
    """Proposes tokens after a step, for the next one.

    Attributes:
        method: Its name in requests and usage.
    """

    method: DraftMethod

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        """What the drafter needs of a prompt; computed once per request."""

    def propose(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        min_value: float = 0.0,
    ) -> None:
        """Set the head proposals of sequences that decode on.

        Args:
            rooted: Their last tokens are the next step's roots; their head proposals are None.
            hidden_BD: The base model's hidden state from which each of these roots was drawn.
            prefilling: Sequences whose prompt goes on in the next step. They are not drafted for,
                but a drafter with a KV cache of its own follows them.
            min_value: Nodes of a lower path probability need not be drafted.
        """

    def propose_for(self, num_sequences: int, context_len: int) -> None:
        """Draft for imaginary sequences of that length, to time it; blocks must be unused."""


class MedusaDrafter:
    """Asks Medusa heads.

    Args:
        heads: In the model's dtype, on its device.
        tree: The best static tree of the largest size, no deeper than there are heads.
    """

    method: DraftMethod = "medusa"

    def __init__(self, heads: MedusaHeads, tree: DraftTree) -> None:
        self._heads = heads
        self._tree = tree
        self._num_ranks = max(_NUM_RANKS, max(tree.ranks) + 1)

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        """See `Drafter.seen_rows`."""
        return self._heads.seen_rows(prompt_token_ids)

    @torch.inference_mode()
    def propose(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        min_value: float = 0.0,
    ) -> None:
        """See `Drafter.propose`."""
        if not rooted:
            return
        roots = [sequence.token_ids[-1] for sequence in rooted]
        roots_B = torch.tensor(roots, device=hidden_BD.device)
        seen = [sequence.seen_rows for sequence in rooted]
        candidates = self._heads.propose(hidden_BD, roots_B, self._num_ranks, seen)
        token_ids = candidates.token_ids_BKR.tolist()
        probabilities = candidates.log_probs_BKR.exp().tolist()
        for sequence, root, ids_KR, probabilities_KR in zip(
            rooted, roots, token_ids, probabilities, strict=True
        ):
            sequence.head_proposal = MedusaProposal(self._tree, root, ids_KR, probabilities_KR)

    @torch.inference_mode()
    def propose_for(self, num_sequences: int, context_len: int) -> None:
        """See `Drafter.propose_for`."""
        rows = self._heads.draft_rows(0)
        roots_B = torch.zeros(num_sequences, dtype=torch.int64, device=rows.device)
        hidden_BD = rows.new_zeros(num_sequences, rows.shape[1])
        self._heads.propose(hidden_BD, roots_B, self._num_ranks, [None] * num_sequences)
