"""Both acceptance rules against walks of one sequence at a time.

Shape suffixes: B sequences, N nodes, V vocabulary, X rows.
"""

import math
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads.acceptance import (
    AcceptedPaths,
    DrawNext,
    accept_exact,
    accept_typical,
    typical_log_threshold,
)
from heads.candidates import DraftTokens, TreeBatch
from heads.tree import DraftTree
from tests.heads.trees import random_drafts
from tests.support.trees import chain, tree_of_paths

CPU = torch.device("cpu")
VOCAB_SIZE = 5
NEVER = 10**6

sizes_of_trees = st.lists(st.integers(1, 12), min_size=1, max_size=6)
randoms = st.randoms(use_true_random=False)


def random_batch(rng: Random, sizes: list[int]) -> list[DraftTokens]:
    return [random_drafts(rng, size, VOCAB_SIZE) for size in sizes]


def draw_from(next_BN: list[list[int]]) -> DrawNext:
    """Draw the token that a table has for the node."""
    table_BN = torch.tensor([[*row, *[NEVER] * (12 - len(row))] for row in next_BN])
    return lambda node_B: table_BN.gather(1, node_B.unsqueeze(1)).squeeze(1)


def path_of(accepted: AcceptedPaths, row: int) -> list[int]:
    """One sequence's accepted nodes, after a check of the padding around them."""
    length = int(accepted.num_nodes_B[row])
    nodes: list[int] = accepted.node_ids_BD[row].tolist()
    assert nodes[length:] == [-1] * (len(nodes) - length)
    return nodes[:length]


def exact_path_slowly(draft: DraftTokens, next_N: list[int], node: int = 0) -> list[int]:
    for child in draft.tree.children()[node]:
        if draft.token_ids[child] == next_N[node]:
            return [node, *exact_path_slowly(draft, next_N, child)]
    return [node]


def typical_path_slowly(draft: DraftTokens, log_probs: list[float], floor: float) -> list[int]:
    """Take the deepest typical path, the more probable of two equally deep ones."""

    def paths_from(node: int) -> list[list[int]]:
        typical = [child for child in draft.tree.children()[node] if log_probs[child] > floor]
        return [[node], *([node, *path] for child in typical for path in paths_from(child))]

    return max(paths_from(0), key=lambda path: (len(path), sum(log_probs[n] for n in path[1:])))


class TestExact:
    @settings(max_examples=40)
    @given(randoms, sizes_of_trees)
    def test_a_batch_is_walked_as_sequence_by_sequence(self, rng: Random, sizes: list[int]) -> None:
        drafts = random_batch(rng, sizes)
        next_BN = [[rng.randrange(VOCAB_SIZE) for _ in draft.token_ids] for draft in drafts]
        accepted = accept_exact(TreeBatch.from_drafts(drafts, CPU), draw_from(next_BN))
        for row, (draft, next_N) in enumerate(zip(drafts, next_BN, strict=True)):
            path = exact_path_slowly(draft, next_N)
            assert path_of(accepted, row) == path
            assert int(accepted.bonus_B[row]) == next_N[path[-1]]

    @settings(max_examples=40)
    @given(randoms, sizes_of_trees)
    def test_drafts_that_are_never_right_leave_the_root(
        self, rng: Random, sizes: list[int]
    ) -> None:
        drafts = random_batch(rng, sizes)
        accepted = accept_exact(
            TreeBatch.from_drafts(drafts, CPU), lambda node_B: torch.full_like(node_B, NEVER)
        )
        assert accepted.num_nodes_B.tolist() == [1] * len(sizes)
        assert accepted.node_ids_BD[:, 0].tolist() == [0] * len(sizes)
        assert accepted.bonus_B.tolist() == [NEVER] * len(sizes)

    def test_a_chain_that_is_always_right_is_accepted_to_its_end(self) -> None:
        drafts = [DraftTokens(chain(4), (9, 10, 11, 12, 13))]
        accepted = accept_exact(TreeBatch.from_drafts(drafts, CPU), lambda node_B: node_B + 10)
        assert accepted.node_ids_BD.tolist() == [[0, 1, 2, 3, 4]]
        assert accepted.num_nodes_B.tolist() == [5]
        assert accepted.bonus_B.tolist() == [14]

    def test_plain_decoding_draws_once_and_keeps_the_root(self) -> None:
        calls: list[list[int]] = []

        def draw_next(node_B: Tensor) -> Tensor:
            calls.append(node_B.tolist())
            return node_B + 3

        drafts = [DraftTokens(DraftTree.root_only(), (token,)) for token in (1, 2)]
        accepted = accept_exact(TreeBatch.from_drafts(drafts, CPU), draw_next)
        assert accepted.node_ids_BD.tolist() == [[0], [0]]
        assert accepted.bonus_B.tolist() == [3, 3]
        assert calls == [[0, 0]]

    def test_it_stops_drawing_as_soon_as_no_sequence_moves(self) -> None:
        calls = 0

        def draw_next(node_B: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.where(node_B == 0, 1, NEVER)

        drafts = [DraftTokens(chain(6), (0, 1, 1, 1, 1, 1, 1))]
        accepted = accept_exact(TreeBatch.from_drafts(drafts, CPU), draw_next)
        assert path_of(accepted, 0) == [0, 1]
        assert calls == 2

    def test_a_sequence_that_has_stopped_keeps_its_first_draw(self) -> None:
        # The first sequence would match its child with the second draw at the same node.
        draws = iter([[8, 1], [1, 2], [1, 3]])
        drafts = [DraftTokens(chain(2), (0, 1, 2)), DraftTokens(chain(2), (0, 1, 2))]
        accepted = accept_exact(
            TreeBatch.from_drafts(drafts, CPU), lambda _: torch.tensor(next(draws))
        )
        assert accepted.num_nodes_B.tolist() == [1, 3]
        assert accepted.bonus_B.tolist() == [8, 3]

    def test_padding_is_never_accepted(self) -> None:
        drafts = [
            DraftTokens(DraftTree.root_only(), (0,)),
            DraftTokens(tree_of_paths([(0,), (1,), (2,)]), (0, 1, 2, 3)),
        ]
        trees = TreeBatch.from_drafts(drafts, CPU)
        for next_BN in ([[-1], [-1]], [[0], [0]]):
            accepted = accept_exact(trees, draw_from(next_BN))
            assert accepted.num_nodes_B.tolist() == [1, 1]

    def test_tokens_are_only_matched_below_the_accepted_node(self) -> None:
        # Token 7 sits below node 2, but the target goes through node 1.
        tree = tree_of_paths([(0,), (1,), (1, 0)])
        drafts = [DraftTokens(tree, (0, 5, 6, 7))]
        accepted = accept_exact(TreeBatch.from_drafts(drafts, CPU), draw_from([[5, 7, 0, 0]]))
        assert path_of(accepted, 0) == [0, 1]
        assert accepted.bonus_B.tolist() == [7]


def typical_inputs(
    rng: Random, drafts: list[DraftTokens], floor: float
) -> tuple[TreeBatch, list[list[float]]]:
    trees = TreeBatch.from_drafts(drafts, CPU)
    log_probs = [
        [rng.choice([floor, -math.inf, floor + rng.uniform(-1.0, 1.5)]) for _ in row]
        for row in trees.token_ids_BN.tolist()
    ]
    return trees, torch.tensor(log_probs).tolist()


def bonus_of(node_B: Tensor) -> Tensor:
    return node_B + 100


class TestTypical:
    @settings(max_examples=40)
    @given(randoms, sizes_of_trees)
    def test_a_batch_is_judged_as_sequence_by_sequence(self, rng: Random, sizes: list[int]) -> None:
        drafts = random_batch(rng, sizes)
        trees, log_probs = typical_inputs(rng, drafts, floor=-2.0)
        log_probs_BN = torch.tensor(log_probs)
        floor_BN = torch.full_like(log_probs_BN, -2.0)
        accepted = accept_typical(trees, log_probs_BN, floor_BN, bonus_of)
        for row, draft in enumerate(drafts):
            path = path_of(accepted, row)
            expected = typical_path_slowly(draft, log_probs[row], floor=-2.0)
            assert len(path) == len(expected)
            # Two paths may be equally probable up to rounding: any of them will do.
            scores = [sum(log_probs[row][node] for node in nodes[1:]) for nodes in (path, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)
            assert int(accepted.bonus_B[row]) == path[-1] + 100

    @settings(max_examples=40)
    @given(randoms, sizes_of_trees)
    def test_every_accepted_token_passes_the_rule_below_its_accepted_parent(
        self, rng: Random, sizes: list[int]
    ) -> None:
        drafts = random_batch(rng, sizes)
        trees, log_probs = typical_inputs(rng, drafts, floor=-1.0)
        log_probs_BN = torch.tensor(log_probs)
        threshold_BN = torch.tensor([[rng.uniform(-3, 0) for _ in row] for row in log_probs])
        accepted = accept_typical(trees, log_probs_BN, threshold_BN, bonus_of)
        for row, draft in enumerate(drafts):
            path = path_of(accepted, row)
            for parent, node in pairwise(path):
                assert draft.tree.parents[node] == parent
                assert log_probs_BN[row, node] > threshold_BN[row, node]

    def test_tokens_that_always_pass_are_accepted_to_the_deepest_leaf(self) -> None:
        tree = tree_of_paths([(0,), (1,), (1, 0), (1, 0, 0)])
        trees = TreeBatch.from_drafts([DraftTokens(tree, (0, 1, 2, 3, 4))], CPU)
        log_probs_BN = torch.tensor([[0.0, -0.1, -5.0, -5.0, -5.0]])
        accepted = accept_typical(trees, log_probs_BN, torch.full((1, 5), -math.inf), bonus_of)
        assert accepted.node_ids_BD.tolist() == [[0, 2, 3, 4]]
        assert accepted.bonus_B.tolist() == [104]

    def test_tokens_that_never_pass_leave_the_root(self) -> None:
        trees = TreeBatch.from_drafts([DraftTokens(chain(2), (0, 1, 2))] * 2, CPU)
        zeros_BN = torch.zeros(2, 3)
        accepted = accept_typical(trees, zeros_BN, zeros_BN, bonus_of)
        assert accepted.node_ids_BD.tolist() == [[0, -1, -1]] * 2
        assert accepted.bonus_B.tolist() == [100, 100]

    def test_of_two_equally_deep_paths_the_more_probable_is_kept(self) -> None:
        tree = tree_of_paths([(0,), (1,), (0, 0), (1, 0)])
        trees = TreeBatch.from_drafts([DraftTokens(tree, (0, 1, 2, 3, 4))], CPU)
        # The second path loses at depth 1 and wins in all.
        log_probs_BN = torch.tensor([[0.0, -1.0, -1.5, -2.0, -0.5]])
        accepted = accept_typical(trees, log_probs_BN, torch.full((1, 5), -9.0), bonus_of)
        assert accepted.node_ids_BD.tolist() == [[0, 2, 4]]

    def test_a_typical_token_below_a_refused_one_is_refused(self) -> None:
        trees = TreeBatch.from_drafts([DraftTokens(chain(3), (0, 1, 2, 3))], CPU)
        log_probs_BN = torch.tensor([[0.0, -0.1, -9.0, -0.1]])
        accepted = accept_typical(trees, log_probs_BN, torch.full((1, 4), -2.0), bonus_of)
        assert accepted.node_ids_BD.tolist() == [[0, 1, -1, -1]]

    def test_plain_decoding_keeps_the_root(self) -> None:
        trees = TreeBatch.from_drafts([DraftTokens(DraftTree.root_only(), (0,))], CPU)
        junk_B1 = torch.tensor([[-math.inf]])
        accepted = accept_typical(trees, junk_B1, torch.zeros(1, 1), bonus_of)
        assert accepted.node_ids_BD.tolist() == [[0]]
        assert accepted.num_nodes_B.tolist() == [1]

    def test_padding_and_roots_may_hold_anything(self) -> None:
        drafts = [
            DraftTokens(DraftTree.root_only(), (0,)),
            DraftTokens(chain(2), (0, 1, 2)),
        ]
        trees = TreeBatch.from_drafts(drafts, CPU)
        for junk in (0.0, -math.inf, math.nan):
            log_probs_BN = torch.tensor([[junk, junk, junk], [junk, -0.5, -0.5]])
            accepted = accept_typical(trees, log_probs_BN, torch.full((2, 3), -1.0), bonus_of)
            assert accepted.node_ids_BD.tolist() == [[0, -1, -1], [0, 1, 2]]

    def test_its_inputs_are_left_as_they_are(self) -> None:
        trees = TreeBatch.from_drafts([DraftTokens(chain(1), (0, 1))], CPU)
        log_probs_BN, threshold_BN = torch.full((1, 2), -0.5), torch.full((1, 2), -1.0)
        accept_typical(trees, log_probs_BN, threshold_BN, bonus_of)
        assert log_probs_BN.tolist() == [[-0.5, -0.5]]
        assert threshold_BN.tolist() == [[-1.0, -1.0]]


def threshold_slowly(probs: list[float], epsilon: float, delta: float) -> float:
    entropy = -sum(p * math.log(p) for p in probs if p > 0.0)
    return min(epsilon, delta * math.exp(-entropy))


class TestTypicalThreshold:
    @given(
        st.lists(st.floats(0.001, 10.0), min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 1)
    )
    def test_it_is_the_formula_of_the_paper(
        self, weights: list[float], epsilon: float, delta: float
    ) -> None:
        probs = [weight / sum(weights) for weight in weights]
        log_probs_XV = torch.tensor([probs]).log()
        threshold = float(typical_log_threshold(log_probs_XV, epsilon, delta).exp())
        assert threshold == pytest.approx(threshold_slowly(probs, epsilon, delta), abs=1e-5)

    def test_a_certain_distribution_is_bounded_by_epsilon_and_delta(self) -> None:
        log_probs_XV = torch.tensor([[0.0, -math.inf, -math.inf]])
        assert typical_log_threshold(log_probs_XV, 0.09, 0.3).exp().item() == pytest.approx(0.09)
        assert typical_log_threshold(log_probs_XV, 0.5, 0.3).exp().item() == pytest.approx(0.3)

    def test_a_flat_distribution_lowers_the_floor(self) -> None:
        log_probs_XV = torch.full((1, 100), 0.01).log()
        assert typical_log_threshold(log_probs_XV, 0.09, 0.3).exp().item() == pytest.approx(0.003)

    @pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.3), (0.09, 0.0), (0.0, 0.0)])
    def test_a_zero_accepts_all_that_is_possible(self, epsilon: float, delta: float) -> None:
        log_probs_XV = torch.tensor([[0.5, 0.5, 0.0]]).log()
        threshold_X = typical_log_threshold(log_probs_XV, epsilon, delta)
        assert (log_probs_XV > threshold_X.unsqueeze(1)).tolist() == [[True, True, False]]

    def test_rows_may_differ_in_epsilon_and_delta(self) -> None:
        log_probs_XV = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(1)
        epsilons, deltas = [0.01, 0.5, 1.0], [1.0, 0.3, 0.0]
        together = typical_log_threshold(log_probs_XV, torch.tensor(epsilons), torch.tensor(deltas))
        for row, (epsilon, delta) in enumerate(zip(epsilons, deltas, strict=True)):
            alone = typical_log_threshold(log_probs_XV[row : row + 1], epsilon, delta)
            torch.testing.assert_close(together[row : row + 1], alone)

    @pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
    def test_a_factor_outside_0_to_1_is_refused(self, value: float) -> None:
        log_probs_XV = torch.zeros(1, 1)
        with pytest.raises(ValueError, match=f"epsilon is {value}; give 0 to 1"):
            typical_log_threshold(log_probs_XV, value, 0.3)
        with pytest.raises(ValueError, match=r"delta is tensor.*give 0 to 1"):
            typical_log_threshold(log_probs_XV, 0.09, torch.tensor([value]))
