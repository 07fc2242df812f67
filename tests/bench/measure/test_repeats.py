from hypothesis import given
from hypothesis import strategies as st

from bench.measure.repeats import NGRAM_LEN, repeated_positions


def repeats(text: str, ngram_len: int) -> list[int]:
    marks = repeated_positions([ord(c) for c in text], ngram_len)
    return [index for index, mark in enumerate(marks) if mark]


def test_a_position_repeats_if_its_ngram_ended_earlier_too() -> None:
    assert repeats("abcXabcY", 3) == [6]


def test_a_loop_repeats_from_its_second_round_on() -> None:
    assert repeats("abcabcabc", 3) == [5, 6, 7, 8]


def test_an_ngram_may_overlap_its_repetition() -> None:
    assert repeats("aaaaa", 3) == [3, 4]


def test_shorter_repetitions_do_not_count() -> None:
    assert repeats("abXabYabZ", 3) == []


def test_texts_shorter_than_the_ngram_have_no_repeats() -> None:
    assert repeats("aaaa", NGRAM_LEN) == []
    assert repeated_positions([]) == []


def test_the_ngram_has_eight_tokens() -> None:
    text = "abcdefgh" * 2
    assert repeats(text, NGRAM_LEN) == [15]
    assert repeated_positions([ord(c) for c in text]) == [False] * 15 + [True]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_repeats_equal_a_slow_search(tokens: list[int], n: int) -> None:
    def ends_at(i: int) -> list[int]:
        return tokens[i - n + 1 : i + 1]

    expected = [
        i >= n - 1 and any(ends_at(j) == ends_at(i) for j in range(n - 1, i))
        for i in range(len(tokens))
    ]
    assert repeated_positions(tokens, n) == expected
