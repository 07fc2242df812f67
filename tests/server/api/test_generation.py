import asyncio

import pytest

from server.api.config import ApiConfig
from server.api.context import ApiContext
from server.api.generation import (
    Job,
    TokenizedTexts,
    check_num_choices,
    choice_seed,
    prepare_job,
    tokenized,
)
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


def test_as_many_choices_as_allowed_are_counted() -> None:
    assert check_num_choices(64, 2) == 128


PREDICTION = {"type": "content", "content": [{"type": "text", "text": "ab c"}]}


class CountedId(int):
    """A token id that counts how often it is compared."""

    num_compared = 0

    def __lt__(self, other: int) -> bool:
        CountedId.num_compared += 1
        return super().__lt__(other)

    def __gt__(self, other: int) -> bool:
        CountedId.num_compared += 1
        return super().__gt__(other)


def job(prompts: list[list[int]], n: int) -> Job:
    context = ApiContext.of(AsyncEngine(make_engine()), ApiConfig())
    body = CompletionRequest.model_validate(
        {"model": context.model_name, "prompt": "a", "n": n, "seed": 3}
    )
    return prepare_job(context, body, TokenizedTexts(prompts, ()), "cmpl", None, 4)


def test_every_choice_gets_the_prediction_without_special_tokens() -> None:
    context = ApiContext.of(AsyncEngine(make_engine(heads="none", lookup=True)), ApiConfig())
    body = CompletionRequest.model_validate(
        {"model": context.model_name, "prompt": "a", "n": 2, "prediction": PREDICTION}
    )
    texts = asyncio.run(tokenized(context, body, lambda: [[5], [6]]))
    expected = tuple(context.tokenizer.encode("ab c", add_special_tokens=False))
    requests = prepare_job(context, body, texts, "cmpl", None, 4).requests
    assert [request.prediction_token_ids for request in requests] == [expected] * 4


def test_a_prompt_is_read_once_however_many_choices_it_has() -> None:
    counts = []
    for n in (1, 8):
        CountedId.num_compared = 0
        requests = job([[CountedId(5) for _ in range(50)]], n).requests
        counts.append(CountedId.num_compared)
        assert len({id(request.prompt_token_ids) for request in requests}) == 1
        assert len(requests) == n
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_every_prompt_is_checked(bad: int) -> None:
    prompts = [[5, 6], [7], [8, 9]]
    prompts[bad].append(10**6)
    with pytest.raises(InvalidRequestError, match="token id 1000000"):
        job(prompts, 2)
