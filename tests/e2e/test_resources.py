import pytest
from openai import OpenAI

from server.api.config import installed_version
from server.engine.engine import Engine
from tests.support.serving import RunningServer, complete

pytestmark = pytest.mark.slow


def test_the_served_model_is_listed_and_described(client: OpenAI, server: RunningServer) -> None:
    [model] = client.models.list()
    assert model.id == server.model
    assert model.object == "model"
    assert model.owned_by == "euryale"
    extra = model.model_extra or {}
    assert extra["max_model_len"] == server.engine.engine.max_model_len
    assert extra["heads"] == server.engine.engine.heads_name
    assert extra["adapter_sha256"] is None
    # The tiny model's name is a path, with slashes in it.
    assert client.models.retrieve(server.model) == model


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/health", {"status": "ok"}),
        ("/ready", {"status": "ready"}),
    ],
)
def test_an_orchestrator_gets_its_answers(
    server: RunningServer, path: str, body: dict[str, str]
) -> None:
    with server.http() as http:
        response = http.get(path)
    assert (response.status_code, response.json()) == (200, body)


def test_the_version_is_that_of_the_distribution(server: RunningServer) -> None:
    with server.http() as http:
        assert http.get("/version").json() == {"version": installed_version()}


def test_metrics_count_what_was_generated(client: OpenAI, server: RunningServer) -> None:
    def total(name: str) -> float:
        with server.http() as http:
            response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        [line] = [line for line in response.text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])

    before = total("euryale_generated_tokens_total")
    complete(client, model=server.model, prompt="a", max_tokens=9, extra_body={"ignore_eos": True})
    assert total("euryale_generated_tokens_total") == before + 9
    assert total("euryale_time_to_first_token_seconds_count") >= 1


def test_tokens_of_a_text_and_back(server: RunningServer, oracle: Engine) -> None:
    text = "Grüße, \N{SNOWMAN}!"
    with server.http() as http:
        tokens = http.post("/tokenize", json={"model": server.model, "prompt": text}).json()
        back = http.post(
            "/detokenize", json={"tokens": tokens["tokens"], "skip_special_tokens": True}
        ).json()
    assert tokens["tokens"] == oracle.tokenizer.encode(text)
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == oracle.max_model_len
    assert back == {"prompt": text}


def test_tokens_of_a_conversation_are_those_of_its_prompt(
    client: OpenAI, server: RunningServer, oracle: Engine
) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    with server.http() as http:
        tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        bare = http.post(
            "/tokenize", json={"messages": messages, "add_generation_prompt": False}
        ).json()["tokens"]
    assert tokens == oracle.tokenizer.apply_chat_template(messages)
    assert len(bare) < len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "colour"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**12]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_wrong_requests_for_tokens_are_refused(
    server: RunningServer, path: str, body: dict[str, object], param: str
) -> None:
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


def test_the_openapi_description_names_the_extensions(server: RunningServer) -> None:
    with server.http() as http:
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert "speculation" in schemas["ChatRequest"]["properties"]
    prompt_types = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert len(prompt_types) == 4
