import math

import pytest

from server.api.logprobs import chat_logprobs, completion_logprobs
from server.api.token_texts import TokenTexts
from server.core.request import TokenLogprob
from server.tokenizer import Tokenizer
from tests.support.tiny_models import tiny_tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), [2])


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.encode(char)[0] for char in text]


def test_completions_place_each_token_in_the_text(tokenizer: Tokenizer) -> None:
    a, b, c = ids(tokenizer, "abc")
    entries = [TokenLogprob(a, -0.5, ((a, -0.5), (b, -1.0))), TokenLogprob(c, -3.0, ((a, -0.1),))]
    logprobs = completion_logprobs(entries, ["a", "c"], 10, TokenTexts(tokenizer))
    assert logprobs.tokens == ["a", "c"]
    assert logprobs.text_offset == [10, 11]
    assert logprobs.token_logprobs == [-0.5, -3.0]
    assert logprobs.top_logprobs == [{"a": -0.5, "b": -1.0}, {"a": -0.1, "c": -3.0}]


def test_tokens_with_one_text_keep_the_likelier_ones_logprob(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("\N{OCTOPUS}")[:2]
    texts = TokenTexts(tokenizer)
    assert texts.text(first) == texts.text(second)
    entry = TokenLogprob(second, -2.0, ((first, -1.0), (second, -2.0)))
    [top] = completion_logprobs([entry], [""], 0, texts).top_logprobs
    assert top == {texts.text(first): -1.0}


def test_chat_lists_the_alternatives(tokenizer: Tokenizer) -> None:
    a, b = ids(tokenizer, "ab")
    entry = TokenLogprob(b, -2.0, ((a, -0.5), (b, -2.0)))
    [token] = chat_logprobs([entry], TokenTexts(tokenizer)).content
    assert (token.token, token.logprob, token.bytes) == ("b", -2.0, [98])
    assert [(top.token, top.logprob) for top in token.top_logprobs] == [("a", -0.5), ("b", -2.0)]


def test_infinity_is_written_as_openai_writes_it(tokenizer: Tokenizer) -> None:
    [a] = ids(tokenizer, "a")
    entry = TokenLogprob(a, -math.inf, ((a, -math.inf),))
    texts = TokenTexts(tokenizer)
    assert chat_logprobs([entry], texts).content[0].logprob == -9999.0
    assert completion_logprobs([entry], ["a"], 0, texts).top_logprobs == [{"a": -9999.0}]
