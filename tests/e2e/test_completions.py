import json

import pytest
from openai import OpenAI

from server.config import SamplingParams
from server.core.request import Request
from server.engine.engine import Engine
from tests.support.serving import RunningServer, complete

pytestmark = pytest.mark.slow

LONG = {"ignore_eos": True}


def expected(oracle: Engine, prompt: list[int], **sampling: object) -> str:
    """The text that the engine gives without any server around it."""
    params = SamplingParams(**sampling)  # type: ignore[arg-type]  # any field
    return oracle.generate([Request("oracle", tuple(prompt), params)])[0].text


def test_a_greedy_completion_is_the_engines(
    client: OpenAI, server: RunningServer, oracle: Engine
) -> None:
    prompt = oracle.tokenizer.encode("hello world")
    completion = complete(
        client,
        model=server.model,
        prompt="hello world",
        max_tokens=24,
        temperature=0,
        extra_body=LONG,
    )
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion.model == server.model
    [choice] = completion.choices
    assert choice.text == expected(oracle, prompt, max_tokens=24, temperature=0.0, ignore_eos=True)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == 24
    assert completion.usage.total_tokens == len(prompt) + 24


def test_sixteen_tokens_are_the_default(client: OpenAI, server: RunningServer) -> None:
    completion = complete(client, model=server.model, prompt="a", extra_body=LONG)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


def test_the_four_forms_of_a_prompt_agree(
    client: OpenAI, server: RunningServer, oracle: Engine
) -> None:
    texts = ["hello", "good morning"]
    ids = [oracle.tokenizer.encode(text) for text in texts]
    from_texts = complete(client, model=server.model, prompt=texts, temperature=0, extra_body=LONG)
    from_ids = complete(client, model=server.model, prompt=ids, temperature=0, extra_body=LONG)
    single = complete(client, model=server.model, prompt=ids[1], temperature=0, extra_body=LONG)
    assert [choice.text for choice in from_texts.choices] == [c.text for c in from_ids.choices]
    assert [choice.index for choice in from_texts.choices] == [0, 1]
    assert single.choices[0].text == from_texts.choices[1].text
    assert from_texts.usage is not None
    assert from_texts.usage.prompt_tokens == sum(map(len, ids))


def test_choices_of_a_seeded_request_differ_and_the_first_has_the_seed_itself(
    client: OpenAI, server: RunningServer
) -> None:
    options = {"model": server.model, "prompt": "a", "seed": 7, "max_tokens": 12}
    alone = complete(client, **options, extra_body=LONG)
    several = complete(client, **options, n=3, extra_body=LONG)
    again = complete(client, **options, n=3, extra_body=LONG)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts[0] == alone.choices[0].text
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in again.choices]
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    assert several.usage.completion_tokens == 36


def test_choices_are_numbered_prompt_by_prompt(client: OpenAI, server: RunningServer) -> None:
    completion = complete(
        client, model=server.model, prompt=["a", "b"], n=2, temperature=0, extra_body=LONG
    )
    texts = [choice.text for choice in completion.choices]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]


def test_a_stop_string_ends_the_text_before_it(client: OpenAI, server: RunningServer) -> None:
    options = {"model": server.model, "prompt": "a", "temperature": 0, "max_tokens": 40}
    whole = complete(client, **options, extra_body=LONG).choices[0].text
    stop = whole[5:8]
    choice = complete(client, **options, stop=stop, extra_body=LONG).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop)]


def test_logit_bias_forces_a_token(client: OpenAI, server: RunningServer, oracle: Engine) -> None:
    token_id = oracle.tokenizer.encode("z", add_special_tokens=False)[0]
    completion = complete(
        client,
        model=server.model,
        prompt="a",
        temperature=0,
        max_tokens=4,
        logit_bias={str(token_id): 100},
    )
    assert completion.choices[0].text == oracle.tokenizer.decode([token_id] * 4)


def test_the_options_of_others_are_taken_from_extra_body(
    client: OpenAI, server: RunningServer
) -> None:
    greedy = complete(client, model=server.model, prompt="a", temperature=0, extra_body=LONG)
    one_candidate = complete(
        client, model=server.model, prompt="a", temperature=2, extra_body={**LONG, "top_k": 1}
    )
    narrow = complete(
        client, model=server.model, prompt="a", temperature=2, extra_body={**LONG, "min_p": 1.0}
    )
    assert one_candidate.choices[0].text == greedy.choices[0].text == narrow.choices[0].text


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_change_a_greedy_text(
    client: OpenAI, server: RunningServer, oracle: Engine, penalty: str
) -> None:
    prompt = oracle.tokenizer.encode("abc")
    text = complete(
        client,
        model=server.model,
        prompt="abc",
        temperature=0,
        max_tokens=32,
        extra_body={**LONG, penalty: 2.0},
    ).choices[0]
    sampling = {"max_tokens": 32, "temperature": 0.0, "ignore_eos": True}
    assert text.text == expected(oracle, prompt, **sampling, **{penalty: 2.0})
    assert text.text != expected(oracle, prompt, **sampling)


def test_logprobs_have_one_entry_per_token(client: OpenAI, server: RunningServer) -> None:
    completion = complete(
        client,
        model=server.model,
        prompt="a",
        temperature=0,
        max_tokens=10,
        logprobs=3,
        extra_body=LONG,
    )
    [choice] = completion.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert [len(logprobs.tokens), len(logprobs.token_logprobs)] == [10, 10]
    assert [len(logprobs.top_logprobs), len(logprobs.text_offset)] == [10, 10]
    assert logprobs.text_offset[0] == 0
    assert sorted(logprobs.text_offset) == logprobs.text_offset
    assert logprobs.text_offset[-1] <= len(choice.text)
    for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == pytest.approx(max(top.values()))
        assert len(top) <= 4


def test_no_alternatives_leave_the_drawn_token(client: OpenAI, server: RunningServer) -> None:
    completion = complete(
        client, model=server.model, prompt="a", max_tokens=3, logprobs=0, extra_body=LONG
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert [list(top) for top in logprobs.top_logprobs] == [[text] for text in logprobs.tokens]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_adds_up_to_the_whole_completion(
    client: OpenAI, server: RunningServer, seed: int | None
) -> None:
    options: dict[str, object] = {
        "model": server.model,
        "prompt": "hello",
        "max_tokens": 30,
        "temperature": 0 if seed is None else 1,
        "seed": seed,
        "logprobs": 2,
        "extra_body": LONG,
    }
    whole = complete(client, **options).choices[0]
    chunks = list(complete(client, **options, stream=True))
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == whole.text
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert [token for c in choices for token in c.logprobs.tokens] == whole.logprobs.tokens
    offsets = [offset for c in choices for offset in c.logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage_ends_in_a_chunk_without_choices(
    client: OpenAI, server: RunningServer
) -> None:
    options = {"model": server.model, "prompt": "hello", "temperature": 0, "extra_body": LONG}
    whole = complete(client, **options)
    *chunks, last = complete(client, **options, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.model_extra["speculation"] == whole.usage.model_extra["speculation"]


def test_streamed_choices_interleave_by_index(client: OpenAI, server: RunningServer) -> None:
    options = {
        "model": server.model,
        "prompt": ["a", "b"],
        "n": 2,
        "seed": 5,
        "max_tokens": 20,
        "extra_body": LONG,
    }
    whole = complete(client, **options)
    texts = [""] * 4
    order = []
    for chunk in complete(client, **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            order.append(choice.index)
    assert texts == [choice.text for choice in whole.choices]
    assert order != sorted(order)


def test_the_wire_format_of_a_stream(server: RunningServer) -> None:
    body = {"model": server.model, "prompt": "a", "max_tokens": 3, "stream": True, **LONG}
    with server.http() as http:
        response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, end = response.text.split("\n\n")
    assert end == ""
    assert events[-1] == "data: [DONE]"
    for item in events[:-1]:
        chunk = json.loads(item.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
