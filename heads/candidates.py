"""What draft heads propose, and how it fills the nodes of trees.

Owns the step from candidates (ids and log-probs per head) to tokens on tree nodes, and the packing
of the trees of a step into tensors. Padding is -1, never a real token id.

Shape suffixes: B sequences, K draft heads, R top-k ranks, N nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from heads.calibration import DraftOutcome, Estimate
from heads.tree import NO_PARENT, DraftTree

PAD_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Candidates:
    """The most probable tokens of every draft head.

    Attributes:
        token_ids_BKR: Int64; entry (b, k, r) is sequence b's token of rank r at depth k + 1, by
            falling probability, without repetition. -1 where a head has fewer than R candidates.
        log_probs_BKR: Float32 log-probability of each under its head; -inf for padding.
    """

    token_ids_BKR: Tensor
    log_probs_BKR: Tensor


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """A tree with a token on every node.

    Attributes:
        token_ids: Token of each node; entry 0 is the root's. Never -1.
        estimates: What is believed of each node below the root; empty if nothing was estimated.
    """

    tree: DraftTree
    token_ids: tuple[int, ...]
    estimates: tuple[Estimate, ...] = ()

    def limited(self, num_nodes: int, max_depth: int) -> "DraftTokens":
        """Return the first nodes that are not too deep, at most `num_nodes`, root included."""
        tree = self.tree
        if num_nodes >= tree.num_nodes and max_depth >= tree.max_depth:
            return self
        if max_depth >= tree.max_depth:
            estimates = self.estimates[: num_nodes - 1]
            return DraftTokens(tree.prefix(num_nodes), self.token_ids[:num_nodes], estimates)
        kept = [node for node, depth in enumerate(tree.depths) if depth <= max_depth][:num_nodes]
        node_of = {NO_PARENT: NO_PARENT} | {node: index for index, node in enumerate(kept)}
        parents = tuple(node_of[tree.parents[node]] for node in kept)
        ranks = tuple(tree.ranks[node] for node in kept)
        return DraftTokens(
            DraftTree(parents, ranks),
            tuple(self.token_ids[n] for n in kept),
            tuple(self.estimates[n - 1] for n in kept[1:]) if self.estimates else (),
        )

    def outcomes(self, path: Sequence[int]) -> list[DraftOutcome]:
        """Which drafts below accepted nodes were accepted; nothing if none was estimated.

        Args:
            path: Accepted node ids, root first.
        """
        accepted = set(path)
        return [
            DraftOutcome(estimate, node in accepted)
            for node, estimate in enumerate(self.estimates, start=1)
            if self.tree.parents[node] in accepted
        ]


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """The drafted trees of one step, padded to the largest.

    Attributes:
        token_ids_BN: Int64 token of each node.
        parents_BN: Int64 parent of each node; -1 for roots as for padding.
        depths_BN: Int64 depth of each node.
        max_depth: Depth of the deepest node of all trees.
    """

    token_ids_BN: Tensor
    parents_BN: Tensor
    depths_BN: Tensor
    max_depth: int

    @classmethod
    def from_drafts(cls, drafts: Sequence[DraftTokens], device: torch.device) -> Self:
        """Pack drafts with a single copy to the device; padding is -1 in every field.

        Raises:
            ValueError: If there is no draft.
        """
        if not drafts:
            raise ValueError("no drafts; give at least one, with a root-only tree for plain steps")
        num_nodes = max(len(draft.token_ids) for draft in drafts)
        token_ids, parents, depths = [], [], []
        for draft in drafts:
            padding = (-1,) * (num_nodes - len(draft.token_ids))
            token_ids.append(draft.token_ids + padding)
            parents.append(draft.tree.parents + padding)
            depths.append(draft.tree.depths + padding)
        packed = torch.tensor((token_ids, parents, depths), dtype=torch.int64, device=device)
        token_ids_BN, parents_BN, depths_BN = packed.unbind(0)
        return cls(token_ids_BN, parents_BN, depths_BN, max(map(max, depths)))
