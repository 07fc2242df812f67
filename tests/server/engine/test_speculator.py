"""The speculator: tree sizes by load, trees that nest, and what the heads are asked."""

import pytest
import torch

from heads.medusa import MedusaHeads
from heads.tree_search import AcceptanceProfile, best_tree
from server.config import SamplingParams
from server.engine.cost_model import CostModel
from server.engine.sequence import Sequence
from server.engine.speculator import Speculator
from tests.engine_tools import make_sequence, random_heads, wide_profile

VOCAB = 16
GREEDY = SamplingParams(temperature=0.0)
# Every token of a step costs the same: trees only pay where a node is almost sure.
LINEAR = CostModel((1, 2), (1.0, 2.0), draft_s=0.0)
# A step costs the same whatever its size: the largest tree pays.
FLAT = CostModel((1, 2), (1.0, 1.0), draft_s=0.0)


def speculator(
    max_nodes: int = 8, fixed_size: int | None = None, costs: CostModel | None = None
) -> Speculator:
    made = Speculator(random_heads(VOCAB), wide_profile(), max_nodes, fixed_size)
    made.cost_model = costs
    return made


class TestTreeSize:
    def test_is_one_without_heads(self) -> None:
        assert Speculator(None, None, max_nodes=32).tree_size(1) == 1

    def test_is_what_the_configuration_fixes(self) -> None:
        assert speculator(fixed_size=5, costs=FLAT).tree_size(1) == 5

    def test_is_the_largest_where_no_cost_was_measured(self) -> None:
        assert speculator(max_nodes=8).tree_size(3) == 8

    def test_follows_the_measured_cost(self) -> None:
        assert speculator(costs=FLAT).tree_size(1) == 8
        assert speculator(costs=LINEAR).tree_size(1) == 1

    def test_shrinks_under_load(self) -> None:
        cliff = CostModel((1, 8, 16, 64), (1.0, 1.0, 4.0, 40.0), draft_s=0.0)
        sizes = [speculator(costs=cliff).tree_size(load) for load in (1, 2, 4, 8, 64)]
        assert sizes[0] == 8
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 1

    def test_is_one_with_heads_that_were_never_right(self) -> None:
        useless = AcceptanceProfile(((0.0, 0.0), (0.0, 0.0)))
        made = Speculator(random_heads(VOCAB), useless, 8, fixed_size=8)
        assert made.tree_size(1) == 1
        made.propose_once(torch.zeros(1, 8))


class TestDraft:
    CANDIDATES = ([3, 4, 5], [6, 7, 8], [9, 10, 11])

    def test_fills_the_best_tree_of_that_size(self) -> None:
        drafts = speculator().draft(1, self.CANDIDATES, 6)
        assert drafts.tree == best_tree(wide_profile(), 6)
        assert drafts.token_ids[0] == 1
        depths, ranks = drafts.tree.depths, drafts.tree.ranks
        expected = [self.CANDIDATES[depths[i] - 1][ranks[i]] for i in range(1, 6)]
        assert list(drafts.token_ids[1:]) == expected

    def test_smaller_trees_are_beginnings_of_larger_ones(self) -> None:
        made = speculator()
        for size in range(1, 8):
            small, large = (made.draft(1, self.CANDIDATES, n) for n in (size, size + 1))
            assert large.token_ids[:size] == small.token_ids
            assert small.tree.num_nodes == size

    def test_a_profile_too_small_for_the_limit_gives_its_whole_tree(self) -> None:
        made = Speculator(random_heads(VOCAB), AcceptanceProfile(((0.5, 0.2),)), 8)
        assert made.draft(1, self.CANDIDATES, 8).tree.num_nodes == 3

    def test_trees_are_never_deeper_than_there_are_heads(self) -> None:
        # Heads that were saved without a profile get a cautious one of a fixed depth.
        for num_heads in (1, 2, 3):
            made = Speculator(random_heads(VOCAB, num_heads), None, 32)
            sequence = propose(made)
            assert sequence.candidate_ids is not None
            drafts = made.draft(1, sequence.candidate_ids, 32)
            assert drafts.tree.max_depth == min(num_heads, 2)


def propose(made: Speculator) -> Sequence:
    sequence = make_sequence((1, 2), (3,), GREEDY, vocab_size=VOCAB)
    made.propose([sequence], torch.ones(1, 8))
    return sequence


class TestPropose:
    def test_sets_candidates_of_every_depth_and_rank(self) -> None:
        candidates = propose(speculator()).candidate_ids
        assert candidates is not None
        assert [len(ids) for ids in candidates] == [3, 3, 3]

    def test_asks_the_heads_about_the_last_token_and_the_given_state(self) -> None:
        heads = random_heads(VOCAB)
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(2))
        made = Speculator(heads, wide_profile(), 8)
        sequences = [make_sequence((1,), (token,), GREEDY, vocab_size=VOCAB) for token in (3, 9)]
        hidden_BD = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
        made.propose(sequences, hidden_BD)
        expected = heads.propose(hidden_BD, torch.tensor([3, 9]), 3, [None, None])
        assert [s.candidate_ids for s in sequences] == expected.token_ids_BKR.tolist()

    def test_without_heads_or_sequences_nothing_happens(self) -> None:
        speculator().propose([], torch.zeros(0, 8))
        assert propose(Speculator(None, None, 8)).candidate_ids is None

    def test_prompt_tokens_outside_the_draft_vocabulary_are_looked_up_once(self) -> None:
        config = random_heads(VOCAB).config
        assert config.draft_vocab_size is None
        assert speculator().seen_rows([1, 2]) is None, "the whole vocabulary is drafted"
        assert Speculator(None, None, 8).seen_rows([1]) is None

    @pytest.mark.parametrize("seen", [(1, 2), (1, 9, 14)])
    def test_seen_tokens_compete_with_the_draft_vocabulary(self, seen: tuple[int, ...]) -> None:
        full = random_heads(VOCAB)
        config = type(full.config)(hidden_size=8, vocab_size=VOCAB, num_heads=2, draft_vocab_size=4)
        rows = full.draft_rows_UD
        heads = MedusaHeads(config, rows, rows, torch.tensor([0, 1, 2, 3]))
        made = Speculator(heads, wide_profile(2, 6), 64)
        sequence = make_sequence(seen, (3,), GREEDY, vocab_size=VOCAB)
        sequence.seen_rows = made.seen_rows(seen)
        made.propose([sequence], torch.ones(1, 8))
        assert sequence.candidate_ids is not None
        drafted = {token for ids in sequence.candidate_ids for token in ids} - {-1}
        assert drafted == {0, 1, 2, 3, *seen}
