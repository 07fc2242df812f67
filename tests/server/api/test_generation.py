from collections.abc import Iterator

import pytest

from server.api.config import ApiConfig
from server.api.context import ApiContext
from server.api.generation import check_num_choices, choice_seed, prepare
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completions import CompletionRequest
from server.engine.async_engine import AsyncEngine
from server.errors import InvalidRequestError
from tests.support.engine_tools import make_engine


def test_without_a_seed_no_choice_has_one() -> None:
    assert [choice_seed(None, choice) for choice in range(3)] == [None] * 3


@pytest.mark.parametrize("seed", [0, 7, -(2**63), 2**63 - 1])
def test_choices_have_distinct_seeds_of_64_bits_and_the_first_has_the_requests(seed: int) -> None:
    seeds = [choice_seed(seed, choice) for choice in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(derived is not None and -(2**63) <= derived < 2**63 for derived in seeds)


def test_derived_seeds_stay_the_same_from_release_to_release() -> None:
    assert choice_seed(7, 1) == 2174948161648732372


def test_neighbouring_seeds_do_not_share_choices() -> None:
    seeds = {choice_seed(seed, choice) for seed in range(50) for choice in range(50)}
    assert len(seeds) == 2500


@pytest.mark.parametrize(("num_prompts", "n"), [(129, 1), (2, 65), (43, 3)])
def test_too_many_choices_are_refused_with_their_number(num_prompts: int, n: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"make {num_prompts * n} choices"):
        check_num_choices(num_prompts, n)


def test_as_many_choices_as_allowed_pass() -> None:
    check_num_choices(64, 2)


PREDICTION = {"type": "content", "content": [{"type": "text", "text": "ab c"}]}


class CountedPrompt(list[int]):
    """Token ids that count how often they are read."""

    num_reads = 0

    def __iter__(self) -> Iterator[int]:
        CountedPrompt.num_reads += 1
        return super().__iter__()


def context() -> ApiContext:
    engine = make_engine(heads="none", tree_size=8, lookup=True)
    return ApiContext.of(AsyncEngine(engine), ApiConfig())


def completion_request(parts: ApiContext, **fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": parts.model_name, "prompt": "a", **fields})


def test_every_choice_gets_the_prediction_without_special_tokens() -> None:
    parts = context()
    body = completion_request(parts, prompt=["a", "b"], n=2, prediction=PREDICTION)
    expected = tuple(parts.tokenizer.encode("ab c", add_special_tokens=False))
    requests = prepare(body, parts).requests
    assert [request.prediction_token_ids for request in requests] == [expected] * 4


def test_choices_are_numbered_prompt_by_prompt() -> None:
    parts = context()
    requests = prepare(completion_request(parts, prompt=[[5, 6], [7]], n=2, seed=3), parts).requests
    assert [request.prompt_token_ids for request in requests] == [(5, 6)] * 2 + [(7,)] * 2
    seeds = [request.sampling.seed for request in requests]
    assert seeds == [3, choice_seed(3, 1)] * 2
    assert len({request.request_id for request in requests}) == 4


def test_a_prompt_is_copied_once_however_many_choices_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = context()
    for n in (1, 8):
        CountedPrompt.num_reads = 0
        monkeypatch.setattr(CompletionRequest, "prompts", lambda *_: [CountedPrompt([5] * 50)])
        requests = prepare(completion_request(parts, n=n), parts).requests
        assert CountedPrompt.num_reads == 1
        assert len({id(request.prompt_token_ids) for request in requests}) == 1
        assert len(requests) == n


@pytest.mark.parametrize(
    ("asked", "num_prompt_tokens", "expected"),
    [({}, 5, 16), ({}, 250, 6), ({"max_tokens": 3}, 5, 3), ({"max_completion_tokens": 4}, 5, 4)],
)
def test_completions_have_16_tokens_at_most_unless_asked_for_others(
    asked: dict[str, object], num_prompt_tokens: int, expected: int
) -> None:
    parts = context()
    assert parts.max_model_len == 256
    [request] = prepare(
        completion_request(parts, prompt=[5] * num_prompt_tokens, **asked), parts
    ).requests
    assert request.sampling.max_tokens == expected


def test_answers_may_fill_the_context() -> None:
    parts = context()
    messages = [{"role": "user", "content": "hi"}]
    body = ChatRequest.model_validate({"model": parts.model_name, "messages": messages})
    [request] = prepare(body, parts).requests
    assert request.sampling.max_tokens == parts.max_model_len - len(request.prompt_token_ids)
    assert request.request_id.startswith("chatcmpl-")
