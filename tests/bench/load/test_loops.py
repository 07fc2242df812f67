import asyncio
import math
from time import perf_counter

import pytest

from bench.errors import BenchError
from bench.load.loops import Answer, Ask, Chunk, closed_loop, load_figures, open_loop
from tests.bench.traces import make_turn


def asks_of(count: int) -> list[Ask]:
    return [Ask(make_turn((1,), line=line), 5) for line in range(1, count + 1)]


def answer_of(arrived_s: float, *chunks: tuple[float, int], steps: int = 2) -> Answer:
    num_tokens = sum(count for _, count in chunks)
    return Answer(
        arrived_s=arrived_s,
        ended_s=chunks[-1][0] if chunks else arrived_s + 1.0,
        chunks=tuple(Chunk(at_s, count) for at_s, count in chunks),
        num_output_tokens=num_tokens,
        num_steps=steps,
        num_draft_tokens=3 * steps,
        num_emitted_tokens=num_tokens - 1,
    )


class Service:
    """Takes a little time for each request and notes who was there at once."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.begun_s: list[float] = []
        self.most_at_once = 0
        self._now = 0

    async def __call__(self, ask: Ask) -> Answer:
        self.begun.append(ask.turn.conversation.line)
        self.begun_s.append(perf_counter())
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        await asyncio.sleep(0.002)
        self._now -= 1
        return answer_of(0.0, (1.0, 1))


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_a_closed_loop_keeps_its_clients_busy(concurrency: int) -> None:
    service = Service()
    answers = asyncio.run(closed_loop(service, asks_of(7), concurrency))
    assert len(answers) == 7
    assert service.begun == [1, 2, 3, 4, 5, 6, 7]
    assert service.most_at_once == min(concurrency, 7)


def test_a_closed_loop_begins_nothing_after_its_time() -> None:
    service = Service()
    answers = asyncio.run(closed_loop(service, asks_of(500), 2, max_seconds=0.02))
    assert 2 <= len(answers) < 500
    assert service.begun == list(range(1, len(answers) + 1))


def test_an_open_loop_sends_at_random_times_that_the_seed_fixes() -> None:
    gaps = []
    for seed in (1, 1, 2):
        service = Service()
        answers = asyncio.run(open_loop(service, asks_of(5), rate=50.0, seed=seed))
        assert len(answers) == 5
        assert service.begun == [1, 2, 3, 4, 5]
        gaps.append(service.begun_s[-1] - service.begun_s[0])
    assert gaps[0] > 0.0


def test_an_open_loop_does_not_wait_for_answers() -> None:
    service = Service()
    asyncio.run(open_loop(service, asks_of(20), rate=1e6, seed=0))
    assert service.most_at_once == 20


def test_a_failure_ends_the_loop_with_its_reason() -> None:
    async def fail(ask: Ask) -> Answer:
        if ask.turn.conversation.line == 2:
            raise BenchError("the server is gone")
        await asyncio.sleep(60.0)
        raise AssertionError("it was not cancelled")

    with pytest.raises(BenchError, match="the server is gone"):
        asyncio.run(closed_loop(fail, asks_of(4), 4))


def test_a_chunk_of_several_tokens_counts_its_gap_for_each_of_them() -> None:
    figures = load_figures([answer_of(10.0, (10.5, 1), (10.9, 4), (11.0, 1))])
    # Times per token: four times 0.1 s and 0.1 s; gaps: 0.4 s and 0.1 s.
    assert figures.itl_ms.p50 == pytest.approx(100.0)
    assert figures.itl_ms.p99 == pytest.approx(100.0)
    assert figures.chunk_gap_ms.p50 == pytest.approx(250.0)
    assert figures.ttft_ms.p95 == pytest.approx(500.0)


def test_throughput_is_all_tokens_by_the_time_from_first_request_to_last_end() -> None:
    figures = load_figures([answer_of(1.0, (2.0, 1), (3.0, 2)), answer_of(2.0, (5.0, 5))])
    assert figures.num_requests == 2
    assert figures.num_output_tokens == 8
    assert figures.seconds == pytest.approx(4.0)
    assert figures.tokens_per_s == pytest.approx(2.0)


def test_acceptance_and_nodes_pool_the_verify_steps() -> None:
    figures = load_figures([answer_of(0.0, (1.0, 7)), answer_of(0.0, (1.0, 3), steps=6)])
    assert figures.mean_acceptance_length == pytest.approx(8 / 8)
    assert figures.nodes_per_step == pytest.approx(4.0)


def test_figures_without_samples_are_no_numbers() -> None:
    figures = load_figures([answer_of(0.0, (1.0, 1), steps=0)])
    assert math.isnan(figures.itl_ms.p95)
    assert math.isnan(figures.mean_acceptance_length)
    assert not math.isnan(figures.ttft_ms.p95)
