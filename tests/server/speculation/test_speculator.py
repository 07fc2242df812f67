"""The speculator: who drafts, when the heads run, how trees are made and sized."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heads.proposals import Proposal
from server.config import SamplingParams
from server.core.sequence import Sequence
from server.core.step import DraftAsk, Landed, Outcome, StepEntry, Verdict, root_only
from server.executor.executor import Drafting, DraftRun, Landing
from server.speculation.cost_model import CostModel, StepCosts, StepLoad
from server.speculation.planner import StepRequest
from server.speculation.source import DraftSource
from server.speculation.sources.lookup import LookupSource
from server.speculation.sources.medusa import MedusaDrafter, MedusaSource
from server.speculation.speculator import Speculator
from server.speculation.tree_sizes import (
    FixedSizes,
    Foresight,
    PlannedSizes,
    StepRecord,
    TreeSizes,
)
from tests.support.engine_tools import HEADS, make_sequence, random_heads, wide_profile

VOCAB = 16
# Every token of a step costs the same: trees only pay where a node is almost sure.
LINEAR = CostModel((1, 2), (1.0, 2.0), draft_s=0.1)
# A step costs the same whatever its size: the largest tree pays.
FLAT = CostModel((1, 2), (1.0, 1.0), draft_s=0.0)
REQUEST = StepRequest(num_prompt_tokens=0, max_draft_tokens=100)


class CountingDrafter(MedusaDrafter):
    """Counts how often it was asked, and for whom."""

    def __init__(self) -> None:
        super().__init__(random_heads(VOCAB), 8)
        self.asked: list[int] = []
        self.following: list[Sequence] = []

    def draft(
        self,
        rooted: Seq[Drafting],
        hidden_BD: Tensor,
        following: Seq[Drafting],
        min_value: float,
    ) -> list[Proposal | None]:
        self.asked.append(len(rooted))
        self.following += [one.sequence for one in following]
        return super().draft(rooted, hidden_BD, following, min_value)


class CountingSource(MedusaSource):
    """Medusa heads whose drafter counts."""

    def __init__(self) -> None:
        super().__init__(random_heads(VOCAB), wide_profile(), 8)
        self.counting = CountingDrafter()
        self.drafter = self.counting

    def prepare(self, sequence: Sequence) -> None:
        sequence.drafting[self.name] = None


def make(sizes: TreeSizes | None = None, *sources: DraftSource, lookup: bool = True) -> Speculator:
    all_sources = (*sources, LookupSource()) if lookup else sources
    return Speculator(all_sources, sizes or FixedSizes(8), 8)


def planned(costs: CostModel) -> PlannedSizes:
    return PlannedSizes(StepCosts(costs), HEADS)


def sequence(
    made: Speculator,
    method: str = "auto",
    prompt: tuple[int, ...] = (1, 2, 3, 1, 2),
    drafts_allowed: int = 8,
    max_tokens: int = 50,
) -> Sequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    found = make_sequence(prompt, (3,), sampling, vocab_size=VOCAB)
    found.sources, found.drafts_allowed = made.sources_of(method), drafts_allowed
    made.prepare(found)
    return found


def decoding(found: Sequence) -> StepEntry:
    return StepEntry(found, 1, root_only(found), is_verified=True, is_decoding=True)


def prefilling(found: Sequence) -> StepEntry:
    return StepEntry(found, 1, root_only(found), is_verified=False, is_decoding=False)


def run_asks(made: Speculator, asks: Seq[DraftAsk], entries: Seq[StepEntry]) -> list[Landed]:
    """What an executor brings whose steps accept no draft and draw the root again."""
    landed = [
        Landed(Verdict((0,), entry.sequence.token_ids[-1]) if entry.is_verified else None)
        for entry in entries
    ]
    for ask in asks:
        rooted = [Drafting(entries[i].sequence, (3,), 5) for i in ask.rooted]
        following = [Drafting(entries[i].sequence, (), 1) for i in ask.following]
        drafter, hidden_BD = made.drafters[ask.source], torch.ones(len(rooted), 8)
        found = drafter.draft(rooted, hidden_BD, following, ask.min_value)
        for index, proposal in zip(ask.rooted, found, strict=True):
            assert proposal is not None
            landed[index] = replace(landed[index], proposals=(proposal,))
    return landed


def propose(made: Speculator, *rooted: Sequence, prompts: Seq[Sequence] = ()) -> None:
    """One step after which all sequences stand where they stood."""
    entries = [*map(decoding, rooted), *map(prefilling, prompts)]
    landed = run_asks(made, made.asks(entries), entries)
    made.propose([Outcome(entry, one) for entry, one in zip(entries, landed, strict=True)])


class TestSources:
    @pytest.mark.parametrize(
        ("method", "sources"),
        [
            ("auto", ("medusa", "lookup")),
            ("medusa", ("medusa",)),
            ("lookup", ("lookup",)),
            ("none", ()),
        ],
    )
    def test_follow_the_method(self, method: str, sources: tuple[str, ...]) -> None:
        assert make(None, CountingSource()).sources_of(method) == sources

    def test_a_server_offers_what_it_has(self) -> None:
        assert make().methods == {"auto", "none", "lookup"}
        assert make(None, CountingSource(), lookup=False).methods == {"auto", "none", "medusa"}
        assert make(lookup=False).methods == {"auto", "none"}


class TestPropose:
    def test_heads_and_lookup_make_one_tree(self) -> None:
        made = make(None, CountingSource())
        rooted = sequence(made)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.tree.num_nodes == 8
        assert 1 in rooted.proposal.token_ids[1:], "what followed 1 2 3 before"

    def test_each_request_has_its_own_sources(self) -> None:
        source = CountingSource()
        made = make(None, source)
        both, copying = sequence(made), sequence(made, "lookup")
        propose(made, copying, both)
        assert source.counting.asked == [1]
        assert (copying.has_device_drafts, both.has_device_drafts) == (False, True)
        assert copying.proposal is not None
        assert copying.proposal.token_ids == (3, 1, 2, 3)

    def test_without_a_match_lookup_leaves_the_root(self) -> None:
        made = make()
        rooted = sequence(made, prompt=(1, 2))
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.token_ids == (3,)

    def test_the_heads_follow_prompts(self) -> None:
        source = CountingSource()
        made = make(None, source)
        copying, following = sequence(made, "lookup"), sequence(made)
        propose(made, prompts=[copying, following])
        assert source.counting.following == [following]

    def test_no_head_runs_for_a_sequence_that_ends_with_its_step(self) -> None:
        source = CountingSource()
        made = make(None, source)
        propose(made, sequence(made, max_tokens=2))
        assert source.counting.asked == []

    def test_a_tree_is_no_deeper_than_the_output_may_grow(self) -> None:
        made = make()
        rooted = sequence(made, max_tokens=3)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.tree.max_depth == 1

    def test_a_prediction_is_copied_from(self) -> None:
        made = make()
        rooted = sequence(made, prompt=(9,))
        rooted.request = replace(rooted.request, prediction_token_ids=(3, 4, 5, 6))
        rooted.token_ids.pop()
        made.prepare(rooted)
        rooted.token_ids.append(3)
        propose(made, rooted)
        assert rooted.proposal is not None
        assert rooted.proposal.token_ids == (3, 4, 5, 6)
        assert [estimate.prediction_place for estimate in rooted.proposal.estimates] == [1, 2, 3]


class TestFixedSizes:
    def test_are_what_the_configuration_says(self) -> None:
        made = make(FixedSizes(5))
        assert made.plan([sequence(made), sequence(made)], REQUEST) == [5, 5]
        assert FixedSizes(5).wants_heads(3)
        assert not FixedSizes(1).wants_heads(3)

    def test_shrink_to_the_room_and_to_what_a_request_allows(self) -> None:
        made = make(FixedSizes(5))
        members = [sequence(made, drafts_allowed=2), sequence(made)]
        assert made.plan(members, StepRequest(0, 5)) == [2, 3]


class TestPlannedSizes:
    def planned(self, costs: CostModel) -> Speculator:
        return make(planned(costs), CountingSource())

    def test_take_the_whole_tree_where_tokens_are_free(self) -> None:
        made = self.planned(FLAT)
        rooted = sequence(made)
        propose(made, rooted)
        assert made.plan([rooted], REQUEST) == [8]

    def test_never_exceed_what_a_request_allows(self) -> None:
        made = self.planned(FLAT)
        rooted = sequence(made, drafts_allowed=3)
        propose(made, rooted)
        assert made.plan([rooted], REQUEST) == [3]

    def test_a_sequence_without_drafts_keeps_its_root(self) -> None:
        made = self.planned(FLAT)
        plain, rooted = sequence(made, "none", drafts_allowed=1), sequence(made)
        propose(made, rooted)
        assert made.plan([plain, rooted], REQUEST) == [1, 8]

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
            return made.plan([rooted], REQUEST)

        # Seven nodes of 0.9 bring 7.3 tokens in 2 seconds, so a node's seventh of a second is
        # worth half a token.
        assert [sizes_for(0.9) for _ in range(50)][-1] == [8]
        for _ in range(num_plain_steps):
            made.plan([plain], REQUEST)
        assert sizes_for(0.4) == [1]
        assert sizes_for(0.6) == [8]

    def test_the_heads_rest_where_they_do_not_pay(self) -> None:
        source = CountingSource()
        made = make(planned(LINEAR), source)
        rooted = sequence(made)
        for _ in range(200):
            propose(made, rooted)
            made.plan([rooted], REQUEST)
        assert 1 <= len(source.counting.asked) < 40

    def test_what_does_not_pay_need_not_be_drafted(self) -> None:
        sizes = planned(LINEAR)
        made = make(sizes, CountingSource())
        assert sizes.least_value() == 0.0
        rooted = sequence(made)
        for _ in range(100):
            made.plan([rooted], REQUEST)
        assert sizes.least_value() == 0.1, "half of a price of one token, within bounds"
        propose(made, rooted)
        assert rooted.proposal is not None
        assert all(estimate.value > 0.1 for estimate in rooted.proposal.estimates)

    def test_predict_tokens_and_seconds(self) -> None:
        made = make(planned(FLAT))
        rooted = sequence(made, "none")
        made.plan([rooted], REQUEST)
        entry = decoding(rooted)
        made.learn([Outcome(entry, Landed(), (4,), (0,))], Landing((Landed(),), 1.1))
        assert made.stats().foresight == Foresight(1.0, 1.0, 1, 1.1)

    def test_predict_drafting_too(self) -> None:
        sizes = planned(FLAT)
        step_s, draft_s = StepCosts(FLAT).seconds(1, StepLoad(1)), StepCosts(FLAT).draft_seconds(2)
        sizes.learn(StepRecord(1, StepLoad(1), 0, 1.0, drafts=((2, 0.25),)))
        assert sizes.stats().foresight == Foresight(0.0, step_s + draft_s, 0, 1.25)

    def test_following_prompts_is_no_part_of_what_drafting_costs(self) -> None:
        made = make(planned(FLAT))
        runs = (DraftRun("medusa", 2, 1, 9.0), DraftRun("medusa", 0, 1, 9.0))
        made.learn([], Landing((), 1.0, runs))
        foresight = made.stats().foresight
        assert foresight is not None
        assert foresight.measured_seconds == 1.0

    def test_fixed_sizes_predict_nothing(self) -> None:
        assert make(FixedSizes(4)).stats().foresight is None


class TestLearning:
    def test_drafts_that_fail_lower_what_is_believed_of_all_and_of_the_request(self) -> None:
        made = make(None, CountingSource())
        rooted = sequence(made)
        propose(made, rooted)
        before = rooted.proposal
        assert before is not None
        for _ in range(30):
            entry = StepEntry(rooted, 1, before, is_verified=True, is_decoding=True)
            made.learn([Outcome(entry, Landed(Verdict((0,), 5)), (5,), (0,))], Landing((), 1.0))
        other = sequence(made)
        propose(made, rooted, other)
        assert rooted.proposal is not None
        assert other.proposal is not None
        own, theirs = rooted.proposal.estimates[0], other.proposal.estimates[0]
        assert own.value < theirs.value < before.estimates[0].value
        assert rooted.calibration.factor(before.estimates[0].source) < 1.0


class Forbidding:
    """A processor that denies one token everywhere."""

    restricts = True

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def apply(self, logits_V: Tensor, path: Seq[int]) -> Tensor:
        return logits_V

    def allows(self, path: Seq[int], token_id: int) -> bool:
        return token_id != self._token_id

    def commit(self, token_ids: Seq[int]) -> None:
        return


def test_what_a_logit_processor_forbids_never_enters_a_tree() -> None:
    made = make(None, CountingSource())
    free, bound = sequence(made), sequence(made)
    bound.processors = (Forbidding(1),)
    propose(made, free, bound)
    assert free.proposal is not None
    assert bound.proposal is not None
    assert 1 in free.proposal.token_ids
    assert 1 not in bound.proposal.token_ids
