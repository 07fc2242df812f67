"""The step cost: interpolation, what steps teach, and the measurement's protocol."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.speculation.cost_model import (
    STEP_SIZES,
    CostModel,
    Probes,
    StepCosts,
    StepLoad,
    measure,
)
from tests.support.log_lines import LogLines

# Two tokens cost what one costs, then every further token has its price: a memory-bound CPU.
COSTS = CostModel((1, 2, 4, 8), (10.0, 10.0, 14.0, 22.0), draft_s=1.0)
ONE = StepLoad(1)


class TestSeconds:
    @pytest.mark.parametrize(("num_tokens", "step_s"), [(1, 10.0), (2, 10.0), (4, 14.0), (8, 22.0)])
    def test_measured_sizes_are_returned_as_measured(self, num_tokens: int, step_s: float) -> None:
        assert StepCosts(COSTS).seconds(num_tokens, ONE) == step_s

    def test_sizes_in_between_are_interpolated(self) -> None:
        assert StepCosts(COSTS).seconds(3, ONE) == 12.0
        assert StepCosts(COSTS).seconds(6, ONE) == 18.0

    def test_larger_sizes_grow_with_the_last_slope(self) -> None:
        assert StepCosts(COSTS).seconds(12, ONE) == 30.0

    @given(a=st.integers(1, 200), b=st.integers(1, 200))
    def test_more_tokens_never_cost_less(self, a: int, b: int) -> None:
        costs = StepCosts(COSTS)
        assert costs.seconds(min(a, b), ONE) <= costs.seconds(max(a, b), ONE)

    def test_all_sizes_at_once_are_each_one_alone(self) -> None:
        costs = StepCosts(COSTS)
        expected = [costs.seconds(size, ONE) for size in range(3, 14)]
        assert costs.all_seconds(3, 13, ONE).tolist() == expected

    def test_further_sequences_and_kv_have_their_price(self) -> None:
        costs = StepCosts(replace(COSTS, context_len=100, sequence_s=0.5, kv_token_s=0.01))
        assert costs.seconds(4, StepLoad(3, 300)) == pytest.approx(15.0)
        assert costs.seconds(4, StepLoad(1, 500)) == pytest.approx(18.0)
        assert costs.seconds(4, StepLoad(1, 0)) == 14.0

    def test_drafting_for_further_sequences_has_its_price(self) -> None:
        costs = StepCosts(replace(COSTS, draft_sequence_s=0.2))
        assert costs.draft_seconds(1) == 1.0
        assert costs.draft_seconds(6) == pytest.approx(2.0)


class TestLearning:
    def test_steps_that_take_longer_are_foretold_longer(self) -> None:
        costs = StepCosts(COSTS)
        for _ in range(300):
            costs.learn(4, ONE, 21.0)
        assert costs.seconds(4, ONE) == pytest.approx(21.0, rel=0.02)
        assert costs.seconds(1, ONE) == 10.0
        assert costs.seconds(8, ONE) == 22.0

    def test_a_size_in_between_moves_both_neighbours(self) -> None:
        costs = StepCosts(COSTS)
        for _ in range(300):
            costs.learn(6, ONE, 27.0)
        assert costs.seconds(6, ONE) == pytest.approx(27.0, rel=0.02)
        assert costs.seconds(8, ONE) > 22.0

    def test_a_larger_step_never_becomes_cheaper(self) -> None:
        costs = StepCosts(COSTS)
        for _ in range(300):
            costs.learn(8, ONE, 8.0)
        assert costs.seconds(8, ONE) >= costs.seconds(4, ONE)

    @pytest.mark.parametrize("step_s", [0.0, -1.0, 500.0])
    def test_a_disturbed_step_teaches_nothing(self, step_s: float) -> None:
        costs = StepCosts(COSTS)
        costs.learn(4, ONE, step_s)
        assert costs.seconds(4, ONE) == 14.0

    def test_a_step_moves_little(self) -> None:
        costs = StepCosts(COSTS)
        costs.learn(4, ONE, 28.0)
        assert costs.seconds(4, ONE) == pytest.approx(14.0 * 1.05)

    def test_what_many_sequences_cost_does_not_mislead_a_single_one(self) -> None:
        costs = StepCosts(COSTS)
        many = StepLoad(8)
        for _ in range(300):
            for num_tokens in (8, 12, 16):
                costs.learn(num_tokens, many, 1.5 * StepCosts(COSTS).seconds(num_tokens, many))
        assert costs.seconds(12, many) == pytest.approx(45.0, rel=0.02)
        assert costs.seconds(8, ONE) == pytest.approx(22.0, rel=0.15)
        assert costs.seconds(4, ONE) == pytest.approx(14.0, rel=0.02)

    def test_loads_of_one_class_learn_together_and_others_apart(self) -> None:
        costs = StepCosts(COSTS)
        for _ in range(300):
            costs.learn(8, StepLoad(3), 33.0)
        assert costs.seconds(8, StepLoad(4)) == costs.seconds(8, StepLoad(3))
        assert costs.seconds(8, StepLoad(4)) == pytest.approx(33.0, rel=0.02)
        assert costs.seconds(8, StepLoad(5)) < 26.0
        assert costs.seconds(8, StepLoad(2)) < 26.0

    def test_drafting_is_learned_too(self) -> None:
        costs = StepCosts(COSTS)
        for _ in range(300):
            costs.learn_draft(1, 1.5)
        assert costs.draft_seconds(1) == pytest.approx(1.5, rel=0.02)


def probes(step: Callable[[int], object], max_tokens: int, **others: Any) -> Probes:
    given: dict[str, Any] = {
        "long_step": lambda: None,
        "many_step": lambda: None,
        "draft": None,
        "context_len": 0,
        "num_further_tokens": 0,
        "num_sequences": 1,
    }
    return Probes(step=step, max_tokens=max_tokens, **(given | others))


class TestMeasure:
    def test_times_every_size_up_to_the_limit_several_times(self, log: LogLines) -> None:
        asked: list[int] = []
        drafts: list[int] = []
        costs = measure(probes(asked.append, 24, draft=drafts.append, num_sequences=4))
        lines = log.take()
        assert costs.num_tokens == tuple(size for size in STEP_SIZES if size <= 24)
        assert all(asked.count(size) >= 3 for size in costs.num_tokens)
        assert max(asked) == 24
        assert drafts.count(1) >= 3
        assert drafts.count(4) >= 3
        assert len(lines) == 3
        assert "1 to 24 tokens" in lines[0]

    def test_seconds_never_fall_with_the_size(self) -> None:
        costs = measure(probes(lambda size: sum(range((200 - size) * 500)), 128))
        assert list(costs.step_s) == sorted(costs.step_s)
        assert costs.draft_s == 0.0

    def test_a_single_size_still_gives_a_slope(self) -> None:
        asked: list[int] = []
        costs = StepCosts(measure(probes(asked.append, 1)))
        assert set(asked) == {1}, "a cache of one slot has no room for more"
        assert costs.seconds(2, ONE) == 2 * costs.seconds(1, ONE)

    def test_kv_and_sequences_are_priced_by_the_difference(self) -> None:
        def work(num: int) -> None:
            time.sleep(num * 0.002)

        costs = measure(
            probes(
                lambda size: work(1),
                2,
                long_step=lambda: work(5),
                many_step=lambda: work(9),
                num_further_tokens=40,
                num_sequences=5,
            )
        )
        assert costs.kv_token_s > 0.0
        assert costs.sequence_s > 0.0
