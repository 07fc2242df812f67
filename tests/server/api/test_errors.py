import json

import pytest
from fastapi.exceptions import RequestValidationError

from server.api.errors import Failure, ModelNotFoundError, failure_of
from server.errors import (
    ConfigError,
    EngineStoppedError,
    EuryaleError,
    InvalidRequestError,
    QueueFullError,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (
            InvalidRequestError("too long", "prompt", "context_length_exceeded"),
            400,
            "invalid_request_error",
            "prompt",
            "context_length_exceeded",
        ),
        (ModelNotFoundError("no"), 404, "invalid_request_error", "model", "model_not_found"),
        (QueueFullError("full", 2.5), 429, "rate_limit_error", None, "queue_full"),
        (EngineStoppedError("gone"), 503, "server_error", None, "engine_stopped"),
    ],
)
def test_each_error_has_its_status_and_body(
    error: EuryaleError, status: int, kind: str, param: str | None, code: str | None
) -> None:
    failure = failure_of(error)
    assert failure.status == status
    assert json.loads(failure.body()) == {
        "error": {"message": str(error), "type": kind, "param": param, "code": code}
    }


@pytest.mark.parametrize(("wait_s", "header"), [(0.0, "1"), (1.0, "1"), (2.5, "3")])
def test_a_full_queue_says_when_to_retry(wait_s: float, header: str) -> None:
    assert failure_of(QueueFullError("full", wait_s)).headers == {"Retry-After": header}


@pytest.mark.parametrize("error", [RuntimeError("secret path"), ConfigError("secret path")])
def test_an_unexpected_error_is_a_500_without_details(error: Exception) -> None:
    failure = failure_of(error)
    assert failure.status == 500
    assert b"secret" not in failure.body()


def test_a_validation_error_names_its_parameter() -> None:
    error = RequestValidationError([{"type": "missing", "loc": ("body", "model"), "msg": "m"}])
    failure = failure_of(error)
    assert (failure.status, failure.param) == (400, "model")


def test_bodies_are_ascii_whatever_the_message_holds() -> None:
    body = Failure(400, "lone \ud800 and \N{SNOWMAN}").body()
    assert json.loads(body)["error"]["message"] == "lone \ud800 and \N{SNOWMAN}"
