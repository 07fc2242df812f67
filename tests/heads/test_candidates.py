from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads.calibration import DraftOutcome, Estimate
from heads.candidates import DraftTokens, TreeBatch
from heads.tree import DraftTree
from tests.heads.trees import random_drafts
from tests.support.trees import chain, tree_of_paths

# The root has the children 1 and 3; node 2 is below 1.
TREE = DraftTree((-1, 0, 1, 0), (-1, 0, 0, 1))
ESTIMATES = [Estimate(0.5, 0.5, 0.5, "medusa", cell) for cell in range(4)]
CPU = torch.device("cpu")


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
        assert drafts.outcomes([0]) == [
            DraftOutcome(ESTIMATES[1], False),
            DraftOutcome(ESTIMATES[3], False),
        ]
        assert drafts.outcomes([0, 1]) == [
            DraftOutcome(ESTIMATES[1], True),
            DraftOutcome(ESTIMATES[2], False),
            DraftOutcome(ESTIMATES[3], False),
        ]

    def test_are_none_where_nothing_was_estimated(self) -> None:
        assert DraftTokens(TREE, (5, 6, 7, 8)).outcomes([0, 1]) == []


class TestTreeBatch:
    def test_a_single_tree_needs_no_padding(self) -> None:
        tree = tree_of_paths([(0,), (1,), (1, 0)])
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
        batch = TreeBatch.from_drafts([DraftTokens(chain(2), (1, 2, 3))] * 3, CPU)
        for tensor in (batch.token_ids_BN, batch.parents_BN, batch.depths_BN):
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
            assert tensor.shape == (3, 3)

    def test_no_draft_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no drafts; give at least one"):
            TreeBatch.from_drafts([], CPU)
