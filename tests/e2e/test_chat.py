import json
import math

import pytest
from openai import OpenAI

from server.config import SamplingParams
from server.core.request import Request
from server.engine.engine import Engine
from tests.support.serving import RunningServer, chat

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "Hello, who are you?"}
LONG = {"ignore_eos": True}


def options(server: RunningServer, **more: object) -> dict[str, object]:
    return {
        "model": server.model,
        "messages": [USER],
        "max_completion_tokens": 20,
        "temperature": 0,
        "extra_body": LONG,
        **more,
    }


def test_a_greedy_answer_is_the_engines(
    client: OpenAI, server: RunningServer, oracle: Engine
) -> None:
    prompt = tuple(oracle.tokenizer.apply_chat_template([USER]))
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    [oracles] = oracle.generate([Request("oracle", prompt, params)])
    answer = chat(client, **options(server))
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == oracles.text
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 20


def test_text_parts_are_one_text(client: OpenAI, server: RunningServer) -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "who are you?"}]
    whole = chat(client, **options(server))
    joined = chat(client, **options(server, messages=[{"role": "user", "content": parts}]))
    assert joined.choices[0].message.content == whole.choices[0].message.content
    assert joined.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.slow
def test_without_a_limit_an_answer_may_fill_the_context(
    client: OpenAI, server: RunningServer, oracle: Engine
) -> None:
    # A prompt that leaves little room keeps the test short.
    limit = server.engine.engine.max_model_len
    filler = "word " * limit
    words = next(
        count
        for count in range(limit, 0, -1)
        if len(oracle.tokenizer.apply_chat_template([{**USER, "content": filler[: count * 5]}]))
        < limit - 10
    )
    message = {**USER, "content": filler[: words * 5]}
    answer = chat(
        client,
        model=server.model,
        messages=[message],
        extra_body=LONG,
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == limit
    assert answer.choices[0].finish_reason == "length"


def test_several_answers(client: OpenAI, server: RunningServer) -> None:
    answer = chat(client, **options(server, n=3, seed=1, temperature=1))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_logprobs_describe_each_token(client: OpenAI, server: RunningServer) -> None:
    answer = chat(client, **options(server, logprobs=True, top_logprobs=4))
    [choice] = answer.choices
    content = choice.logprobs.content
    assert len(content) == 20
    for entry in content:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == entry.top_logprobs[0].logprob
        logprobs = [top.logprob for top in entry.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(map(math.exp, logprobs)) <= 1.0001
        if entry.bytes is not None:
            assert bytes(entry.bytes).decode() == entry.token


def test_logprobs_without_alternatives(client: OpenAI, server: RunningServer) -> None:
    answer = chat(client, **options(server, logprobs=True))
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(
    client: OpenAI, server: RunningServer
) -> None:
    whole = chat(client, **options(server, logprobs=True))
    chunks = list(chat(client, **options(server, logprobs=True), stream=True))
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert choices[0].delta.content == ""
    assert all(choice.delta.role is None for choice in choices[1:])
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[-1].delta.content is None
    entries = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    assert [entry.token for entry in entries] == [
        entry.token for entry in whole.choices[0].logprobs.content
    ]


def test_streamed_answers_interleave_by_index(client: OpenAI, server: RunningServer) -> None:
    asked = options(server, n=3, seed=2, temperature=1)
    whole = chat(client, **asked)
    texts, roles, reasons = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in chat(client, **asked, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        reasons[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == reasons == [1, 1, 1]


def test_usage_comes_last_if_asked_for(client: OpenAI, server: RunningServer) -> None:
    *chunks, last = chat(
        client, **options(server, stream=True, stream_options={"include_usage": True})
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 20


def test_the_wire_format_of_a_stream(server: RunningServer) -> None:
    body = {"model": server.model, "messages": [USER], "max_tokens": 3, "stream": True, **LONG}
    with server.http() as http:
        response = http.post("/v1/chat/completions", json=body)
    *events, end = response.text.split("\n\n")
    assert (events[-1], end) == ("data: [DONE]", "")
    deltas = []
    for item in events[:-1]:
        chunk = json.loads(item.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        [choice] = chunk["choices"]
        assert set(choice) == {"index", "delta", "logprobs", "finish_reason"}
        deltas.append(choice["delta"])
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}


@pytest.mark.parametrize("method", ["auto", "medusa", "none"])
def test_greedy_text_is_the_same_with_every_draft_source(
    client: OpenAI, server: RunningServer, method: str
) -> None:
    plain = chat(client, **options(server))
    answer = chat(client, **options(server, extra_body={**LONG, "speculation": {"method": method}}))
    assert answer.choices[0].message.content == plain.choices[0].message.content
    speculation = answer.usage.model_extra["speculation"]
    assert speculation["acceptance"] == "exact"
    assert speculation["method"] == ("none" if method == "none" else "medusa")


def test_usage_tells_what_speculation_did(client: OpenAI, server: RunningServer) -> None:
    answer = chat(client, **options(server))
    speculation = answer.usage.model_extra["speculation"]
    assert set(speculation) == {
        "method",
        "acceptance",
        "num_steps",
        "num_draft_tokens",
        "num_accepted_tokens",
        "mean_acceptance_length",
        "accepted_per_depth",
    }
    # The token that ends the prefill belongs to no verify step.
    emitted = answer.usage.completion_tokens - 1
    steps = speculation["num_steps"]
    assert speculation["mean_acceptance_length"] == pytest.approx(emitted / steps)
    assert speculation["num_draft_tokens"] > 0
    assert sum(speculation["accepted_per_depth"]) == speculation["num_accepted_tokens"]


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"temperature": 1}, "typical"),
        ({"temperature": 1, "seed": 1}, "exact"),
        ({"temperature": 1, "logprobs": True}, "exact"),
        ({"temperature": 0}, "exact"),
        ({"temperature": 1, "extra_body": {"speculation": {"acceptance": "exact"}}}, "exact"),
    ],
)
def test_auto_acceptance_is_typical_for_plain_sampling_only(
    client: OpenAI, server: RunningServer, fields: dict[str, object], rule: str
) -> None:
    answer = chat(client, **options(server, **fields))
    assert answer.usage.model_extra["speculation"]["acceptance"] == rule


def test_a_repeated_prompt_is_taken_from_the_cache(client: OpenAI, server: RunningServer) -> None:
    message = {"role": "user", "content": "the same words again and again " * 5}
    asked = options(server, messages=[message], max_completion_tokens=2)
    first = chat(client, **asked)
    second = chat(client, **asked)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
