"""The planner against trying every plan, and the gate before the heads."""

from itertools import accumulate, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.speculation.cost_model import CostModel, StepCosts, StepLoad
from server.speculation.planner import HeadGate, Pace, Plan, StepRequest, Worth, plan_trees

# Cheap up to 4 tokens, then every token has its price.
COSTS = CostModel((1, 4, 8, 16), (10.0, 11.0, 20.0, 60.0), draft_s=1.0)
FLAT = CostModel((1, 2), (1.0, 1.0), draft_s=0.0)
ROOM = StepRequest(num_prompt_tokens=0, max_draft_tokens=100)
LINEAR = CostModel((1, 2), (1.0, 2.0), draft_s=0.0)

_values = st.lists(st.floats(0.0, 1.0), max_size=3).map(lambda own: sorted(own, reverse=True))


def load(num_sequences: int) -> StepLoad:
    return StepLoad(num_sequences)


def sizes(
    values: list[list[float]],
    costs: CostModel,
    num_prompt_tokens: int = 0,
    max_draft_tokens: int = 100,
    draft_s: float = 0.0,
    pace: float | None = None,
) -> tuple[int, ...]:
    request = StepRequest(num_prompt_tokens, max_draft_tokens)
    steps = StepCosts(costs)
    worth = Worth(pace)
    return plan_trees(values, steps, load(len(values)), request, draft_s, worth).sizes


class TestPlanTrees:
    @settings(max_examples=60)
    @given(
        values=st.lists(_values, min_size=1, max_size=4),
        draft_s=st.floats(0.0, 10.0),
        pace=st.sampled_from((None, 0.01, 0.1, 0.5)),
    )
    def test_no_other_plan_brings_more_over_what_its_seconds_are_worth(
        self, values: list[list[float]], draft_s: float, pace: float | None
    ) -> None:
        costs = StepCosts(COSTS)
        num_roots = len(values)

        def tokens_and_seconds(plan: tuple[int, ...]) -> tuple[float, float]:
            gain = sum(sum(own[: size - 1]) for own, size in zip(values, plan, strict=True))
            return num_roots + gain, costs.seconds(sum(plan), load(num_roots)) + draft_s

        every = [
            tokens_and_seconds(plan)
            for plan in product(*(range(1, len(own) + 2) for own in values))
        ]
        if pace is None:
            tokens, seconds = max(every, key=lambda one: one[0] / one[1])
            price = tokens / seconds
        else:
            price = pace
        found = plan_trees(values, costs, load(num_roots), ROOM, draft_s, Worth(pace))

        assert (found.num_tokens, found.seconds) == pytest.approx(tokens_and_seconds(found.sizes))
        surplus = found.num_tokens - price * found.seconds
        best = max(tokens - price * seconds for tokens, seconds in every)
        assert surplus == pytest.approx(best, abs=1e-6)

    def test_poor_drafts_get_fewer_nodes_where_others_bring_more(self) -> None:
        poor, good = [0.2, 0.1], [0.9, 0.8, 0.7, 0.6]
        pace = 0.2
        assert sizes([poor], COSTS, pace=pace)[0] <= sizes([poor], COSTS)[0]
        assert sizes([good], COSTS, pace=pace)[0] >= sizes([good], COSTS)[0]

    def test_by_the_pace_steps_of_all_kinds_make_more_tokens_together(self) -> None:
        drafts = [[[0.3, 0.2, 0.1, 0.05]], [[0.95, 0.9, 0.85, 0.8, 0.7, 0.6]]] * 200
        totals = []
        for keeps_pace in (False, True):
            pace, tokens, seconds = Pace(), 0.0, 0.0
            for values in drafts:
                worth = Worth(pace.speed if keeps_pace else None)
                plan = plan_trees(values, StepCosts(COSTS), load(1), ROOM, 0.0, worth)
                pace.note(plan)
                tokens += plan.num_tokens
                seconds += plan.seconds
            totals.append(tokens / seconds)
        assert totals[1] > totals[0]

    def test_nodes_of_all_sequences_compete(self) -> None:
        values = [[0.9, 0.8], [0.1, 0.1], [0.7, 0.05]]
        assert sizes(values, FLAT, max_draft_tokens=3) == (3, 1, 2)

    def test_load_shrinks_the_trees_to_their_roots(self) -> None:
        own = [0.6, 0.4, 0.3, 0.2]
        mean = [sum(sizes([own] * load, COSTS)) / load for load in (1, 2, 4, 16)]
        assert mean == sorted(mean, reverse=True)
        assert mean[0] > 1.0
        assert mean[-1] == 1.0

    def test_where_every_token_has_its_price_nothing_is_drafted(self) -> None:
        assert sizes([[0.9, 0.8]], LINEAR) == (1,)

    def test_where_tokens_are_free_everything_is_verified(self) -> None:
        assert sizes([[0.2, 0.01], [0.3]], FLAT) == (3, 2)

    def test_the_price_of_a_node_is_what_its_seconds_would_bring(self) -> None:
        plan = plan_trees([[0.9, 0.05]], StepCosts(LINEAR), load(1), ROOM, 0.0, Worth(None))
        assert plan.node_price == pytest.approx(plan.num_tokens / plan.seconds)
        free = plan_trees([[0.9]], StepCosts(FLAT), load(1), ROOM, 0.0, Worth())
        assert free.node_price == 0.0

    @pytest.mark.parametrize("most", [0, 1, 3])
    def test_room_is_never_exceeded(self, most: int) -> None:
        assert sum(sizes([[0.9] * 4, [0.8] * 4], FLAT, max_draft_tokens=most)) == 2 + most

    def test_prompt_tokens_make_drafts_dearer_where_steps_are(self) -> None:
        # Beside four prompt tokens a draft token costs more than it does alone.
        assert sizes([[0.5, 0.4]], COSTS) == (3,)
        assert sizes([[0.5, 0.4]], COSTS, num_prompt_tokens=8) == (1,)

    def test_prompt_tokens_leave_drafts_that_still_pay(self) -> None:
        assert sizes([[0.5, 0.4]], FLAT, num_prompt_tokens=8) == (3,)

    def test_beside_endless_prompts_a_node_must_be_worth_half_a_token(self) -> None:
        own = [0.9, 0.7, 0.55, 0.45, 0.3]
        request = StepRequest(num_prompt_tokens=8, max_draft_tokens=100)
        taken = [
            plan_trees([own], StepCosts(LINEAR), load(1), request, 0.0, Worth(0.01, share))
            for share in (0.0, 0.5, 1.0)
        ]
        assert [plan.sizes for plan in taken] == [(6,), (6,), (4,)]
        # And never less than without prompts.
        worth = Worth(5.0, 1.0)
        assert plan_trees([own], StepCosts(LINEAR), load(1), request, 0.0, worth).sizes == (1,)
        free = plan_trees([own], StepCosts(FLAT), load(1), request, 0.0, Worth(0.01, 1.0))
        assert free.sizes == (6,)

    @pytest.mark.parametrize("num_prompt_tokens", [0, 4])
    def test_the_gain_is_what_drafts_bring_beyond_their_seconds(
        self, num_prompt_tokens: int
    ) -> None:
        request = StepRequest(num_prompt_tokens, 100)
        costs, pace, draft_s = StepCosts(LINEAR), 0.3, 0.5
        plan = plan_trees([[0.9, 0.8, 0.1]], costs, load(1), request, draft_s, Worth(pace))
        num_drafts = plan.sizes[0] - 1
        first = 1 + num_prompt_tokens
        seconds = costs.seconds(first + num_drafts, load(1)) - costs.seconds(first, load(1))
        tokens = sum([0.9, 0.8, 0.1][:num_drafts])
        assert plan.gain == pytest.approx(tokens - pace * (seconds + draft_s))
        # Nothing drafted, nothing gained.
        idle = plan_trees([[]], costs, load(1), request, 0.0, Worth(pace))
        assert idle.gain == 0.0

    def test_a_dear_draft_asks_for_larger_trees_or_none(self) -> None:
        own = list(accumulate([0.5] * 8, lambda value, rate: value * rate))
        assert sizes([own], COSTS, draft_s=30.0)[0] >= sizes([own], COSTS)[0]


class TestPace:
    def test_is_unknown_before_the_first_step(self) -> None:
        assert Pace().speed is None

    def test_follows_what_steps_make_in_all_and_not_their_mean_speed(self) -> None:
        pace = Pace()
        for _ in range(500):
            pace.note(Plan((1,), 1.0, 1.0, 0.0, 0.0))
            pace.note(Plan((1,), 6.0, 2.0, 0.0, 0.0))
        assert pace.speed == pytest.approx(7.0 / 3.0, rel=0.02)
        for _ in range(500):
            pace.note(Plan((1,), 5.0, 1.0, 0.0, 0.0))
        assert pace.speed == pytest.approx(5.0, rel=0.01)


class TestHeadGate:
    @staticmethod
    def run(gate: HeadGate, gain_with: float, gain_without: float, num_steps: int) -> list[bool]:
        taken = []
        for _ in range(num_steps):
            is_open = gate.is_open()
            gate.note(is_open, gain_with if is_open else gain_without)
            taken.append(is_open)
        return taken

    def test_is_open_at_first(self) -> None:
        assert HeadGate().is_open()

    def test_stays_open_while_the_heads_pay_but_for_rare_probes(self) -> None:
        taken = self.run(HeadGate(), 2.0, 1.0, 1000)
        assert 1 <= taken.count(False) <= 10

    def test_shuts_where_they_do_not_but_for_rare_probes(self) -> None:
        taken = self.run(HeadGate(), 1.0, 1.1, 1000)
        assert taken[100:].count(True) <= 8
        assert any(taken[100:])

    def test_follows_a_change_of_the_traffic(self) -> None:
        gate = HeadGate()
        self.run(gate, 1.0, 1.1, 500)
        taken = self.run(gate, 3.0, 1.1, 1000)
        assert taken[-100:].count(True) >= 95
