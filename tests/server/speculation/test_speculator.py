"""The speculator: who drafts, when the heads run, how trees are made and sized."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heads.calibration import source_of
from heads.seen_rows import SeenRows
from heads.tree_search import best_tree
from server.config import DraftMethod, Method, SamplingParams
from server.core.sequence import DraftSources, Sequence
from server.speculation.cost_model import CostModel, StepCosts, StepLoad
from server.speculation.drafter import MedusaDrafter
from server.speculation.planner import StepRequest
from server.speculation.speculator import Speculator
from server.speculation.tree_builders import MergedTrees, OwnTrees, TreeBuilder
from server.speculation.tree_sizes import FixedSizes, Foresight, PlannedSizes, TreeSizes
from tests.support.engine_tools import make_sequence, random_heads, wide_profile

VOCAB = 16
# Every token of a step costs the same: trees only pay where a node is almost sure.
LINEAR = CostModel((1, 2), (1.0, 2.0), draft_s=0.1)
# A step costs the same whatever its size: the largest tree pays.
FLAT = CostModel((1, 2), (1.0, 1.0), draft_s=0.0)
REQUEST = StepRequest(num_prompt_tokens=0, max_draft_tokens=100)


class CountingDrafter(MedusaDrafter):
    """Counts how often it was asked, and for whom."""

    def __init__(self) -> None:
        super().__init__(random_heads(VOCAB), best_tree(wide_profile(), 8))
        self.asked: list[int] = []
        self.following: list[Sequence] = []

    def propose(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        min_value: float = 0.0,
    ) -> None:
        self.asked.append(len(rooted))
        self.following += prefilling
        super().propose(rooted, hidden_BD, prefilling, min_value)

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        return None


def make(
    trees: TreeBuilder | None = None,
    sizes: TreeSizes | None = None,
    drafter: MedusaDrafter | None = None,
) -> Speculator:
    return Speculator(drafter, trees or MergedTrees(8), sizes or FixedSizes(8))


def sequence(
    made: Speculator,
    method: Method = "auto",
    prompt: tuple[int, ...] = (1, 2, 3, 1, 2),
    drafts_allowed: int = 8,
    max_tokens: int = 50,
) -> Sequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    found = make_sequence(prompt, (3,), sampling, vocab_size=VOCAB)
    found.sources, found.drafts_allowed = made.sources(method), drafts_allowed
    made.prepare(found)
    return found


def propose(made: Speculator, *rooted: Sequence, prefilling: Seq[Sequence] = ()) -> None:
    made.propose(list(rooted), torch.ones(len(rooted), 8), prefilling, len(rooted))


class TestSources:
    @pytest.mark.parametrize(
        ("method", "heads", "lookup"),
        [
            ("auto", "medusa", True),
            ("medusa", "medusa", False),
            ("lookup", None, True),
            ("none", None, False),
        ],
    )
    def test_follow_the_method(
        self, method: Method, heads: DraftMethod | None, lookup: bool
    ) -> None:
        assert make(drafter=CountingDrafter()).sources(method) == DraftSources(heads, lookup)

    def test_names_are_those_of_usage(self) -> None:
        names = [DraftSources(h, n).name for h in (None, "mtp") for n in (False, True)]
        assert names == ["none", "lookup", "mtp", "mtp+lookup"]

    def test_a_server_offers_what_it_has(self) -> None:
        assert make().methods == {"auto", "none", "lookup"}
        assert make(OwnTrees(), drafter=CountingDrafter()).methods == {"auto", "none", "medusa"}
        assert make(MergedTrees(8, uses_lookup=False)).methods == {"auto", "none"}


class TestPropose:
    def test_heads_and_lookup_make_one_tree(self) -> None:
        made = make(drafter=CountingDrafter())
        rooted = sequence(made)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.tree.num_nodes == 8
        assert 1 in rooted.proposal.token_ids[1:], "what followed 1 2 3 before"

    def test_each_request_has_its_own_sources(self) -> None:
        drafter = CountingDrafter()
        made = make(drafter=drafter)
        both, copying = sequence(made), sequence(made, "lookup")
        propose(made, copying, both)
        assert drafter.asked == [1]
        assert copying.head_proposal is None
        assert copying.proposal is not None
        assert copying.proposal.token_ids == (3, 1, 2, 3)

    def test_without_a_match_lookup_leaves_the_root(self) -> None:
        made = make()
        rooted = sequence(made, prompt=(1, 2))
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.token_ids == (3,)

    def test_the_heads_follow_prompts(self) -> None:
        drafter = CountingDrafter()
        made = make(drafter=drafter)
        copying, following = sequence(made, "lookup"), sequence(made)
        propose(made, prefilling=[copying, following])
        assert drafter.following == [following]

    def test_own_trees_are_the_heads_alone(self) -> None:
        made = make(OwnTrees(), drafter=CountingDrafter())
        rooted = sequence(made)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.tree == best_tree(wide_profile(), 8)

    def test_a_tree_is_no_deeper_than_the_output_may_grow(self) -> None:
        made = make()
        rooted = sequence(made, max_tokens=3)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.tree.max_depth == 1

    def test_a_prediction_is_a_reference(self) -> None:
        made = make()
        rooted = sequence(made, prompt=(9,))
        rooted.request = replace(rooted.request, prediction_token_ids=(3, 4, 5, 6))
        rooted.token_ids.pop()
        made.prepare(rooted)
        rooted.token_ids.append(3)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.token_ids == (3, 4, 5, 6)
        assert [estimate.reference_place for estimate in rooted.proposal.estimates] == [1, 2, 3]


class TestFixedSizes:
    def test_are_what_the_configuration_says(self) -> None:
        made = make(sizes=FixedSizes(5))
        assert made.sizes.choose([sequence(made), sequence(made)], REQUEST) == [5, 5]
        assert FixedSizes(5).wants_heads(3)
        assert not FixedSizes(1).wants_heads(3)

    def test_shrink_to_the_room_and_to_what_a_request_allows(self) -> None:
        made = make(sizes=FixedSizes(5))
        members = [sequence(made, drafts_allowed=2), sequence(made)]
        assert made.sizes.choose(members, StepRequest(0, 5)) == [2, 3]


class TestPlannedSizes:
    def planned(self, costs: CostModel) -> Speculator:
        return make(sizes=PlannedSizes(StepCosts(costs)), drafter=CountingDrafter())

    def test_take_the_whole_tree_where_tokens_are_free(self) -> None:
        made = self.planned(FLAT)
        rooted = sequence(made)
        propose(made, rooted)
        assert made.sizes.choose([rooted], REQUEST) == [8]

    def test_never_exceed_what_a_request_allows(self) -> None:
        made = self.planned(FLAT)
        rooted = sequence(made, drafts_allowed=3)
        propose(made, rooted)
        assert made.sizes.choose([rooted], REQUEST) == [3]

    def test_a_sequence_without_drafts_keeps_its_root(self) -> None:
        made = self.planned(FLAT)
        plain, rooted = sequence(made, "none", drafts_allowed=1), sequence(made)
        propose(made, rooted)
        assert made.sizes.choose([plain, rooted], REQUEST) == [1, 8]

    @pytest.mark.parametrize("num_plain_steps", [0, 500])
    def test_requests_without_drafts_do_not_make_time_look_cheap(
        self, num_plain_steps: int
    ) -> None:
        made = self.planned(CostModel((1, 8), (1.0, 2.0), draft_s=0.0))
        plain, rooted = sequence(made, "none", drafts_allowed=1), sequence(made)
        propose(made, rooted)
        drafted = rooted.proposal
        assert drafted is not None

        def sizes_for(value: float) -> list[int]:
            estimates = tuple(one._replace(value=value) for one in drafted.estimates)
            rooted.proposal = replace(drafted, estimates=estimates)
            return made.sizes.choose([rooted], REQUEST)

        # Seven nodes of 0.9 bring 7.3 tokens in 2 seconds, so a node's seventh of a second is
        # worth half a token.
        assert [sizes_for(0.9) for _ in range(50)][-1] == [8]
        for _ in range(num_plain_steps):
            made.sizes.choose([plain], REQUEST)
        assert sizes_for(0.4) == [1]
        assert sizes_for(0.6) == [8]

    def test_the_heads_rest_where_they_do_not_pay(self) -> None:
        made = self.planned(LINEAR)
        drafter = made.drafter
        assert isinstance(drafter, CountingDrafter)
        rooted = sequence(made)
        for _ in range(200):
            rooted.proposal = rooted.head_proposal = None
            propose(made, rooted)
            made.sizes.choose([rooted], REQUEST)
        assert 1 <= len(drafter.asked) < 40

    def test_what_does_not_pay_need_not_be_drafted(self) -> None:
        made = self.planned(LINEAR)
        assert made.sizes.least_value() == 0.0
        rooted = sequence(made)
        for _ in range(100):
            made.sizes.choose([rooted], REQUEST)
        assert made.sizes.least_value() == 0.1, "half of a price of one token, within bounds"
        propose(made, rooted)
        assert rooted.proposal is not None
        assert all(estimate.value > 0.1 for estimate in rooted.proposal.estimates)

    def test_foretell_tokens_and_seconds(self) -> None:
        sizes = PlannedSizes(StepCosts(FLAT))
        made = make(sizes=sizes)
        rooted = sequence(made, "none")
        sizes.choose([rooted], REQUEST)
        sizes.learn_step(1, StepLoad(1), 1, 1.1)
        assert sizes.foresight == Foresight(1.0, 1.0, 1, 1.1)

    def test_foretell_drafting_too(self) -> None:
        sizes = PlannedSizes(StepCosts(FLAT))
        expected_s = StepCosts(FLAT).draft_seconds(2)
        sizes.learn_draft(2, 0.25)
        assert sizes.foresight == Foresight(0.0, expected_s, 0, 0.25)

    def test_fixed_sizes_foretell_nothing(self) -> None:
        assert FixedSizes(4).foresight is None


class TestLearning:
    def test_drafts_that_fail_lower_what_is_believed_of_all_and_of_the_request(self) -> None:
        made = make(drafter=CountingDrafter())
        rooted = sequence(made)
        propose(made, rooted)
        before = rooted.proposal
        assert before is not None
        for _ in range(30):
            made.trees.learn(rooted, before, path=(0,))
        other = sequence(made)
        propose(made, rooted, other)
        assert rooted.proposal is not None
        assert other.proposal is not None
        own, theirs = rooted.proposal.estimates[0], other.proposal.estimates[0]
        assert own.value < theirs.value < before.estimates[0].value
        sources = {source_of(estimate.cell) for estimate in before.estimates[:1]}
        assert all(rooted.calibration.factor(source) < 1.0 for source in sources)
