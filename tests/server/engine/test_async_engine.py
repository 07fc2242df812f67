"""The engine on its own thread: streams, cancellation, admission, draining and failure."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import generate_latest
from torch import Tensor

from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.request import Request, RequestOutput
from server.engine.sequence import Sequence
from server.errors import EngineStoppedError, InvalidRequestError, QueueFullError
from tests.engine_tools import (
    NUM_HEADS,
    NUM_RANKS,
    SlowModel,
    assert_same_tokens,
    make_engine,
    make_request,
    random_prompt,
)

ORACLE = SlowModel()
PROMPT = random_prompt(1, 6)
DEADLINE_S = 30.0


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; a hang fails it."""
    asyncio.run(asyncio.wait_for(test, 2 * DEADLINE_S))


@asynccontextmanager
async def running(engine: Engine | None = None, max_queue: int = 64) -> AsyncIterator[AsyncEngine]:
    async_engine = AsyncEngine(engine or slow_engine(), max_queue)
    await async_engine.start()
    try:
        yield async_engine
    finally:
        await async_engine.stop()


def without_drafts(sequence: Sequence, hidden_D: Tensor) -> list[list[int]]:
    return [[-1] * NUM_RANKS] * NUM_HEADS


def slow_engine(**options: Any) -> Engine:
    """An engine that takes at least 10 ms for each token of each sequence."""

    def wait(sequence: Sequence, hidden_D: Tensor) -> list[list[int]]:
        time.sleep(0.01)
        return without_drafts(sequence, hidden_D)

    return make_engine(script=wait, num_blocks=256, **options)


def endless(seed: int = 0) -> Request:
    """On a slow engine, a request that outlives every test."""
    return make_request(random_prompt(seed, 6), max_tokens=500, ignore_eos=True, seed=seed)


async def collect(async_engine: AsyncEngine, request: Request) -> list[RequestOutput]:
    return [output async for output in async_engine.generate(request)]


async def first_output(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return await anext(stream)


async def drain(stream: AsyncIterator[RequestOutput]) -> None:
    async for _ in stream:
        pass


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.005)


def is_empty(async_engine: AsyncEngine) -> Callable[[], bool]:
    """Whether the engine holds no request and no block."""

    def check() -> bool:
        totals = async_engine.engine.totals()
        names = ("num_running", "num_waiting", "num_blocks_in_use")
        return not any(totals[name] for name in names)

    return check


def samples(async_engine: AsyncEngine) -> dict[str, float]:
    lines = generate_latest(async_engine.metrics.registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


class TestStreams:
    def test_many_concurrent_streams_each_get_their_own_text(self) -> None:
        async def test() -> None:
            requests = [
                make_request(random_prompt(i, 3 + i % 5), max_tokens=6 + i % 7) for i in range(16)
            ]
            async with running(make_engine()) as async_engine:
                streams = [collect(async_engine, request) for request in requests]
                results = await asyncio.gather(*streams)
                assert async_engine.num_in_flight == 0
                await until(is_empty(async_engine))
            for request, outputs in zip(requests, results, strict=True):
                expected = ORACLE.complete(request)
                tokens = tuple(token for output in outputs for token in output.token_ids)
                if assert_same_tokens(tokens, expected):
                    assert "".join(output.text for output in outputs) == expected.text
                    assert outputs[-1].finish_reason == expected.finish_reason

        run(test())

    def test_outputs_arrive_while_the_request_still_runs(self) -> None:
        async def test() -> None:
            async with (
                running() as async_engine,
                aclosing(async_engine.generate(endless())) as stream,
            ):
                assert (await first_output(stream)).finish_reason is None
                assert async_engine.num_in_flight == 1

        run(test())

    def test_the_engine_runs_outside_the_event_loops_thread(self) -> None:
        names: set[str] = set()

        def note_thread(sequence: Sequence, hidden_D: Tensor) -> list[list[int]]:
            names.add(threading.current_thread().name)
            return without_drafts(sequence, hidden_D)

        async def test() -> None:
            async with running(make_engine(script=note_thread)) as async_engine:
                await collect(async_engine, make_request(PROMPT, max_tokens=4, ignore_eos=True))

        run(test())
        assert names == {"euryale-engine"}

    def test_an_idle_engine_wakes_up_for_the_next_request(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                for _ in range(3):
                    request = make_request(PROMPT, max_tokens=3)
                    assert (await collect(async_engine, request))[-1].finish_reason is not None
                    await asyncio.sleep(0.05)

        run(test())


class TestCancellation:
    def test_closing_a_stream_aborts_the_request_and_frees_its_blocks(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                stream = async_engine.generate(endless())
                await first_output(stream)
                await stream.aclose()
                assert async_engine.num_in_flight == 0
                await until(is_empty(async_engine))
                assert samples(async_engine)['euryale_requests_total{finish_reason="abort"}'] == 1

        run(test())

    def test_cancelling_the_reading_task_does_too(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                task = asyncio.create_task(collect(async_engine, endless()))
                await until(lambda: async_engine.engine.num_running == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(is_empty(async_engine))

        run(test())

    def test_a_waiting_request_can_be_cancelled(self) -> None:
        async def test() -> None:
            engine = slow_engine(max_num_seqs=1)
            async with (
                running(engine) as async_engine,
                aclosing(async_engine.generate(endless(1))) as first,
            ):
                await first_output(first)
                task = asyncio.create_task(collect(async_engine, endless(2)))
                await until(lambda: engine.num_waiting == 1)
                task.cancel()
                await until(lambda: engine.num_waiting == 0)
                assert engine.num_running == 1

        run(test())

    def test_the_other_streams_go_on(self) -> None:
        async def test() -> None:
            kept = make_request(random_prompt(5, 8), max_tokens=30)
            async with running() as async_engine:
                doomed = async_engine.generate(endless())
                await first_output(doomed)
                task = asyncio.create_task(collect(async_engine, kept))
                await first_output(doomed)
                await doomed.aclose()
                outputs = await task
            tokens = tuple(token for output in outputs for token in output.token_ids)
            assert_same_tokens(tokens, ORACLE.complete(kept))

        run(test())

    def test_an_id_is_free_again_as_soon_as_its_stream_is_closed(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                request = endless()
                for _ in range(5):
                    stream = async_engine.generate(request)
                    await first_output(stream)
                    await stream.aclose()
                await until(is_empty(async_engine))

        run(test())


class TestAdmission:
    def test_beyond_its_capacity_the_queue_is_full_until_a_request_ends(self) -> None:
        async def test() -> None:
            engine = slow_engine(max_num_seqs=1)
            async with running(engine, max_queue=1) as async_engine:
                first, second = (async_engine.generate(endless(i)) for i in range(2))
                await first_output(first)
                waiting = asyncio.ensure_future(first_output(second))
                await until(lambda: async_engine.num_in_flight == 2)
                with pytest.raises(QueueFullError, match="2 requests are in flight") as caught:
                    await collect(async_engine, endless(3))
                assert 1.0 <= caught.value.retry_after_s <= 60.0
                await first.aclose()
                async_engine.check_admission()
                await waiting
                await second.aclose()

        run(test())

    def test_several_requests_of_one_call_are_admitted_together_or_not_at_all(self) -> None:
        async def test() -> None:
            async with running(slow_engine(max_num_seqs=4), max_queue=2) as async_engine:
                async_engine.check_admission(6)
                with pytest.raises(InvalidRequestError, match="at most 6") as caught:
                    async_engine.check_admission(7)
                assert caught.value.param == "n"
                async with aclosing(async_engine.generate(endless())) as stream:
                    await first_output(stream)
                    async_engine.check_admission(5)
                    with pytest.raises(QueueFullError):
                        async_engine.check_admission(6)

        run(test())

    def test_a_request_that_can_never_run_is_refused_before_the_first_output(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                with pytest.raises(InvalidRequestError, match="no tokens"):
                    await collect(async_engine, make_request(()))
                assert async_engine.num_in_flight == 0
                assert async_engine.is_ready
                assert 'euryale_requests_total{finish_reason="abort"}' not in samples(async_engine)
                assert await collect(async_engine, make_request(PROMPT, max_tokens=2))

        run(test())

    def test_an_id_in_flight_is_not_taken_twice(self) -> None:
        async def test() -> None:
            request = endless()
            async with (
                running() as async_engine,
                aclosing(async_engine.generate(request)) as stream,
            ):
                await first_output(stream)
                with pytest.raises(ValueError, match="already in flight"):
                    await collect(async_engine, request)
                assert async_engine.num_in_flight == 1

        run(test())


class TestStop:
    def test_nothing_is_admitted_before_the_start_and_after_the_end(self) -> None:
        async def test() -> None:
            async_engine = AsyncEngine(make_engine())
            assert not async_engine.is_alive
            with pytest.raises(EngineStoppedError):
                async_engine.check_admission()
            await async_engine.start()
            assert async_engine.is_ready
            await async_engine.stop()
            assert not async_engine.is_alive
            with pytest.raises(EngineStoppedError, match="shutting down"):
                await collect(async_engine, make_request(PROMPT, max_tokens=2))

        run(test())

    def test_draining_lets_running_requests_end_and_refuses_new_ones(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                request = make_request(PROMPT, max_tokens=60, ignore_eos=True)
                task = asyncio.create_task(collect(async_engine, request))
                await until(lambda: async_engine.engine.num_running == 1)
                stop = asyncio.create_task(async_engine.stop(drain_s=DEADLINE_S))
                await until(lambda: not async_engine.is_ready)
                assert async_engine.is_alive
                with pytest.raises(EngineStoppedError):
                    await collect(async_engine, endless())
                outputs = await task
                await stop
                assert outputs[-1].finish_reason == "length"
                assert outputs[-1].num_output_tokens == 60
                assert not async_engine.is_alive

        run(test())

    def test_what_has_not_ended_in_time_gets_an_error(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                stream = async_engine.generate(endless())
                await first_output(stream)
                await async_engine.stop(drain_s=0.0)
                with pytest.raises(EngineStoppedError, match="stopping"):
                    await drain(stream)
                assert async_engine.num_in_flight == 0

        run(test())

    def test_a_second_stop_ends_the_draining_at_once(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                stream = async_engine.generate(endless())
                await first_output(stream)
                draining = asyncio.create_task(async_engine.stop(drain_s=1000.0))
                await until(lambda: not async_engine.is_ready)
                assert not draining.done()
                await async_engine.stop(drain_s=1000.0)
                with pytest.raises(EngineStoppedError):
                    await drain(stream)
                await draining

        run(test())

    def test_an_engine_that_never_started_can_be_stopped(self) -> None:
        run(AsyncEngine(make_engine()).stop())


class TestFailure:
    def test_reaches_every_stream_and_the_engine_takes_nothing_more(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls: list[int] = []

        def fail_later(sequence: Sequence, hidden_D: Tensor) -> list[list[int]]:
            calls.append(1)
            if len(calls) > 20:
                raise RuntimeError("a planted failure")
            return without_drafts(sequence, hidden_D)

        async def test() -> None:
            async with running(make_engine(script=fail_later, num_blocks=512)) as async_engine:
                streams = [collect(async_engine, endless(i)) for i in range(6)]
                results = await asyncio.gather(*streams, return_exceptions=True)
                assert [type(result) for result in results] == [EngineStoppedError] * 6
                assert not async_engine.is_alive
                assert not async_engine.is_ready
                with pytest.raises(EngineStoppedError, match="the engine failed"):
                    async_engine.check_admission()

        with caplog.at_level(logging.ERROR, logger="euryale.engine"):
            run(test())
        assert "a planted failure" in caplog.text, "the log has the cause"


class TestMetrics:
    def test_add_up_over_requests(self) -> None:
        async def test() -> None:
            requests = [
                make_request(random_prompt(i, 6), max_tokens=5, ignore_eos=True) for i in range(3)
            ]
            async with running() as async_engine:
                await asyncio.gather(*(collect(async_engine, request) for request in requests))
                read = samples(async_engine)
            assert read['euryale_requests_total{finish_reason="length"}'] == 3
            assert read["euryale_generated_tokens_total"] == 15
            assert read["euryale_prompt_tokens_total"] == 18
            assert read["euryale_time_to_first_token_seconds_count"] == 3
            assert read["euryale_request_seconds_count"] == 3
            assert read["euryale_step_seconds_count"] == read["euryale_steps_total"]
            assert read["euryale_running_requests"] == 0
            assert read["euryale_kv_blocks"] == 256

        run(test())
