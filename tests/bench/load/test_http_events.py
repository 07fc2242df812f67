import asyncio
import json
from typing import Any

import pytest

from bench.errors import BenchError
from bench.load.http_events import http_client, post_events

OK = b"HTTP/1.1 200 OK\r\n"


def ask(reply: bytes | list[bytes]) -> tuple[list[dict[str, Any]], bytes]:
    """Events that a server's reply means, and what the server was sent."""
    return asyncio.run(_ask([reply] if isinstance(reply, bytes) else reply))


async def _ask(pieces: list[bytes]) -> tuple[list[dict[str, Any]], bytes]:
    received = bytearray()
    is_served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"}"))
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.001)
        writer.close()
        is_served.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        try:
            async with http_client(f"http://127.0.0.1:{port}") as client:
                events = [event async for event in post_events(client, "/v1/x", {"a": 1})]
        finally:
            await is_served.wait()
    return events, bytes(received)


def chunked(*pieces: bytes) -> list[bytes]:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


def test_events_end_with_done() -> None:
    events, _ = ask(
        OK + b'\r\ndata: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\ndata: {"n": 3}\n'
    )
    assert events == [{"n": 1}, {"n": 2}]


def test_events_may_end_with_the_connection() -> None:
    events, _ = ask(OK + b'\r\n: comment\n\ndata:{"n": 1}\r\n\r\ndata: {"n": 2}')
    assert events == [{"n": 1}, {"n": 2}]


def test_chunks_are_joined_wherever_they_are_cut() -> None:
    text = 'data: {"n": "äö\u2028ü"}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'.encode()
    for size in (1, 7, 16, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert ask(chunked(*pieces))[0] == [{"n": "äö\u2028ü"}, {"n": 2}]


def test_the_request_is_json() -> None:
    _, received = ask(OK + b"\r\ndata: [DONE]\n\n")
    head, body = received.split(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert json.loads(body) == {"a": 1}
    assert b"Content-Length: 7" in head


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nthe queue is full", "answered 429: the queue is full"),
        (OK + b'\r\ndata: {"error": {"message": "stopping"}}\n\n', "sent an error: .*stopping"),
        (OK + b"\r\ndata: {no json\n\n", "broke off or sent no events"),
        (b"", "broke off or sent no events"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", "broke off or sent no events"),
    ],
)
def test_an_error_says_what_went_wrong(reply: bytes, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        ask(reply)


def test_a_server_that_is_not_there_is_named() -> None:
    async def nowhere() -> None:
        async with http_client("http://127.0.0.1:1") as client:
            async for _ in post_events(client, "/v1/x", {}):
                pass

    with pytest.raises(BenchError, match=r"cannot reach http://127\.0\.0\.1:1/v1/x"):
        asyncio.run(nowhere())
