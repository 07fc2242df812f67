from collections.abc import Callable

import httpx
import openai
import pytest
from openai import OpenAI

from server.api.config import ApiConfig
from server.engine.engine import Engine
from tests.support.serving import RunningServer, running_server

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "hi"}


def refuse(server: RunningServer, path: str, body: object, status: int = 400) -> dict[str, object]:
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, object] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def completion(server: RunningServer, **fields: object) -> dict[str, object]:
    return refuse(server, "/v1/completions", {"model": server.model, "prompt": "a", **fields})


def chat(server: RunningServer, **fields: object) -> dict[str, object]:
    return refuse(
        server, "/v1/chat/completions", {"model": server.model, "messages": [USER], **fields}
    )


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.completions.create(model="gpt-4o", prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_the_model_is_required(server: RunningServer) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [USER]}),
    ]:
        error = refuse(server, path, body)
        assert error["param"] == "model"
        assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"speculation": {"max_nodes": 1000}}, "speculation.max_nodes"),
        ({"speculation": {"method": "magic"}}, "speculation.method"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_wrong_parameter_is_named(
    server: RunningServer, fields: dict[str, object], param: str, stream: bool
) -> None:
    error = chat(server, **{"stream": stream, **fields})
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["a", "b"], "n": 65}, "n"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ],
)
def test_a_wrong_parameter_of_completions_is_named(
    server: RunningServer, fields: dict[str, object], param: str
) -> None:
    assert completion(server, **fields)["param"] == param


def test_an_image_is_refused_by_name(server: RunningServer) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = chat(server, messages=[{"role": "user", "content": [part]}])
    assert error["param"] == "messages[0].content"
    assert error["code"] == "unsupported_option"
    assert "image_url" in str(error["message"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_openais_code(server: RunningServer, stream: bool) -> None:
    limit = server.engine.engine.max_model_len
    error = completion(server, prompt=[5] * limit, stream=stream)
    assert error["code"] == "context_length_exceeded"
    assert str(limit) in str(error["message"])
    assert completion(server, max_tokens=limit)["code"] == "context_length_exceeded"
    chat_error = chat(server, messages=[{"role": "user", "content": "word " * limit}])
    assert chat_error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m", "prompt": ' + b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"\\ud800": 1}',
        b'{"model": "\\ud800", "prompt": "a"}',
    ],
)
def test_an_unreadable_body_is_a_client_error(server: RunningServer, content: bytes) -> None:
    with server.http() as http:
        response = http.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if not content.startswith(b"{"):
        assert (error["param"], error["code"]) == (None, "invalid_json")


def test_a_body_that_is_not_declared_as_json_is_told_so(server: RunningServer) -> None:
    with server.http() as http:
        response = http.post("/v1/completions", data={"model": "m"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_lone_surrogate_in_a_prompt_is_refused(server: RunningServer) -> None:
    with server.http() as http:
        response = http.post(
            "/v1/completions",
            content=b'{"model": "%s", "prompt": "a\\ud800"}' % server.model.encode(),
            headers={"Content-Type": "application/json"},
        )
    assert response.status_code == 400
    assert "surrogate" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other/model", 404, "model_not_found"),
    ],
)
def test_routing_errors_have_openais_body(
    server: RunningServer, method: str, path: str, status: int, code: str
) -> None:
    with server.http() as http:
        response = http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]
    if status == 405:
        assert "Allow" in response.headers


def test_a_server_with_a_key_and_a_small_limit(
    engine_factory: Callable[..., Engine],
) -> None:
    engine = engine_factory()
    api = ApiConfig(served_model_name="mine", api_key="secret", max_request_bytes=2000)
    with running_server(engine, api) as server:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            server.openai("wrong").models.list()
        client = server.openai("secret")
        assert [model.id for model in client.models.list()] == ["mine"]
        answer = client.completions.create(model="mine", prompt="a", max_tokens=2)
        assert answer.model == "mine"
        with pytest.raises(openai.APIStatusError, match="longer than 2000 bytes") as caught:
            client.completions.create(model="mine", prompt="a" * 3000)
        assert caught.value.status_code == 413
        assert caught.value.code == "request_too_large"
        response = httpx.post(
            f"{server.url}/v1/completions",
            content=(b"a" * 1000 for _ in range(3)),
            headers={"Authorization": "Bearer secret", "Content-Type": "application/json"},
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert httpx.get(f"{server.url}/health").status_code == 200
