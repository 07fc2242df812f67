"""The speculator: tree sizes by load, and when the drafter is asked at all."""

import torch

from heads.tree_search import best_tree, node_values
from server.config import SamplingParams
from server.engine.cost_model import CostModel
from server.engine.drafter import MedusaDrafter
from server.engine.speculator import Speculator
from tests.engine_tools import make_sequence, random_heads, wide_profile

VOCAB = 16
# Every token of a step costs the same: trees only pay where a node is almost sure.
LINEAR = CostModel((1, 2), (1.0, 2.0), draft_s=0.0)
# A step costs the same whatever its size: the largest tree pays.
FLAT = CostModel((1, 2), (1.0, 1.0), draft_s=0.0)


def speculator(
    max_nodes: int = 8, fixed_size: int | None = None, costs: CostModel | None = None
) -> Speculator:
    tree = best_tree(wide_profile(), max_nodes)
    drafter = MedusaDrafter(random_heads(VOCAB), tree)
    made = Speculator(drafter, node_values(wide_profile(), tree), fixed_size)
    made.cost_model = costs
    return made


class TestTreeSize:
    def test_is_one_without_heads(self) -> None:
        assert Speculator(None).tree_size(1) == 1
        assert Speculator(None, (1.0, 0.5)).tree_size(1) == 1

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
        drafter = MedusaDrafter(random_heads(VOCAB), best_tree(wide_profile(), 1))
        assert Speculator(drafter, (1.0,), fixed_size=8).tree_size(1) == 1


class TestPropose:
    def propose(self, made: Speculator) -> bool:
        """Whether a sequence got a proposal."""
        sampling = SamplingParams(temperature=0.0)
        sequence = make_sequence((1, 2), (3,), sampling, vocab_size=VOCAB)
        made.propose([sequence], torch.ones(1, 8), [], num_decoding=1)
        return sequence.proposal is not None

    def test_asks_the_drafter_where_trees_pay(self) -> None:
        assert self.propose(speculator(costs=FLAT))

    def test_leaves_the_drafter_alone_where_they_do_not(self) -> None:
        assert not self.propose(speculator(costs=LINEAR))

    def test_does_nothing_without_one(self) -> None:
        assert not self.propose(Speculator(None))
        assert Speculator(None).seen_rows([1]) is None
