"""Random draft trees for the tests of this folder."""

from random import Random

from heads.candidates import DraftTokens
from heads.tree import DraftTree


def random_tree(rng: Random, num_nodes: int, num_ranks: int) -> DraftTree:
    parents, ranks = [-1], [-1]
    free = [(0, rank) for rank in range(num_ranks)]
    while len(parents) < num_nodes:
        parent, rank = free.pop(rng.randrange(len(free)))
        free += [(len(parents), child_rank) for child_rank in range(num_ranks)]
        parents.append(parent)
        ranks.append(rank)
    return DraftTree(tuple(parents), tuple(ranks))


def random_drafts(rng: Random, num_nodes: int, vocab_size: int) -> DraftTokens:
    """A random tree whose siblings carry different tokens."""
    tree = random_tree(rng, num_nodes, num_ranks=vocab_size)
    tokens_below = [rng.sample(range(vocab_size), vocab_size) for _ in tree.parents]
    below = zip(tree.parents[1:], tree.ranks[1:], strict=True)
    token_ids = [tokens_below[parent][rank] for parent, rank in below]
    return DraftTokens(tree, (rng.randrange(vocab_size), *token_ids))
