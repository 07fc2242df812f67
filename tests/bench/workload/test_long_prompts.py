import pytest

from bench.workload.long_prompts import LongPrompts
from tests.support.engine_tools import byte_tokenizer

TEXTS = ("The euryale is a jellyfish.", "A draft tree has a root.", "Accepted tokens leave it.")


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 1000])
def test_a_prompt_has_exactly_so_many_tokens(num_tokens: int) -> None:
    prompts = LongPrompts(byte_tokenizer(), TEXTS)
    assert len(prompts.token_ids(num_tokens)) == num_tokens


def test_prompts_are_the_same_each_time() -> None:
    one, other = (LongPrompts(byte_tokenizer(), TEXTS) for _ in range(2))
    assert [one.token_ids(50) for _ in range(5)] == [other.token_ids(50) for _ in range(5)]


def test_no_two_prompts_begin_alike() -> None:
    prompts = LongPrompts(byte_tokenizer(), TEXTS)
    assert len({prompts.token_ids(16) for _ in range(200)}) == 200


def test_a_prompt_is_its_number_and_then_the_texts_in_turn() -> None:
    prompts = LongPrompts(byte_tokenizer(), TEXTS)
    assert prompts.text(500).startswith(
        f"1. {TEXTS[1]}\n\n{TEXTS[2]}\n\n{TEXTS[0]}\n\n{TEXTS[1]}\n\n"
    )
    assert prompts.text(100).startswith(f"2. {TEXTS[2]}\n\n{TEXTS[0]}\n\n")


def test_one_text_is_enough() -> None:
    assert len(LongPrompts(byte_tokenizer(), TEXTS[:1]).token_ids(300)) == 300
