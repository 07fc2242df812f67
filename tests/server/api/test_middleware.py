import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from server.api.errors import install_error_handlers
from server.api.middleware import ApiKeyMiddleware, BodyLimitMiddleware


async def length(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


def app(api_key: str | None = None, max_bytes: int = 10) -> Starlette:
    paths = ["/v1/work", "/tokenize", "/health"]
    application = Starlette(routes=[Route(path, length, methods=["GET", "POST"]) for path in paths])
    application.add_middleware(BodyLimitMiddleware, max_bytes=max_bytes)
    application.add_middleware(ApiKeyMiddleware, api_key=api_key)
    return application


def ask(application: Starlette, method: str, path: str, **options: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)  # type: ignore[arg-type]  # any option

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["/v1/work", "/tokenize"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer key2", "key", "é"])
def test_work_needs_the_right_key(path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = ask(app(api_key="key"), "GET", path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["key", "schlüssel"])
def test_the_right_key_opens(key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()}
    assert ask(app(api_key=key), "GET", "/v1/work", headers=headers).status_code == 200


def test_health_needs_no_key_and_without_a_key_nothing_does() -> None:
    assert ask(app(api_key="key"), "GET", "/health").status_code == 200
    assert ask(app(), "GET", "/v1/work").status_code == 200


@pytest.mark.parametrize(("size", "status"), [(0, 200), (10, 200), (11, 413), (10_000, 413)])
def test_an_announced_body_is_limited(size: int, status: int) -> None:
    response = ask(app(), "POST", "/v1/work", content=b"x" * size)
    assert response.status_code == status
    if status == 413:
        error = response.json()["error"]
        assert error["code"] == "request_too_large"
        assert "longer than 10 bytes" in error["message"]


@pytest.mark.parametrize(("num_chunks", "status"), [(2, 200), (3, 413)])
def test_a_body_in_chunks_is_limited(num_chunks: int, status: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(num_chunks):
            yield b"x" * 5

    assert ask(app(), "POST", "/v1/work", content=chunks()).status_code == status


def test_a_body_in_chunks_that_is_too_long_has_the_code_of_an_announced_one() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"[1, 2]"

    application = FastAPI()

    @application.post("/v1/work")
    async def total(numbers: list[int]) -> int:
        return sum(numbers)

    install_error_handlers(application)
    application.add_middleware(BodyLimitMiddleware, max_bytes=10)

    announced = ask(application, "POST", "/v1/work", content=b"x" * 18)
    chunked = ask(application, "POST", "/v1/work", content=chunks())
    assert chunked.status_code == announced.status_code == 413
    assert chunked.json() == announced.json()
    assert chunked.json()["error"]["code"] == "request_too_large"


def test_the_failure_body_is_openais() -> None:
    response = ask(app(api_key="key"), "GET", "/v1/work")
    assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}
