import asyncio
from dataclasses import replace

import pytest

from bench.load.loops import Answer, Ask, Chunk
from bench.load.rounds import (
    Arm,
    Closed,
    Draws,
    LoadPlan,
    LoadRounds,
    Open,
    RoundPair,
    levels,
    num_requests,
    num_runs,
)
from server.config import SpeculationParams
from server.speculation.tree_sizes import Foresight
from tests.bench.traces import make_turn

ARMS: dict[Arm, SpeculationParams] = {
    "auto": SpeculationParams(),
    "off": SpeculationParams(method="none"),
}
SMALL = LoadPlan(concurrency=(1, 2), rounds=3, requests_per_round=4)


class NotedTarget:
    """Notes what it is asked and answers at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Ask]] = []
        self.seconds = 0.0

    async def answer(self, ask: Ask, speculation: SpeculationParams) -> Answer:
        self.asked.append((speculation.method, ask))
        await asyncio.sleep(self.seconds)
        chunks = (Chunk(1.0, 1), Chunk(2.0, 1))
        return Answer(0.0, 2.0, chunks, 2, 1, 0, 1)


def draws(num_turns: int = 10, seed: int = 0) -> Draws:
    turns = [make_turn((line,), line=line) for line in range(1, num_turns + 1)]
    return Draws(turns, 40, seed)


def run(target: NotedTarget, plan: LoadPlan) -> list[RoundPair]:
    pairs: list[RoundPair] = []
    done: list[int] = []
    rounds = LoadRounds(target, draws(), ARMS, plan, lambda: None)
    asyncio.run(rounds.run(pairs.append, lambda: done.append(1)))
    assert len(done) == num_runs(plan)
    return pairs


def test_draws_are_fixed_by_the_seed() -> None:
    assert draws(seed=3).draw(15) == draws(seed=3).draw(15)
    assert draws(seed=3).draw(15) != draws(seed=4).draw(15)


def test_no_prompt_comes_twice_before_all_came_once() -> None:
    drawn = draws(num_turns=10).draw(20)
    for part in (drawn[:10], drawn[10:]):
        assert len({ask.turn.conversation.line for ask in part}) == 10


def test_longest_outputs_are_spread() -> None:
    lengths = [ask.max_tokens for ask in draws().draw(400)]
    assert min(lengths) == 10
    assert max(lengths) == 40
    assert [ask.max_tokens for ask in Draws([make_turn((1,))], 1, 0).draw(3)] == [1, 1, 1]


def test_a_round_has_all_closed_loops_and_then_the_open_one() -> None:
    assert levels(SMALL) == (Closed(1), Closed(2))
    assert levels(replace(SMALL, rate=2.5)) == (Closed(1), Closed(2), Open(2.5))


def test_requests_of_a_round_grow_with_the_concurrency() -> None:
    default = LoadPlan()
    counts = [num_requests(Closed(concurrency), default) for concurrency in (1, 4, 64)]
    assert counts == [8, 8, 128]
    assert num_requests(Open(1.0), default) == 32
    assert num_requests(Closed(64), SMALL) == 4


def test_the_arms_take_turns_over_the_same_requests() -> None:
    target = NotedTarget()
    pairs = run(target, replace(SMALL, concurrency=(1,)))
    assert [pair.level for pair in pairs] == [Closed(1)] * 3
    parts = [target.asked[i : i + 4] for i in range(0, len(target.asked), 4)]
    assert len(parts) == 8
    first_arms = []
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        assert [ask for _, ask in first] == [ask for _, ask in second]
        assert {first[0][0], second[0][0]} == {"auto", "none"}
        assert len({method for method, _ in first}) == 1
        first_arms.append(first[0][0])
    assert first_arms == ["none", "auto", "none", "auto"]


def test_the_second_arm_gets_what_the_first_one_began_in_its_time() -> None:
    target = NotedTarget()
    target.seconds = 0.004
    plan = replace(
        SMALL, concurrency=(1,), rounds=1, requests_per_round=500, seconds_per_round=0.05
    )
    [pair] = run(target, plan)
    assert 1 <= pair.auto.figures.num_requests < 500
    assert pair.auto.figures.num_requests == pair.off.figures.num_requests


def test_the_open_loop_runs_in_every_round() -> None:
    pairs = run(NotedTarget(), replace(SMALL, rate=1000.0, rounds=2))
    assert [pair.level for pair in pairs] == 2 * [Closed(1), Closed(2), Open(1000.0)]
    assert all(pair.auto.foresight is None for pair in pairs)


def test_what_the_planner_predicted_is_counted_run_by_run() -> None:
    total = Foresight(100.0, 100.0, 100, 100.0)

    class Steps(NotedTarget):
        async def answer(self, ask: Ask, speculation: SpeculationParams) -> Answer:
            total.num_tokens += 2.0
            total.measured_tokens += 1
            total.seconds += 0.5
            total.measured_seconds += 0.25
            return await super().answer(ask, speculation)

    pairs: list[RoundPair] = []
    plan = replace(SMALL, rounds=2)
    rounds = LoadRounds(Steps(), draws(), ARMS, plan, lambda: replace(total))
    asyncio.run(rounds.run(pairs.append, lambda: None))
    assert len(pairs) == 4
    for pair in pairs:
        for arm in (pair.auto, pair.off):
            assert arm.foresight is not None
            assert arm.foresight.num_tokens == pytest.approx(8.0)
            assert arm.foresight.measured_tokens == 4
            assert arm.foresight.seconds == pytest.approx(2.0)
            assert arm.foresight.measured_seconds == pytest.approx(1.0)
