"""A client of servers that stream events over HTTP.

It shares the CPU with the server that it measures, so it parses no more than it needs.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx

from bench.errors import BenchError

_PREFIX = b"data:"
_DONE = b"[DONE]"
_NUM_ERROR_CHARACTERS = 500


def http_client(base_url: str) -> httpx.AsyncClient:
    """A client of one server that waits for answers without limit.

    Every request gets a connection of its own, and proxies of the environment are left alone.
    """
    return httpx.AsyncClient(
        base_url=base_url,
        timeout=None,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
        verify=False,
    )


async def post_events(
    client: httpx.AsyncClient, path: str, body: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Send JSON and yield the events of the answer, up to `[DONE]` or the end.

    Raises:
        BenchError: If the server cannot be reached, answers with an error status, or sends an error
            as an event.
    """
    where = f"{str(client.base_url).rstrip('/')}{path}"
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise BenchError(
                    f"{where} answered {response.status_code}: {text[:_NUM_ERROR_CHARACTERS]}"
                )
            async for line in _lines(response):
                if not line.startswith(_PREFIX):
                    continue
                data = line[len(_PREFIX) :].strip()
                if data == _DONE:
                    return
                event = json.loads(data)
                if "error" in event:
                    raise BenchError(f"{where} sent an error: {event['error']}")
                yield event
    except httpx.ConnectError as error:
        raise BenchError(f"cannot reach {where}: {error}; is the server running?") from error
    except (httpx.HTTPError, ValueError) as error:
        raise BenchError(f"{where} broke off or sent no events: {error!r}") from error


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of the body as soon as they are complete, and the unfinished rest at the end.

    NOTE: httpx's own `aiter_lines` also splits at separators that are allowed inside a
    JSON text, such as U+2028.
    """
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    yield rest
