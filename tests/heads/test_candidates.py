from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads.calibration import Estimate, Outcome
from heads.candidates import DraftTokens, TreeBatch, draft_tokens
from heads.tree import DraftTree
from tests.heads.trees import random_drafts, random_tree

# The root has the children 1 and 3; node 2 is below 1.
TREE = DraftTree((-1, 0, 1, 0), (-1, 0, 0, 1))
ESTIMATES = [Estimate(0.5, 0.5, 0.5, cell) for cell in range(4)]
CPU = torch.device("cpu")
ROOT = 1000


def token_by_path_slowly(
    tree: DraftTree, candidates: list[list[int]]
) -> dict[tuple[int, ...], int]:
    """Path to token, for the nodes on whose path no candidate is padding."""
    tokens = {}
    for path in tree.paths():
        along = [candidates[depth][rank] for depth, rank in enumerate(path)]
        if -1 not in along:
            tokens[path] = along[-1] if along else ROOT
    return tokens


class TestDraftTokens:
    def test_each_node_takes_the_candidate_of_its_depth_and_rank(self) -> None:
        tree = DraftTree.from_rank_paths([(0,), (1,), (0, 1), (1, 0)])
        drafts = draft_tokens(tree, ROOT, [[10, 11], [20, 21]])
        assert drafts == DraftTokens(tree, (ROOT, 10, 11, 21, 20))

    def test_the_tree_is_kept_when_nothing_is_padding(self) -> None:
        tree = DraftTree.chain(2)
        assert draft_tokens(tree, ROOT, [[1, 2], [3, 4]]).tree is tree

    def test_plain_decoding_needs_no_candidates(self) -> None:
        drafts = draft_tokens(DraftTree.root_only(), ROOT, [])
        assert drafts == DraftTokens(DraftTree.root_only(), (ROOT,))

    def test_token_0_is_a_token(self) -> None:
        assert draft_tokens(DraftTree.chain(1), 0, [[0]]).token_ids == (0, 0)

    def test_padding_is_dropped_with_all_that_is_below_it(self) -> None:
        tree = DraftTree.from_rank_paths([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])
        drafts = draft_tokens(tree, ROOT, [[10, -1], [20], [30]])
        assert drafts.token_ids == (ROOT, 10, 20)
        assert drafts.tree.paths() == ((), (0,), (0, 0))

    def test_without_any_candidate_only_the_root_is_left(self) -> None:
        drafts = draft_tokens(DraftTree.chain(3), ROOT, [[-1], [-1], [-1]])
        assert drafts == DraftTokens(DraftTree.root_only(), (ROOT,))

    @given(st.randoms(use_true_random=False), st.integers(1, 16), st.floats(0.0, 1.0))
    def test_any_padding_leaves_the_paths_without_it(
        self, rng: Random, num_nodes: int, share: float
    ) -> None:
        tree = random_tree(rng, num_nodes, num_ranks=3)
        candidates = [
            [-1 if rng.random() < share else 10 * depth + rank for rank in range(3)]
            for depth in range(max(1, tree.max_depth))
        ]
        drafts = draft_tokens(tree, ROOT, candidates)
        drafted = dict(zip(drafts.tree.paths(), drafts.token_ids, strict=True))
        assert drafted == token_by_path_slowly(tree, candidates)
        assert -1 not in drafts.token_ids

    @pytest.mark.parametrize(
        ("tree", "shape"), [(DraftTree.chain(3), "2 x 2"), (DraftTree((-1, 0), (-1, 2)), "2 x 2")]
    )
    def test_a_tree_larger_than_the_candidates_is_refused(
        self, tree: DraftTree, shape: str
    ) -> None:
        with pytest.raises(ValueError, match=f"the candidates have the shape {shape}"):
            draft_tokens(tree, ROOT, [[1, 2], [3, 4]])

    def test_a_tree_without_any_candidates_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the candidates have the shape 0 x 0"):
            draft_tokens(DraftTree.chain(1), ROOT, [])


class TestLimited:
    @given(st.randoms(use_true_random=False), st.integers(1, 12))
    def test_keeps_the_first_nodes_that_are_not_too_deep(self, rng: Random, size: int) -> None:
        drafts = random_drafts(rng, size, vocab_size=9)
        num_nodes, max_depth = rng.randint(1, 13), rng.randint(0, 5)
        found = drafts.limited(num_nodes, max_depth)
        tree = drafts.tree
        kept = [node for node in range(tree.num_nodes) if tree.depths[node] <= max_depth]
        kept = kept[:num_nodes]
        assert found.token_ids == tuple(drafts.token_ids[node] for node in kept)
        assert found.tree.ranks == tuple(tree.ranks[node] for node in kept)
        assert found.tree.depths == tuple(tree.depths[node] for node in kept)
        for node, old in enumerate(kept[1:], start=1):
            assert kept[found.tree.parents[node]] == tree.parents[old]

    @pytest.mark.parametrize(("num_nodes", "max_depth"), [(3, 9), (9, 1), (9, 9), (1, 0)])
    def test_estimates_stay_with_their_nodes(self, num_nodes: int, max_depth: int) -> None:
        drafts = DraftTokens(TREE, (5, 6, 7, 8), tuple(ESTIMATES[node] for node in (1, 2, 3)))
        found = drafts.limited(num_nodes, max_depth)
        cell_of = {6: 1, 7: 2, 8: 3}
        assert [e.cell for e in found.estimates] == [cell_of[t] for t in found.token_ids[1:]]


class TestOutcomes:
    def test_tell_of_the_nodes_below_accepted_ones(self) -> None:
        drafts = DraftTokens(TREE, (5, 6, 7, 8), tuple(ESTIMATES[node] for node in (1, 2, 3)))
        assert drafts.outcomes([0]) == [Outcome(ESTIMATES[1], False), Outcome(ESTIMATES[3], False)]
        assert drafts.outcomes([0, 1]) == [
            Outcome(ESTIMATES[1], True),
            Outcome(ESTIMATES[2], False),
            Outcome(ESTIMATES[3], False),
        ]

    def test_are_none_where_nothing_was_estimated(self) -> None:
        assert DraftTokens(TREE, (5, 6, 7, 8)).outcomes([0, 1]) == []


class TestTreeBatch:
    def test_a_single_tree_needs_no_padding(self) -> None:
        tree = DraftTree.from_rank_paths([(0,), (1,), (1, 0)])
        batch = TreeBatch.from_drafts([DraftTokens(tree, (5, 6, 7, 8))], CPU)
        assert batch.token_ids_BN.tolist() == [[5, 6, 7, 8]]
        assert batch.parents_BN.tolist() == [[-1, 0, 0, 2]]
        assert batch.depths_BN.tolist() == [[0, 1, 1, 2]]
        assert batch.max_depth == 2

    @given(st.randoms(use_true_random=False), st.lists(st.integers(1, 9), min_size=1, max_size=5))
    def test_each_row_is_its_tree_and_padding_of_minus_1(
        self, rng: Random, sizes: list[int]
    ) -> None:
        drafts = [random_drafts(rng, size, vocab_size=4) for size in sizes]
        batch = TreeBatch.from_drafts(drafts, CPU)
        for row, (draft, size) in enumerate(zip(drafts, sizes, strict=True)):
            padding = (-1,) * (max(sizes) - size)
            assert tuple(batch.token_ids_BN[row].tolist()) == draft.token_ids + padding
            assert tuple(batch.parents_BN[row].tolist()) == draft.tree.parents + padding
            assert tuple(batch.depths_BN[row].tolist()) == draft.tree.depths + padding
        assert batch.max_depth == max(draft.tree.max_depth for draft in drafts)

    def test_every_field_is_int64_and_contiguous(self) -> None:
        batch = TreeBatch.from_drafts([DraftTokens(DraftTree.chain(2), (1, 2, 3))] * 3, CPU)
        for tensor in (batch.token_ids_BN, batch.parents_BN, batch.depths_BN):
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
            assert tensor.shape == (3, 3)

    def test_no_draft_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no drafts; give at least one"):
            TreeBatch.from_drafts([], CPU)
