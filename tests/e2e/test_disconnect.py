import socket
from collections.abc import Callable

import httpx
import pytest

from server.engine.engine import Engine
from tests.support.serving import RunningServer, running_server, wait_until

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "hi"}
LONG = {"max_tokens": 1500, "ignore_eos": True}


def generated(server: RunningServer) -> int:
    return server.engine.engine.counters.num_generated_tokens


def assert_aborted(server: RunningServer) -> None:
    """Nothing runs soon, few tokens after the client has gone; a whole request has 1500."""
    generated_before = generated(server)
    engine = server.engine.engine
    wait_until(lambda: server.engine.num_in_flight == 0)
    wait_until(lambda: not engine.has_unfinished)
    assert engine.blocks.num_in_use == 0
    assert generated(server) - generated_before < 500


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_leaving_a_stream_aborts_all_its_choices(server: RunningServer, path: str, n: int) -> None:
    ask = {"prompt": "a"} if path == "/v1/completions" else {"messages": [USER]}
    body = {"model": server.model, "stream": True, "n": n, **ask, **LONG}
    with server.http() as http, http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        assert server.engine.num_in_flight == n
    assert_aborted(server)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_hanging_up_aborts_a_request_that_does_not_stream(
    server: RunningServer, path: str, n: int
) -> None:
    ask = {"prompt": "a"} if path == "/v1/completions" else {"messages": [USER]}
    body = {"model": server.model, "n": n, **ask, **LONG}
    before = generated(server)
    with server.http() as http:
        request = http.build_request("POST", path, json=body)
    raw = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items()), "", ""]
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall("\r\n".join(raw).encode() + request.content)
        wait_until(lambda: server.engine.engine.num_running == n)
        wait_until(lambda: generated(server) > before)
    assert_aborted(server)


def test_leaving_while_the_request_waits_removes_it_from_the_queue(
    engine_factory: Callable[..., Engine],
) -> None:
    with running_server(engine_factory(max_num_seqs=1)) as server, server.http() as http:
        body = {"model": server.model, "prompt": "a", "stream": True, **LONG}
        with http.stream("POST", "/v1/completions", json=body) as first:
            # Kept in a variable, because losing the iterator would close the connection.
            lines = first.iter_lines()
            assert next(lines).startswith("data: {")
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json={**body, "stream": False}, timeout=0.2)
            wait_until(lambda: server.engine.num_in_flight == 1)
        wait_until(lambda: server.engine.num_in_flight == 0)
        wait_until(lambda: not server.engine.engine.has_unfinished)


def test_others_are_not_disturbed(server: RunningServer) -> None:
    body = {"model": server.model, "prompt": "a", "max_tokens": 40, "temperature": 0}
    body["ignore_eos"] = True
    with server.http() as http:
        alone = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        long_body = {**body, **LONG, "stream": True}
        with http.stream("POST", "/v1/completions", json=long_body) as response:
            next(response.iter_lines())
        beside = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert beside == alone
