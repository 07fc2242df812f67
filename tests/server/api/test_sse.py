import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from server.api.sse import DONE, EventStream, event
from server.errors import EngineStoppedError, QueueFullError


class Connection:
    """Keeps what was sent; hangs up after a number of body messages if told to."""

    def __init__(self, hang_up_after: int | None = None) -> None:
        self.sent: list[Message] = []
        self._hang_up_after = hang_up_after
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if self._hang_up_after is not None and len(self.sent) > self._hang_up_after:
            self._gone.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def respond(events: AsyncGenerator[bytes, None], connection: Connection) -> None:
    scope = {"type": "http", "path": "/stream"}
    await EventStream(events)(scope, connection.receive, connection.send)


def test_an_event_is_a_data_line_and_an_empty_line() -> None:
    assert event(b'{"a": 1}') == b'data: {"a": 1}\n\n'
    assert event(b"[DONE]") == DONE


def test_events_are_sent_one_by_one_and_the_body_ends() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield event(b"1")
        yield DONE

    connection = Connection()
    asyncio.run(respond(events(), connection))
    start, *bodies = connection.sent
    assert start["status"] == 200
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    assert [message["body"] for message in bodies] == [event(b"1"), DONE, b""]
    assert [message["more_body"] for message in bodies] == [True, True, False]


def test_an_error_before_the_first_event_is_raised_before_anything_is_sent() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        raise QueueFullError("full", 1.0)
        yield b""

    connection = Connection()
    with pytest.raises(QueueFullError):
        asyncio.run(respond(events(), connection))
    assert connection.sent == []


def test_an_error_in_mid_stream_becomes_the_last_event() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield event(b"1")
        raise EngineStoppedError("the engine failed")

    connection = Connection()
    asyncio.run(respond(events(), connection))
    last = connection.body.removeprefix(event(b"1")).decode()
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "the engine failed",
        "type": "server_error",
        "param": None,
        "code": "engine_stopped",
    }
    assert b"[DONE]" not in connection.body
    assert connection.sent[-1]["more_body"] is False


def test_an_unexpected_error_in_mid_stream_is_logged_and_hides_its_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield event(b"1")
        raise ZeroDivisionError("secret")

    connection = Connection()
    asyncio.run(respond(events(), connection))
    assert b"the server failed" in connection.body
    assert b"secret" not in connection.body
    assert "secret" in caplog.text


@pytest.mark.parametrize("num_sent", [0, 1, 3])
def test_a_disconnect_closes_the_events_at_once(num_sent: int) -> None:
    steps: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(num_sent):
                yield event(b"1")
            await asyncio.Event().wait()
        finally:
            steps.append("closed")

    async def hang_up() -> Connection:
        connection = Connection(hang_up_after=num_sent)
        if num_sent == 0:
            connection._gone.set()
        await respond(events(), connection)
        return connection

    connection = asyncio.run(asyncio.wait_for(hang_up(), 5))
    assert steps == ["closed"]
    assert connection.body == event(b"1") * num_sent
