"""Trees that grow level by level, against growing each one alone in plain Python."""

import math
from itertools import pairwise
from random import Random

import pytest
import torch

from heads.candidates import PAD_TOKEN, Candidates
from heads.tree_growth import GrowingTrees

Ranked = list[tuple[int, float]]


def candidates_below(rng: Random, path: tuple[int, ...], num_ranks: int, num_real: int) -> Ranked:
    """What may follow a path, by falling probability; the same for the same path and rng seed."""
    own = Random(f"{rng.random()}/{path}")
    weights = sorted((own.random() ** 3 for _ in range(num_real)), reverse=True)
    tokens = own.sample(range(1000), num_real)
    found = [(t, math.log(w / (sum(weights) + 0.1))) for t, w in zip(tokens, weights, strict=True)]
    return found + [(PAD_TOKEN, -math.inf)] * (num_ranks - num_real)


class SlowTree:
    """One tree as a dictionary of paths."""

    def __init__(self, seed: int, num_ranks: int, num_real: int) -> None:
        self.seed, self.num_ranks, self.num_real = seed, num_ranks, num_real
        self.found: dict[tuple[int, ...], float] = {}

    def below(self, path: tuple[int, ...]) -> Ranked:
        return candidates_below(Random(self.seed), path, self.num_ranks, self.num_real)

    def grow(self, num_depths: int, width: int) -> None:
        frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        for _ in range(num_depths):
            level = [
                ((*path, token), log_prob + own)
                for path, log_prob in frontier
                for token, own in self.below(path)
                if token != PAD_TOKEN
            ]
            self.found |= dict(level)
            frontier = sorted(level, key=lambda item: -item[1])[:width]

    def best(self, num_nodes: int) -> list[tuple[int, ...]]:
        return sorted(self.found, key=lambda path: -self.found[path])[: num_nodes - 1]


def packed(rows: list[list[Ranked]]) -> Candidates:
    tokens = [[[token for token, _ in ranked] for ranked in states] for states in rows]
    values = [[[value for _, value in ranked] for ranked in states] for states in rows]
    return Candidates(torch.tensor(tokens), torch.tensor(values))


@pytest.mark.parametrize(
    ("num_ranks", "num_real", "width", "num_depths", "num_nodes"),
    [(4, 4, 3, 4, 12), (3, 3, 8, 3, 30), (5, 2, 2, 4, 9), (4, 1, 4, 3, 10), (2, 2, 1, 5, 1)],
)
def test_a_batch_grows_as_each_tree_alone(
    num_ranks: int, num_real: int, width: int, num_depths: int, num_nodes: int
) -> None:
    slow = [SlowTree(seed, num_ranks, num_real) for seed in range(3)]
    trees = GrowingTrees(packed([[tree.below(())] for tree in slow]))
    runs: list[list[tuple[int, ...]]] = [[] for _ in slow]
    newest: list[list[tuple[int, ...]]] = [[()] for _ in slow]
    for _ in range(num_depths - 1):
        frontier = trees.frontier(width)
        for index, tokens in enumerate(frontier.token_ids_BW.tolist()):
            above = frontier.parents_BW[index].tolist()
            paths = [(*newest[index][a], t) for a, t in zip(above, tokens, strict=True)]
            runs[index] += paths
            newest[index] = paths
            for row, path in enumerate(paths):
                seen = frontier.visible_BWE[index, row].tolist()
                ancestors = {path[:length] for length in range(1, len(path) + 1)}
                visible = [run for run, is_seen in zip(runs[index], seen, strict=True) if is_seen]
                assert set(visible) == ancestors
        rows = [[tree.below(p) for p in paths] for tree, paths in zip(slow, newest, strict=True)]
        trees.add(packed(rows))
    for tree, proposal in zip(slow, trees.best([7, 8, 9], num_nodes), strict=True):
        drafts = proposal.drafts
        tree.grow(num_depths, width)
        expected = tree.best(num_nodes)
        paths = [()]
        for node in range(1, drafts.tree.num_nodes):
            paths.append((*paths[drafts.tree.parents[node]], drafts.token_ids[node]))
        assert paths[1:] == expected
        for node in range(1, drafts.tree.num_nodes):
            parent = paths[drafts.tree.parents[node]]
            token, _ = tree.below(parent)[drafts.tree.ranks[node]]
            assert token == drafts.token_ids[node]
            (child,) = (c for c in proposal.children(drafts.tree.parents[node]) if c.state == node)
            _, log_prob = tree.below(parent)[drafts.tree.ranks[node]]
            assert child.token_id == token
            assert child.probability == pytest.approx(math.exp(log_prob), rel=1e-4)
        values = [tree.found[path] for path in expected]
        assert all(a >= b for a, b in pairwise(values))
    roots = [found.drafts.token_ids[0] for found in trees.best([7, 8, 9], num_nodes)]
    assert roots == [7, 8, 9]


def test_a_child_as_sure_as_its_parent_comes_behind_it() -> None:
    sure = Candidates(torch.tensor([[[5, 6]]]), torch.tensor([[[0.0, -9.0]]]))
    trees = GrowingTrees(sure)
    for _ in range(3):
        trees.frontier(1)
        trees.add(sure)
    assert trees.best([1], 5)[0].drafts.tree.parents == (-1, 0, 1, 2, 3)


def test_adding_without_a_frontier_is_a_bug() -> None:
    trees = GrowingTrees(Candidates(torch.tensor([[[5]]]), torch.tensor([[[-1.0]]])))
    with pytest.raises(AssertionError, match="no frontier"):
        trees.add(Candidates(torch.tensor([[[5]]]), torch.tensor([[[-1.0]]])))
