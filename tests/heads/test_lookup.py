"""Prompt lookup against a search through the whole text."""

from random import Random

import pytest

from heads.lookup import LookupIndex, Match

BOUNDARY = -1


def matches_slowly(
    text: list[int], num_matches: int, num_tokens: int, max_length: int, first_place: int = 0
) -> list[Match]:
    """Every earlier place, its match counted token by token.

    Args:
        first_place: Where the reference begins in a text that ends it by a boundary.
    """
    boundary = text.index(BOUNDARY) if BOUNDARY in text else len(text)
    found = []
    for place in range(len(text) - 1):
        length = 0
        while length <= place and length < max_length and text[place - length] == text[-1 - length]:
            length += 1
        if length:
            found.append((-length, -place))
    pairs = [item for item in found if item[0] < -1]
    ranked = sorted(pairs or found)[:num_matches]
    matches = []
    for length, place in ranked:
        start = 1 - place
        end = start + num_tokens if start > boundary else min(start + num_tokens, boundary)
        inside = first_place <= start < boundary < len(text)
        matches.append(
            Match(-length, tuple(text[start:end]), start - first_place if inside else -1)
        )
    return matches


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


@pytest.mark.parametrize("seed", range(40))
def test_finds_what_a_search_through_prompt_reference_and_text_finds(seed: int) -> None:
    rng = Random(seed)
    tokens = range(rng.choice((3, 8)))
    prompt, reference = rng.choices(tokens, k=9), rng.choices(tokens, k=rng.randint(1, 20))
    tail, output = prompt[-5:], rng.choices(tokens, k=12)
    index = LookupIndex(prompt, reference, max_length=5)
    for end in range(len(output) + 1):
        sequence = prompt + output[:end]
        index.catch_up(sequence)
        text = [*tail, *reference, BOUNDARY, *sequence]
        assert index.matches(3, 4) == matches_slowly(text, 3, 4, 5, len(tail))


def test_the_reference_is_what_may_follow_the_text_at_hand() -> None:
    index = LookupIndex([1, 20, 21], prediction=[30, 31, 32])
    assert index.matches(1, 8) == [Match(3, (30, 31, 32), 0)]
    index.catch_up([1, 20, 21, 30])
    assert index.matches(1, 8) == [Match(4, (31, 32), 1)]


def test_a_reference_is_found_again_behind_what_differs_from_it() -> None:
    index = LookupIndex([1], prediction=[30, 31, 32, 33, 34])
    index.catch_up([1, 30, 99, 32])
    assert index.matches(1, 8) == [Match(1, (33, 34), 3)]


def test_no_match_and_no_continuation_crosses_from_the_reference_into_the_text() -> None:
    index = LookupIndex([3, 9], prediction=[1, 2])
    index.catch_up([3, 9, 2, 3])
    assert index.matches(1, 8) == [Match(1, (9, 2, 3))]
    index.catch_up([3, 9, 2, 3, 1, 2])
    assert index.matches(4, 8) == [Match(2, ())]


def test_only_the_newest_occurrences_are_looked_at() -> None:
    repeated = [7, 8, 5, 1] + [9, 8, 5, 2] * 40 + [7, 8, 5]
    assert LookupIndex(repeated).matches(1, 1) == [Match(2, (2,))]
