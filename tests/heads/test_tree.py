from dataclasses import FrozenInstanceError
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads.tree import DraftTree
from tests.heads.trees import random_tree
from tests.support.trees import chain, rank_paths, tree_of_paths

SMALL = tree_of_paths([(0,), (0, 0), (1,), (0, 1), (0, 0, 2)])


def ancestors_slowly(tree: DraftTree, node: int) -> set[int]:
    """The node itself and all nodes above it."""
    if node == 0:
        return {0}
    return {node} | ancestors_slowly(tree, tree.parents[node])


class TestConstruction:
    def test_plain_decoding_is_the_tree_of_one_node(self) -> None:
        tree = DraftTree.root_only()
        assert (tree.parents, tree.ranks, tree.depths) == ((-1,), (-1,), (0,))
        assert (tree.num_nodes, tree.max_depth) == (1, 0)

    def test_a_chain_follows_the_best_candidate_of_each_head(self) -> None:
        tree = chain(3)
        assert tree.parents == (-1, 0, 1, 2)
        assert tree.ranks == (-1, 0, 0, 0)
        assert tree.depths == (0, 1, 2, 3)

    def test_a_chain_of_depth_0_is_the_root(self) -> None:
        assert chain(0) == DraftTree.root_only()

    def test_trees_are_equal_and_hash_alike_by_shape(self) -> None:
        again = DraftTree(SMALL.parents, SMALL.ranks)
        assert again == SMALL
        assert len({again, SMALL}) == 1
        assert again != chain(5)

    def test_a_tree_cannot_be_changed(self) -> None:
        with pytest.raises(FrozenInstanceError):
            SMALL.parents = (-1,)  # type: ignore[misc]


class TestValidation:
    def test_parents_and_ranks_go_together(self) -> None:
        with pytest.raises(ValueError, match="2 parents and 1 ranks"):
            DraftTree((-1, 0), (-1,))

    @pytest.mark.parametrize(
        ("parents", "ranks"), [((), ()), ((0,), (-1,)), ((-1,), (0,)), ((0, -1), (-1, 0))]
    )
    def test_the_first_node_is_the_root(
        self, parents: tuple[int, ...], ranks: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match="node 0 is the root"):
            DraftTree(parents, ranks)

    @pytest.mark.parametrize("parent", [-1, 1, 2, 7])
    def test_a_parent_precedes_its_node(self, parent: int) -> None:
        with pytest.raises(ValueError, match=f"node 1 has parent {parent}; give one of the nodes"):
            DraftTree((-1, parent), (-1, 0))

    def test_a_rank_is_not_negative(self) -> None:
        with pytest.raises(ValueError, match="node 1 has rank -1"):
            DraftTree((-1, 0), (-1, -1))

    def test_siblings_have_different_ranks(self) -> None:
        with pytest.raises(ValueError, match="node 2 repeats rank 3 below parent 0"):
            DraftTree((-1, 0, 0), (-1, 3, 3))

    def test_cousins_may_share_a_rank(self) -> None:
        assert DraftTree((-1, 0, 0, 1, 2), (-1, 0, 1, 0, 0)).depths == (0, 1, 1, 2, 2)


class TestRankPaths:
    def test_nodes_are_numbered_by_depth_then_as_given(self) -> None:
        assert rank_paths(SMALL) == ((), (0,), (1,), (0, 0), (0, 1), (0, 0, 2))

    def test_no_path_gives_the_root(self) -> None:
        assert tree_of_paths([]) == DraftTree.root_only()

    @given(st.randoms(use_true_random=False), st.integers(1, 20))
    def test_a_tree_is_found_again_from_its_paths(self, rng: Random, num_nodes: int) -> None:
        tree = random_tree(rng, num_nodes, num_ranks=3)
        again = tree_of_paths(rank_paths(tree)[1:])
        assert sorted(rank_paths(again)) == sorted(rank_paths(tree))


class TestRelations:
    def test_children_are_listed_in_order(self) -> None:
        assert SMALL.children() == ((1, 2), (3, 4), (), (5,), (), ())

    @given(st.randoms(use_true_random=False), st.integers(1, 20))
    def test_depth_is_the_length_of_the_path(self, rng: Random, num_nodes: int) -> None:
        tree = random_tree(rng, num_nodes, num_ranks=3)
        assert tree.depths == tuple(len(path) for path in rank_paths(tree))
        assert tree.max_depth == max(len(path) for path in rank_paths(tree))

    @given(st.randoms(use_true_random=False), st.integers(1, 20))
    def test_the_mask_shows_exactly_the_ancestors(self, rng: Random, num_nodes: int) -> None:
        tree = random_tree(rng, num_nodes, num_ranks=3)
        mask_NN = tree.ancestor_mask()
        assert mask_NN.shape == (num_nodes, num_nodes)
        assert mask_NN.dtype == torch.bool
        for node in range(num_nodes):
            assert set(mask_NN[node].nonzero().flatten().tolist()) == ancestors_slowly(tree, node)

    def test_trees_of_one_shape_share_their_mask(self) -> None:
        other_ranks = DraftTree(SMALL.parents, (-1, 4, 3, 2, 1, 0))
        assert other_ranks.ancestor_mask() is SMALL.ancestor_mask()


class TestPrefix:
    @given(st.randoms(use_true_random=False), st.integers(1, 20), st.integers(1, 20))
    def test_the_first_nodes_are_a_tree(self, rng: Random, num_nodes: int, size: int) -> None:
        tree = random_tree(rng, max(num_nodes, size), num_ranks=3)
        prefix = tree.prefix(size)
        assert prefix.num_nodes == size
        assert rank_paths(prefix) == rank_paths(tree)[:size]

    @pytest.mark.parametrize("num_nodes", [0, -1, 7])
    def test_a_size_that_the_tree_does_not_have_is_refused(self, num_nodes: int) -> None:
        with pytest.raises(ValueError, match=f"num_nodes is {num_nodes}; give 1 to 6"):
            SMALL.prefix(num_nodes)
