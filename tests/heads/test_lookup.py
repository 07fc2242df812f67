"""Prompt lookup against a search through the whole text."""

from random import Random

import pytest

from heads.lookup import LookupIndex, Match


def matches_slowly(
    text: list[int], num_matches: int, num_tokens: int, max_length: int
) -> list[Match]:
    """Every earlier place, its match counted token by token."""
    found = []
    for place in range(len(text) - 1):
        length = 0
        while length <= place and length < max_length and text[place - length] == text[-1 - length]:
            length += 1
        if length:
            found.append((-length, -place))
    pairs = [item for item in found if item[0] < -1]
    ranked = sorted(pairs or found)[:num_matches]
    return [
        Match(-length, tuple(text[1 - place : 1 - place + num_tokens])) for length, place in ranked
    ]


@pytest.mark.parametrize("seed", range(40))
def test_finds_what_a_search_through_the_text_finds(seed: int) -> None:
    rng = Random(seed)
    text = rng.choices(range(rng.choice((3, 8))), k=rng.randint(1, 30))
    index = LookupIndex(text[:1], max_length=5)
    for end in range(1, len(text) + 1):
        index.catch_up(text[:end])
        assert index.matches(3, 4) == matches_slowly(text[:end], 3, 4, 5)


def test_the_longest_match_comes_first_and_the_newer_of_equal_ones() -> None:
    index = LookupIndex([1, 2, 3, 9, 7, 2, 3, 8, 0, 2, 3, 5, 1, 2, 3])
    assert index.matches(3, 1) == [Match(3, (9,)), Match(2, (5,)), Match(2, (8,))]


def test_a_single_token_counts_where_no_two_agree() -> None:
    index = LookupIndex([4, 5, 6, 5])
    assert index.matches(2, 2) == [Match(1, (6, 5))]


def test_new_text_has_no_match() -> None:
    assert LookupIndex([1, 2, 3]).matches(4, 4) == []
    assert LookupIndex([]).matches(4, 4) == []


def test_a_reference_is_searched_like_the_text_before_it() -> None:
    index = LookupIndex([1, 20, 21], reference=[20, 21, 22, 23])
    assert index.matches(1, 8) == [Match(2, (22, 23))]
    index.catch_up([1, 20, 21, 22])
    assert index.matches(1, 8) == [Match(3, (23,))]


def test_no_match_and_no_continuation_crosses_from_the_reference_into_the_text() -> None:
    index = LookupIndex([3, 9, 2, 3], reference=[1, 2])
    assert index.matches(4, 8) == [Match(1, (9, 2, 3))]
    at_the_end = LookupIndex([5, 1, 2], reference=[1, 2])
    assert at_the_end.matches(4, 8) == [Match(2, ())]


def test_only_the_newest_occurrences_are_looked_at() -> None:
    repeated = [7, 8, 5, 1] + [9, 8, 5, 2] * 40 + [7, 8, 5]
    assert LookupIndex(repeated).matches(1, 1) == [Match(2, (2,))]
