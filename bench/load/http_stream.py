"""A client of servers that stream events: as little of it as possible, since it shares the CPU.

Speaks HTTP/1.1 over one connection per request, to plain `http://` addresses.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from bench.errors import BenchError

_PREFIX = b"data:"
_DONE = b"[DONE]"
_MAX_LINE_BYTES = 1 << 20
_NUM_ERROR_CHARACTERS = 500


async def post_events(
    host: str, port: int, path: str, body: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Send JSON and yield the events of the answer, up to `[DONE]` or the end.

    Raises:
        BenchError: If the server cannot be reached, refuses, or sends an error as an event.
    """
    where = f"http://{host}:{port}{path}"
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=_MAX_LINE_BYTES)
    except OSError as error:
        raise BenchError(f"cannot reach {where}: {error}; is the server running?") from error
    try:
        writer.write(_request(host, port, path, json.dumps(body).encode()))
        status, headers = await _head(reader)
        async with aclosing(_lines(reader, headers)) as lines:
            if status != 200:
                text = b"".join([line async for line in lines]).decode(errors="replace")
                raise BenchError(f"{where} answered {status}: {text[:_NUM_ERROR_CHARACTERS]}")
            async for line in lines:
                if not line.startswith(_PREFIX):
                    continue
                data = line[len(_PREFIX) :].strip()
                if data == _DONE:
                    return
                event = json.loads(data)
                if "error" in event:
                    raise BenchError(f"{where} sent an error: {event['error']}")
                yield event
    except (OSError, EOFError, ValueError) as error:
        raise BenchError(f"{where} broke off or sent no events: {error!r}") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _request(host: str, port: int, path: str, body: bytes) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        f"Host: {host}:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, with names in small letters."""
    words = (await reader.readline()).split()
    if len(words) < 2:
        raise ValueError("it sent no status")
    status = int(words[1])
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def _lines(
    reader: asyncio.StreamReader, headers: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """Lines of the body as soon as they are complete, and a rest that is none at the end."""
    rest = b""
    async for piece in _pieces(reader, "chunked" in headers.get("transfer-encoding", "").lower()):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    yield rest


async def _pieces(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    if not is_chunked:
        while piece := await reader.read(_MAX_LINE_BYTES):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
