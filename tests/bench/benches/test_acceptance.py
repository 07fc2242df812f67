import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.benches.acceptance import (
    NGRAM_LEN,
    accept_rates,
    count_fresh_steps,
    repeated_positions,
    summarise,
)
from bench.workload.tracing import StepCount
from tests.bench.traces import make_trace

LOOP = "abcdefgh"


def test_steps_that_begin_in_a_repetition_are_not_fresh() -> None:
    # Positions 16 and later of prompt and output repeat an 8-gram; the second step begins there.
    trace = make_trace("", LOOP + LOOP[:7] + LOOP[7] + LOOP[:4], (15, 4))
    assert count_fresh_steps(trace) == StepCount(1, 15)


def test_repeats_of_the_prompt_count_as_repeats() -> None:
    trace = make_trace(LOOP, "X" + LOOP + "Y", (7, 1, 1))
    assert count_fresh_steps(trace) == StepCount(2, 8)


def test_a_step_that_only_ends_in_a_repetition_is_fresh() -> None:
    trace = make_trace(LOOP, "X" + LOOP, (7, 1))
    assert count_fresh_steps(trace) == StepCount(1, 7)
    assert count_fresh_steps(make_trace(LOOP, "X" + LOOP, (6, 2))) == StepCount(2, 8)


def test_accept_rates_are_shares_of_all_verify_steps() -> None:
    traces = [
        make_trace("p", "abcdef", (3, 2), accepted=(2, 1)),
        make_trace("p", "abcd", (1, 1, 1)),
    ]
    assert accept_rates(traces) == (2 / 5, 1 / 5)


def test_without_drafts_there_are_no_accept_rates() -> None:
    assert accept_rates([make_trace("p", "abc", (1, 1))]) == ()
    assert accept_rates([]) == ()


def test_figures_pool_the_verify_steps() -> None:
    traces = [
        make_trace("p", "abcdefg", (3, 3), accepted=(2, 2)),
        make_trace("p", "abcdef", (1, 1, 1, 2), accepted=(1,)),
        make_trace("p", "a", ()),
    ]
    result = summarise(traces, ["x", "y", "z"])
    assert result.mean_acceptance_length == pytest.approx(11 / 6)
    assert result.by_category == {"x": 3.0, "y": 1.25}
    assert result.mean_over_categories == pytest.approx(2.125)
    assert result.accept_rate_by_depth == pytest.approx((1 / 2, 1 / 3))
    assert (result.num_outputs, result.num_output_tokens, result.num_steps) == (3, 14, 6)
    assert result.mean_draft_tokens == 5.0
    assert result.without_repeats.mean_acceptance_length == result.mean_acceptance_length
    assert result.without_repeats.share_of_steps == 1.0


def test_the_figure_without_repeats_comes_with_the_whole_one() -> None:
    looping = make_trace(LOOP, "X" + LOOP + LOOP[:4], (7, 5), accepted=(1, 1, 1, 1))
    result = summarise([looping], ["x"])
    assert result.mean_acceptance_length == 6.0
    assert result.without_repeats.mean_acceptance_length == 7.0
    assert result.without_repeats.by_category == {"x": 7.0}
    assert result.without_repeats.num_steps == 1
    assert result.without_repeats.share_of_steps == 0.5


def test_nothing_to_count_gives_zeros() -> None:
    result = summarise([], [])
    assert (result.mean_acceptance_length, result.num_steps) == (0.0, 0)


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
