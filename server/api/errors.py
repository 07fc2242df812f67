"""Turns every error into an HTTP status and OpenAI's error body.

The only place that knows which error is which status. Bodies are
`{"error": {"message", "type", "param", "code"}}`, in responses and in the middle of a stream.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.schemas.base import describe_validation_error
from server.errors import (
    EngineStoppedError,
    EuryaleError,
    InvalidRequestError,
    QueueFullError,
)

_LOG = logging.getLogger("euryale.api")
_CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the client sees it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """OpenAI's error object as ASCII JSON, so that no character of a message can break it."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode("ascii")

    def response(self) -> Response:
        """The failure as a whole HTTP response."""
        return Response(
            self.body(), self.status, headers=dict(self.headers), media_type="application/json"
        )


class ModelNotFoundError(EuryaleError):
    """The request names a model that this server does not serve (HTTP 404)."""


def failure_of(error: Exception) -> Failure:
    """Describe an error; one that is not listed here is a 500 without its details."""
    match error:
        case InvalidRequestError():
            return Failure(400, str(error), param=error.param, code=error.code)
        case RequestValidationError():
            problem = describe_validation_error(error.errors()[0])
            return Failure(400, problem.message, param=problem.param, code=problem.code)
        case ModelNotFoundError():
            return Failure(404, str(error), param="model", code="model_not_found")
        case QueueFullError():
            wait_s = max(1, math.ceil(error.retry_after_s))
            headers = {"Retry-After": str(wait_s)}
            return Failure(429, str(error), "rate_limit_error", code="queue_full", headers=headers)
        case EngineStoppedError():
            return Failure(503, str(error), "server_error", code="engine_stopped")
        case _:
            return Failure(500, "the server failed on this request; see its log", "server_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application, the unexpected ones too, with an OpenAI body."""
    for kind in (EuryaleError, RequestValidationError, Exception):
        app.add_exception_handler(kind, _handle)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)


async def _handle(request: Request, error: Exception) -> Response:
    return failure_of(error).response()


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    _LOG.info("%s %s: the client has gone", request.method, request.url.path)
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _handle_http(request: Request, error: Exception) -> Response:
    """Answer what the routing rejects: unknown paths, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    headers = error.headers or {}
    match error.status_code:
        case 404:
            failure = Failure(404, f"unknown request URL: {place}", code="unknown_url")
        case 405:
            failure = Failure(
                405,
                f"{place} is not allowed; use {headers.get('Allow', 'another method')}",
                code="method_not_allowed",
                headers=headers,
            )
        case 400:
            failure = Failure(400, f"{place}: {error.detail}", code="invalid_json")
        case 413:
            failure = Failure(413, error.detail, code="request_too_large")
        case status:
            failure = Failure(status, f"{place}: {error.detail}", headers=headers)
    return failure.response()
