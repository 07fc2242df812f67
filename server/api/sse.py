"""Server-sent events: framing, and a response that streams them until the client hangs up."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import until_disconnect
from server.api.errors import failure_of
from server.errors import EuryaleError

_LOG = logging.getLogger("euryale.api")

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """Frame one event; `data` is JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Streams events that are already framed.

    The status line waits for the first event, so an error before it is an ordinary error response;
    a later one becomes an event `{"error": ...}` that ends the stream without `[DONE]`. The events'
    generator is closed in every case, at once when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream.

        Raises:
            Exception: What the events raised before the first of them.
        """
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientDisconnect:
            _LOG.info("the client has left the stream of %s", scope["path"])

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await _send_body(send, first)
            try:
                async for item in events:
                    await _send_body(send, item)
            except EuryaleError as error:
                await _send_body(send, event(failure_of(error).body()))
            except Exception as error:  # noqa: BLE001  # the client must learn of any failure
                _LOG.exception("a stream of %s failed", self.media_type)
                await _send_body(send, event(failure_of(error).body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
