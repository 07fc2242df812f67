from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from server.api.config import ServerConfig
from server.engine.engine import Engine
from tests.support.serving import RunningServer, chat, complete, running_server, wait_until

pytestmark = pytest.mark.slow

LONG = {"ignore_eos": True}


def test_sixteen_streams_at_once_have_the_text_that_each_has_alone(
    server: RunningServer,
) -> None:
    def asked(index: int) -> dict[str, object]:
        return {
            "model": server.model,
            "messages": [{"role": "user", "content": f"Question {index}: " + "why? " * index}],
            "max_tokens": 10 + index,
            "temperature": index % 2,
            "seed": index,
            "extra_body": LONG,
        }

    def stream(index: int) -> str:
        with server.openai() as client:
            chunks = chat(client, **asked(index), stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with server.openai() as client:
        alone = [chat(client, **asked(index)).choices[0].message.content for index in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(stream, range(16)))
    assert together == alone


def test_a_full_queue_answers_429_and_says_when_to_retry(
    engine_factory: Callable[..., Engine],
) -> None:
    config = ServerConfig(port=0, max_queue=1, log_level="warning")
    with (
        running_server(engine_factory(max_num_seqs=1), config=config) as server,
        server.openai() as client,
    ):
        long = {"model": server.model, "prompt": "a", "max_tokens": 1500, "extra_body": LONG}
        streams = [complete(client, **long, stream=True)]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(complete, client, **{**long, "max_tokens": 4})
            wait_until(lambda: server.engine.num_in_flight == 2)
            with pytest.raises(openai.RateLimitError, match="retry later") as caught:
                complete(client, **long)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            with pytest.raises(openai.RateLimitError):
                complete(client, **long, stream=True)
            assert server.engine.num_in_flight == 2
            for stream in streams:
                stream.close()
            assert waiting.result().usage.completion_tokens == 4


def test_more_choices_than_fit_are_refused_as_a_whole(
    engine_factory: Callable[..., Engine],
) -> None:
    config = ServerConfig(port=0, max_queue=0, log_level="warning")
    with (
        running_server(engine_factory(max_num_seqs=2), config=config) as server,
        server.openai() as client,
    ):
        with pytest.raises(openai.APIStatusError):
            complete(client, model=server.model, prompt="a", n=3)
        assert server.engine.num_in_flight == 0
        answer = complete(client, model=server.model, prompt="a", n=2, max_tokens=2)
        assert len(answer.choices) == 2


def test_many_conversations_are_tokenized_at_once(server: RunningServer) -> None:
    def count(index: int) -> int:
        with server.http() as http:
            body = {"prompt": f"{index} " * 2000}
            return int(http.post("/tokenize", json=body).json()["count"])

    alone = [count(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(count, range(8))) == alone
