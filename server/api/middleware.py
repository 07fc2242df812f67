"""Plain ASGI middleware: the API key, and the longest body.

It leaves `send` alone and only counts what `receive` brings, so a disconnect reaches the routes.
"""

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import Failure

_GUARDED = ("/v1/", "/tokenize", "/detokenize")


class ApiKeyMiddleware:
    """Asks for `Authorization: Bearer KEY` on the routes that do work, if there is a key."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or answer 401."""
        if self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        failure = Failure(
            401,
            "the API key is missing or wrong; send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await failure.response()(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._expected is None or scope["type"] != "http":
            return True
        if not scope["path"].startswith(_GUARDED):
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode("latin-1"), self._expected)


class BodyLimitMiddleware:
    """Answers 413 to request bodies that are longer than the limit, announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            failure = Failure(413, self._message(), code="request_too_large")
            await failure.response()(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._message())
            return message

        await self._app(scope, counted, send)

    def _message(self) -> str:
        return f"the request body is longer than {self._max_bytes} bytes; send less"
