"""A sequence's text: whole characters, nothing of a stop string, nothing too early."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.text import TextStream
from tests.support.engine_tools import byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(*stops: str) -> TextStream:
    return TextStream(TOKENIZER.detokenizer(), stops)


def tokens_of(text: str) -> list[int]:
    """The smallest tokens, so that every string is cut everywhere."""
    return [token_id for char in text for token_id in TOKENIZER.encode(char)]


def feed(text_stream: TextStream, token_ids: list[int]) -> list[str]:
    """What a client receives: one piece per token until a stop, then the rest."""
    pieces = []
    for token_id in token_ids:
        text_stream.add(token_id)
        pieces.append(text_stream.take())
        if text_stream.is_stopped:
            break
    text_stream.finish()
    pieces.append(text_stream.take())
    return pieces


class TestWithoutStops:
    def test_each_token_gives_its_own_text_at_once(self) -> None:
        text_stream = stream()
        token_ids = TOKENIZER.encode("a draft tree")
        pieces = [text_stream.add(token_id) for token_id in token_ids]
        assert "".join(pieces) == "a draft tree"
        assert text_stream.take() == "a draft tree"
        assert text_stream.take() == ""

    def test_half_a_character_waits_for_the_other_half(self) -> None:
        token_ids = TOKENIZER.encode("ж€😀")
        pieces = feed(stream(), token_ids)
        assert "".join(pieces) == "ж€😀"
        assert not any("\ufffd" in piece for piece in pieces)

    def test_a_character_that_stays_incomplete_ends_as_a_replacement(self) -> None:
        token_ids = TOKENIZER.encode("a😀")
        assert "".join(feed(stream(), token_ids[:-1])) == "a\ufffd"

    def test_special_tokens_have_no_text(self) -> None:
        assert feed(stream(), [2, 1, 0]) == ["", "", "", ""]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(token_ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
    def test_all_pieces_together_are_the_decoded_text(self, token_ids: list[int]) -> None:
        assert "".join(feed(stream(), token_ids)) == TOKENIZER.decode(token_ids)


class TestStops:
    def test_the_text_ends_before_the_stop_string(self) -> None:
        text_stream = stream("cd")
        assert "".join(feed(text_stream, tokens_of("abcdef"))) == "ab"
        assert text_stream.is_stopped

    def test_a_stop_string_is_found_across_tokens(self) -> None:
        pieces = feed(stream("hello world"), tokens_of("say hello world now"))
        assert "".join(pieces) == "say "

    def test_text_that_may_become_a_stop_string_is_held_back(self) -> None:
        assert feed(stream("bcx"), tokens_of("abcd")) == ["a", "", "", "bcd", ""]

    def test_held_text_comes_out_when_the_request_ends(self) -> None:
        text_stream = stream("bcx")
        assert feed(text_stream, tokens_of("abc")) == ["a", "", "", "bc"]
        assert not text_stream.is_stopped

    def test_a_beginning_inside_a_failed_beginning_is_not_lost(self) -> None:
        assert "".join(feed(stream("aab"), tokens_of("aaab!"))) == "a"

    def test_the_stop_that_begins_first_wins(self) -> None:
        text_stream = TextStream(TOKENIZER.detokenizer(), ("tree", "draft"))
        token_ids = TOKENIZER.encode(" draft tree")
        assert "".join(feed(text_stream, token_ids)) == " "

    def test_a_stop_inside_one_token_cuts_that_token(self) -> None:
        (token_id,) = [t for t in range(3, 320) if len(TOKENIZER.decode([t])) >= 4][:1]
        piece = TOKENIZER.decode([token_id])
        assert "".join(feed(stream(piece[2:3]), [token_id])) == piece[: piece.index(piece[2])]

    def test_the_text_of_a_token_is_reported_even_if_it_is_held_or_cut(self) -> None:
        text_stream = stream("ab")
        assert [text_stream.add(token) for token in tokens_of("ab")] == ["a", "b"]
        assert text_stream.take() == ""

    def test_a_stop_string_of_several_bytes_per_character_is_found(self) -> None:
        text_stream = stream("€")
        assert "".join(feed(text_stream, TOKENIZER.encode("5 € net"))) == "5 "

    def test_finishing_twice_emits_nothing_twice(self) -> None:
        text_stream = stream("xyz")
        text_stream.add(tokens_of("x")[0])
        text_stream.finish()
        text_stream.finish()
        assert text_stream.take() == "x"

    @pytest.mark.parametrize("seed", range(5))
    def test_random_texts_over_two_letters_are_cut_where_find_says(self, seed: int) -> None:
        rng = Random(seed)
        for _ in range(200):
            text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
            stops = [
                "".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))
            ]
            expected = text
            for end in range(len(text) + 1):
                found = [at for stop in stops if (at := text.find(stop, 0, end)) >= 0]
                if found:
                    expected = text[: min(found)]
                    break
            pieces = feed(stream(*stops), tokens_of(text))
            assert "".join(pieces) == expected, (text, stops)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        token_ids=st.lists(st.integers(3, TOKENIZER.vocab_size - 1), max_size=25),
        stop=st.sampled_from(["e", "th", "ee", "a ", "\n"]),
    )
    def test_nothing_that_was_emitted_is_ever_taken_back(
        self, token_ids: list[int], stop: str
    ) -> None:
        text_stream, emitted = stream(stop), ""
        for count, token_id in enumerate(token_ids, start=1):
            text_stream.add(token_id)
            emitted += text_stream.take()
            assert stop not in emitted
            assert TOKENIZER.decode(token_ids[:count]).startswith(emitted)
            if text_stream.is_stopped:
                break
