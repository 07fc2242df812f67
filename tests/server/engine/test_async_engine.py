"""The engine on its own thread: streams, cancellation and admission."""

import asyncio
import threading
from contextlib import aclosing

import pytest
from torch import Tensor

from server.errors import InvalidRequestError, QueueFullError
from tests.support.async_tools import (
    collect,
    drain,
    endless,
    first_output,
    is_empty,
    run,
    running,
    samples,
    slow_engine,
    until,
    without_drafts,
)
from tests.support.engine_tools import (
    SlowModel,
    assert_same_tokens,
    make_engine,
    make_request,
    random_prompt,
)

ORACLE = SlowModel()
PROMPT = random_prompt(1, 6)


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
                aclosing(async_engine.generate([endless()])) as stream,
            ):
                assert (await first_output(stream)).finish_reason is None
                assert async_engine.num_in_flight == 1

        run(test())

    def test_the_engine_runs_outside_the_event_loops_thread(self) -> None:
        names: set[str] = set()

        def note_thread(
            request_id: str, text: tuple[int, ...], hidden_D: Tensor
        ) -> list[list[int]]:
            names.add(threading.current_thread().name)
            return without_drafts(request_id, text, hidden_D)

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


class TestRequestsOfOneCall:
    def test_each_gets_its_own_text_under_its_index(self) -> None:
        async def test() -> None:
            requests = [make_request(random_prompt(i, 3 + i), max_tokens=5 + i) for i in range(6)]
            tokens: list[list[int]] = [[] for _ in requests]
            async with running(make_engine()) as async_engine:
                async for index, output in async_engine.generate(requests):
                    assert output.request_id == requests[index].request_id
                    tokens[index] += output.token_ids
                assert async_engine.num_in_flight == 0
            for request, found in zip(requests, tokens, strict=True):
                assert_same_tokens(tuple(found), ORACLE.complete(request))

        run(test())

    def test_a_request_frees_its_place_when_it_ends_however_long_the_others_run(self) -> None:
        async def test() -> None:
            short = make_request(PROMPT, max_tokens=2)
            async with (
                running() as async_engine,
                aclosing(async_engine.generate([endless(), short])) as stream,
            ):
                await first_output(stream)
                assert async_engine.num_in_flight == 2
                await until(lambda: async_engine.num_in_flight == 1)

        run(test())

    def test_closing_their_stream_aborts_those_that_have_not_ended(self) -> None:
        async def test() -> None:
            short = make_request(PROMPT, max_tokens=2, ignore_eos=True)
            async with running() as async_engine:
                stream = async_engine.generate([endless(1), short, endless(2)])
                await first_output(stream)
                await until(lambda: async_engine.num_in_flight == 2)
                await stream.aclose()
                assert async_engine.num_in_flight == 0
                await until(is_empty(async_engine))
                read = samples(async_engine)
                assert read['euryale_requests_total{finish_reason="abort"}'] == 2
                assert read['euryale_requests_total{finish_reason="length"}'] == 1

        run(test())

    @pytest.mark.parametrize("bad", [0, 1, 2])
    def test_none_runs_if_one_of_them_never_can(self, bad: int) -> None:
        async def test() -> None:
            requests = [make_request(random_prompt(i, 4), max_tokens=5) for i in range(3)]
            requests[bad] = make_request((5, 10**6), max_tokens=5)
            async with running() as async_engine:
                with pytest.raises(InvalidRequestError, match="token id 1000000"):
                    await drain(async_engine.generate(requests))
                assert async_engine.num_in_flight == 0
                assert is_empty(async_engine)()
                read = samples(async_engine)
                assert 'euryale_requests_total{finish_reason="abort"}' not in read
                assert read["euryale_steps_total"] == 0
                assert await collect(async_engine, requests[bad - 1])

        run(test())

    def test_a_slow_reader_holds_up_nobody(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                unread = [make_request(PROMPT, max_tokens=20, ignore_eos=True) for _ in range(2)]
                async with aclosing(async_engine.generate(unread)) as stream:
                    await first_output(stream)
                    await until(lambda: async_engine.num_in_flight == 0)
                    outputs = [output async for _, output in stream]
                assert sum(output.finish_reason is not None for output in outputs) == 2
                read = samples(async_engine)
                assert read['euryale_requests_total{finish_reason="length"}'] == 2

        run(test())


class TestCancellation:
    def test_closing_a_stream_aborts_the_request_and_frees_its_blocks(self) -> None:
        async def test() -> None:
            async with running() as async_engine:
                stream = async_engine.generate([endless()])
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
                aclosing(async_engine.generate([endless(1)])) as first,
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
                doomed = async_engine.generate([endless()])
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
                    stream = async_engine.generate([request])
                    await first_output(stream)
                    await stream.aclose()
                await until(is_empty(async_engine))

        run(test())


class TestAdmission:
    @pytest.mark.slow
    def test_beyond_its_capacity_the_queue_is_full_until_a_request_ends(self) -> None:
        async def test() -> None:
            engine = slow_engine(max_num_seqs=1)
            async with running(engine, max_queue=1) as async_engine:
                first, second = (async_engine.generate([endless(i)]) for i in range(2))
                await first_output(first)
                waiting = asyncio.ensure_future(first_output(second))
                await until(lambda: async_engine.num_in_flight == 2)
                with pytest.raises(QueueFullError, match="2 requests are in flight") as caught:
                    await collect(async_engine, endless(3))
                assert 1.0 <= caught.value.retry_after_s <= 60.0
                await first.aclose()
                assert await collect(async_engine, make_request(PROMPT, max_tokens=2))
                await waiting
                await second.aclose()

        run(test())

    def test_several_requests_of_one_call_are_admitted_together_or_not_at_all(self) -> None:
        async def test() -> None:
            async with running(slow_engine(max_num_seqs=4), max_queue=2) as async_engine:
                with pytest.raises(InvalidRequestError, match="at most 6") as caught:
                    await drain(async_engine.generate([endless(i) for i in range(7)]))
                assert caught.value.param == "n"
                async with aclosing(async_engine.generate([endless()])) as stream:
                    await first_output(stream)
                    with pytest.raises(QueueFullError):
                        await drain(async_engine.generate([endless(i) for i in range(6)]))
                    assert async_engine.num_in_flight == 1
                    rest = [make_request(PROMPT, max_tokens=2) for _ in range(5)]
                    await drain(async_engine.generate(rest))

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
                aclosing(async_engine.generate([request])) as stream,
            ):
                await first_output(stream)
                with pytest.raises(ValueError, match="already in flight"):
                    await collect(async_engine, request)
                assert async_engine.num_in_flight == 1

        run(test())
