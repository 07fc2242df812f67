"""The shape of a draft tree: who is whose parent, and which candidate sits where.

Owns topology only; tokens, probabilities and devices belong to others. Node 0 is the root, the
token that is known already; a node at depth d >= 1 stands for a candidate of draft head d - 1 and
its rank says which. Parents precede their children, so every prefix of a tree is a tree.

Shape suffixes: N nodes.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

NO_PARENT = -1


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Immutable and hashable topology of a draft tree.

    Attributes:
        parents: Parent of each node; -1 for the root, an earlier node for all others.
        ranks: Rank of each node's candidate in its draft head's top-k; -1 for the root.
        depths: Edges between each node and the root.

    Raises:
        ValueError: If a parent does not precede its node, a rank is negative, or two siblings
            have the same rank.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.ranks):
            raise ValueError(
                f"{len(self.parents)} parents and {len(self.ranks)} ranks; give one each per node"
            )
        if self.parents[:1] != (NO_PARENT,) or self.ranks[:1] != (-1,):
            raise ValueError(
                f"the first node has parent {self.parents[:1]} and rank {self.ranks[:1]}; "
                "node 0 is the root and has -1 for both"
            )
        depths = [0]
        seen: set[tuple[int, int]] = set()
        for node in range(1, len(self.parents)):
            parent, rank = self.parents[node], self.ranks[node]
            if not 0 <= parent < node:
                raise ValueError(
                    f"node {node} has parent {parent}; give one of the nodes 0 to {node - 1}"
                )
            if rank < 0:
                raise ValueError(f"node {node} has rank {rank}; give 0 or more")
            if (parent, rank) in seen:
                raise ValueError(
                    f"node {node} repeats rank {rank} below parent {parent}; "
                    "give siblings different ranks"
                )
            seen.add((parent, rank))
            depths.append(depths[parent] + 1)
        object.__setattr__(self, "depths", tuple(depths))

    @classmethod
    def root_only(cls) -> Self:
        """Return the tree of plain decoding."""
        return cls((NO_PARENT,), (-1,))

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, root included."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; 0 for the root alone."""
        return max(self.depths)

    def children(self) -> tuple[tuple[int, ...], ...]:
        """Return each node's children, in increasing order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node in range(1, self.num_nodes):
            children[self.parents[node]].append(node)
        return tuple(map(tuple, children))

    def ancestor_mask(self) -> Tensor:
        """Return a bool CPU tensor [N, N]: entry (i, j) says that j is i or an ancestor of i.

        The tensor is shared by all callers; do not write to it.
        """
        return _ancestor_mask(self.parents)

    def prefix(self, num_nodes: int) -> Self:
        """Return the tree of the first `num_nodes` nodes.

        Raises:
            ValueError: If the tree has fewer nodes, or none are asked for.
        """
        if not 1 <= num_nodes <= self.num_nodes:
            raise ValueError(f"num_nodes is {num_nodes}; give 1 to {self.num_nodes}")
        return type(self)(self.parents[:num_nodes], self.ranks[:num_nodes])


@lru_cache(maxsize=1024)
def _ancestor_mask(parents: tuple[int, ...]) -> Tensor:
    # Trees differ from step to step, and bytes are copied faster than rows of tensors.
    size = len(parents)
    mask = bytearray(size * size)
    for node, parent in enumerate(parents):
        if parent != NO_PARENT:
            mask[node * size : node * size + node] = mask[parent * size : parent * size + node]
        mask[node * size + node] = True
    return torch.frombuffer(mask, dtype=torch.bool).view(size, size)
