"""Draft trees of chosen shapes, and trees that are filled with candidates rank by rank."""

from collections.abc import Iterable, Sequence

from heads.candidates import DraftTokens
from heads.tree import NO_PARENT, DraftTree


def chain(depth: int) -> DraftTree:
    """The tree that follows the best candidate of the first `depth` heads."""
    return DraftTree(tuple(range(-1, depth)), (-1,) + (0,) * depth)


def tree_of_paths(paths: Iterable[tuple[int, ...]]) -> DraftTree:
    """The tree that holds one node per path of ranks from the root.

    Nodes are numbered by depth, then in the order given.
    """
    node_of: dict[tuple[int, ...], int] = {(): 0}
    parents, ranks = [NO_PARENT], [-1]
    for path in sorted(paths, key=len):
        node_of[path] = len(parents)
        parents.append(node_of[path[:-1]])
        ranks.append(path[-1])
    return DraftTree(tuple(parents), tuple(ranks))


def rank_paths(tree: DraftTree) -> tuple[tuple[int, ...], ...]:
    """The ranks along each node's path from the root; the root's is empty."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[tree.parents[node]], tree.ranks[node]))
    return tuple(paths)


def draft_tokens(
    tree: DraftTree, root_token: int, candidate_ids_KR: Sequence[Sequence[int]]
) -> DraftTokens:
    """A tree with one sequence's candidates by depth and rank; none of them is padding."""
    token_ids = [root_token]
    for node in range(1, tree.num_nodes):
        token_ids.append(candidate_ids_KR[tree.depths[node] - 1][tree.ranks[node]])
    return DraftTokens(tree, tuple(token_ids))
