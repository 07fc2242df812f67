"""Drafts: runs the heads after a step and shapes trees from their candidates before the next.

Shapes: B sequences, D model width.
"""

from collections.abc import Sequence as Seq
from functools import cached_property

import torch
from torch import Tensor

from heads.candidates import DraftTokens, draft_tokens
from heads.medusa import MedusaHeads
from heads.seen_rows import SeenRows
from heads.tree import DraftTree
from heads.tree_search import AcceptanceProfile, best_tree, node_values
from server.engine.cost_model import CostModel
from server.engine.sequence import Sequence

# For heads that were saved without a measured profile; the rates are of weak heads, so that trees
# stay small rather than wasteful.
_CAUTIOUS_PROFILE = AcceptanceProfile(((0.35, 0.12, 0.06, 0.04), (0.2, 0.08, 0.04, 0.03)))


class Speculator:
    """Chooses trees and fills them; without heads every tree is its root."""

    def __init__(
        self,
        heads: MedusaHeads | None,
        profile: AcceptanceProfile | None,
        max_nodes: int,
        fixed_size: int | None = None,
    ) -> None:
        self.heads = heads
        self.cost_model: CostModel | None = None
        rates_KR = (profile or _CAUTIOUS_PROFILE).accept_rates_KR
        if heads is not None:
            rates_KR = rates_KR[: heads.config.num_heads]
        self._profile = AcceptanceProfile(rates_KR)
        # Heads that were measured to be useless make no tree.
        is_useful = heads is not None and any(rates_KR[0])
        self._max_nodes = max_nodes if is_useful else 1
        self._fixed_size = fixed_size
        self._size_by_load: dict[int, int] = {}

    def tree_size(self, num_decoding: int) -> int:
        """Nodes of each tree, root included, when so many sequences decode."""
        if self._max_nodes == 1:
            return 1
        if self._fixed_size is not None:
            return self._fixed_size
        if self.cost_model is None:
            return self._max_nodes
        size = self._size_by_load.get(num_decoding)
        if size is None:
            size = self.cost_model.best_num_nodes(self._node_values, num_decoding)
            self._size_by_load[num_decoding] = size
        return size

    def draft(self, root_token: int, candidate_ids: Seq[Seq[int]], num_nodes: int) -> DraftTokens:
        """Fill the best tree of at most `num_nodes` nodes with a sequence's candidates."""
        return draft_tokens(self._trees[num_nodes - 1], root_token, candidate_ids)

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        """What the heads need of a prompt; computed once per request."""
        return None if self.heads is None else self.heads.seen_rows(prompt_token_ids)

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], hidden_BD: Tensor) -> None:
        """Set the candidates of sequences that decode on.

        Args:
            sequences: Their last tokens are the next step's roots.
            hidden_BD: Hidden state from which each sequence's root was drawn.
        """
        if self.heads is None or not sequences:
            return
        roots = torch.tensor([s.token_ids[-1] for s in sequences], device=hidden_BD.device)
        seen = [s.seen_rows for s in sequences]
        candidates = self.heads.propose(hidden_BD, roots, self._num_ranks, seen)
        for sequence, ids in zip(sequences, candidates.token_ids_BKR.tolist(), strict=True):
            sequence.candidate_ids = ids

    @torch.inference_mode()
    def propose_once(self, hidden_1D: Tensor) -> None:
        """Run the heads for one imaginary sequence, to time them."""
        if self.heads is not None:
            root_1 = torch.zeros(1, dtype=torch.int64, device=hidden_1D.device)
            self.heads.propose(hidden_1D, root_1, self._num_ranks, [None])

    @cached_property
    def _best_tree(self) -> DraftTree:
        return best_tree(self._profile, self._max_nodes)

    @cached_property
    def _trees(self) -> list[DraftTree]:
        """The best tree of every size; each one's nodes begin with those of the smaller one."""
        tree = self._best_tree
        return [tree.prefix(min(size, tree.num_nodes)) for size in range(1, self._max_nodes + 1)]

    @cached_property
    def _node_values(self) -> tuple[float, ...]:
        return node_values(self._profile, self._best_tree)

    @cached_property
    def _num_ranks(self) -> int:
        return max(1, max(self._best_tree.ranks) + 1)
