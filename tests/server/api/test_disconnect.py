import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from server.api.disconnect import until_disconnect


def connection(*types: str) -> Receive:
    """Brings these messages and then stays silent."""
    messages = iter(types)

    async def receive() -> Message:
        for kind in messages:
            return {"type": kind}
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    assert asyncio.run(until_disconnect(connection(), work())) == 5


def test_an_error_of_the_work_is_passed_on() -> None:
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(until_disconnect(connection(), work()))


def test_a_disconnect_cancels_the_work_before_it_is_reported() -> None:
    steps = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    with pytest.raises(ClientDisconnect):
        asyncio.run(until_disconnect(connection("http.disconnect"), work()))
    assert steps == ["cleaned up"]


def test_what_remains_of_the_body_is_no_disconnect() -> None:
    async def work() -> int:
        await asyncio.sleep(0.01)
        return 5

    assert asyncio.run(until_disconnect(connection("http.request", "http.request"), work())) == 5


def test_cancelling_the_caller_cancels_the_work() -> None:
    steps = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            steps.append("cancelled")
            raise

    async def cancel_it() -> None:
        caller = asyncio.create_task(until_disconnect(connection(), work()))
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    asyncio.run(cancel_it())
    assert steps == ["cancelled"]


def test_no_task_is_left_behind() -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    async def count_tasks() -> int:
        await until_disconnect(connection(), work())
        return len(asyncio.all_tasks())

    assert asyncio.run(count_tasks()) == 1
