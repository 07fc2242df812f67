"""The planner against trying every plan, and the gate before the heads."""

from itertools import accumulate, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.cost_model import CostModel, StepCosts, StepLoad
from server.engine.planner import HeadGate, StepRequest, plan_trees

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
    latency_weight: float = 0.0,
) -> tuple[int, ...]:
    request = StepRequest(num_prompt_tokens, max_draft_tokens)
    steps = StepCosts(costs)
    return plan_trees(values, steps, load(len(values)), request, draft_s, latency_weight).sizes


class TestPlanTrees:
    @settings(max_examples=60)
    @given(
        values=st.lists(_values, min_size=1, max_size=4),
        draft_s=st.floats(0.0, 10.0),
        weight=st.sampled_from((0.0, 0.5, 2.0)),
    )
    def test_no_other_plan_makes_more_tokens_per_weighted_second(
        self, values: list[list[float]], draft_s: float, weight: float
    ) -> None:
        costs = StepCosts(COSTS)
        num_roots = len(values)

        def speed(plan: tuple[int, ...], weight: float) -> float:
            gain = sum(sum(own[: size - 1]) for own, size in zip(values, plan, strict=True))
            seconds = costs.seconds(sum(plan), load(num_roots)) + draft_s
            return (num_roots + gain) / float(seconds ** (1.0 + weight))

        found = plan_trees(values, costs, load(num_roots), ROOM, draft_s, weight)
        every = product(*(range(1, len(own) + 2) for own in values))
        assert speed(found.sizes, weight) == pytest.approx(max(speed(p, weight) for p in every))
        assert speed(found.sizes, 0.0) == pytest.approx(found.speed)

    def test_a_latency_weight_makes_steps_shorter(self) -> None:
        own = [0.5, 0.4, 0.3, 0.25, 0.2, 0.1]
        found = [
            sum(sizes([own], COSTS, latency_weight=weight)) for weight in (0.0, 0.5, 1.0, 10.0)
        ]
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]
        beside = [
            sum(sizes([own], COSTS, num_prompt_tokens=4, latency_weight=weight))
            for weight in (0.0, 1.0, 10.0)
        ]
        assert beside == sorted(beside, reverse=True)

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
        for weight in (0.0, 1.0):
            plan = plan_trees([[0.9, 0.05]], StepCosts(LINEAR), load(1), ROOM, 0.0, weight)
            assert plan.node_price == pytest.approx(plan.speed * (1.0 + weight))
        assert plan_trees([[0.9]], StepCosts(FLAT), load(1), ROOM, 0.0, 0.0).node_price == 0.0

    @pytest.mark.parametrize("most", [0, 1, 3])
    def test_room_is_never_exceeded(self, most: int) -> None:
        assert sum(sizes([[0.9] * 4, [0.8] * 4], FLAT, max_draft_tokens=most)) == 2 + most

    def test_prompt_tokens_make_drafts_dearer_where_steps_are(self) -> None:
        # Beside four prompt tokens a draft token costs more than it does alone.
        assert sizes([[0.5, 0.4]], COSTS) == (3,)
        assert sizes([[0.5, 0.4]], COSTS, num_prompt_tokens=8) == (1,)

    def test_prompt_tokens_leave_drafts_that_still_pay(self) -> None:
        assert sizes([[0.5, 0.4]], FLAT, num_prompt_tokens=8) == (3,)

    def test_a_dear_draft_asks_for_larger_trees_or_none(self) -> None:
        own = list(accumulate([0.5] * 8, lambda value, rate: value * rate))
        assert sizes([own], COSTS, draft_s=30.0)[0] >= sizes([own], COSTS)[0]


class TestHeadGate:
    @staticmethod
    def run(gate: HeadGate, speed_with: float, speed_without: float, num_steps: int) -> list[bool]:
        taken = []
        for _ in range(num_steps):
            is_open = gate.is_open()
            gate.note(is_open, speed_with if is_open else speed_without)
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
