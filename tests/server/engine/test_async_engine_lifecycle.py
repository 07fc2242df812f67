"""The engine on its own thread: stopping, failing, and what the metrics say afterwards."""

import asyncio
import logging

import pytest
from torch import Tensor

from server.core.completion import join_outputs
from server.engine.async_engine import AsyncEngine
from server.errors import EngineStoppedError
from tests.support.async_tools import (
    DEADLINE_S,
    collect,
    drain,
    endless,
    first_output,
    run,
    running,
    samples,
    until,
    without_drafts,
)
from tests.support.engine_tools import (
    make_engine,
    make_request,
    random_prompt,
)

PROMPT = random_prompt(1, 6)


class TestStop:
    def test_nothing_is_admitted_before_the_start_and_after_the_end(self) -> None:
        async def test() -> None:
            async_engine = AsyncEngine(make_engine())
            assert not async_engine.is_alive
            with pytest.raises(EngineStoppedError):
                await collect(async_engine, make_request(PROMPT, max_tokens=2))
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
                assert join_outputs(outputs).stats.num_output_tokens == 60
                assert not async_engine.is_alive

        run(test())

    def test_what_has_not_ended_in_time_gets_an_error(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                stream = async_engine.generate([endless()])
                await first_output(stream)
                await async_engine.stop(drain_s=0.0)
                with pytest.raises(EngineStoppedError, match="stopping"):
                    await drain(stream)
                assert async_engine.num_in_flight == 0

        run(test())

    def test_a_second_stop_ends_the_draining_at_once(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                stream = async_engine.generate([endless()])
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

        def fail_later(request_id: str, text: tuple[int, ...], hidden_D: Tensor) -> list[list[int]]:
            calls.append(1)
            if len(calls) > 20:
                raise RuntimeError("a planted failure")
            return without_drafts(request_id, text, hidden_D)

        async def test() -> None:
            async with running(make_engine(script=fail_later, num_blocks=512)) as async_engine:
                streams = [collect(async_engine, endless(i)) for i in range(6)]
                results = await asyncio.gather(*streams, return_exceptions=True)
                assert [type(result) for result in results] == [EngineStoppedError] * 6
                assert not async_engine.is_alive
                assert not async_engine.is_ready
                with pytest.raises(EngineStoppedError, match="the engine failed"):
                    await collect(async_engine, endless())

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
