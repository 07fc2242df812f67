"""Incremental decoding against decoding the whole text, and what the chat template may refuse."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer
from tests.support.tiny_models import BOS_TOKEN, EOS_TOKEN, VOCAB_SIZE, tiny_tokenizer

MakeTokenizer = Callable[[], Tokenizer]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "plain",
    "  two  spaces ",
    "Ünïcödé",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "日本語",
    "a\nb\r\n\tc",
    "e\u0301",
    REPLACEMENT,
]

texts = st.text(st.characters(codec="utf-8")) | st.sampled_from(TEXTS)
# Ids beyond the vocabulary stand for an embedding that has more rows than there are tokens.
byte_level_ids = st.lists(st.integers(0, VOCAB_SIZE + 5))


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), [2])


def byte_fallback(decoder: decoders.Decoder) -> Tokenizer:
    """Like Llama 2's and Gemma's: words begin with a metaspace, unknown characters are bytes."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdehlnorsw.,ü", "▁a", "he", "ll", "▁w"]
    rust = RustTokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[("▁", "a"), ("h", "e"), ("l", "l"), ("▁", "w")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.decoder = decoder
    rust.add_special_tokens(["<s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust), [])


@cache
def llama_like() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return byte_fallback(decoders.Sequence([*steps, decoders.Strip(" ", left=1)]))


@cache
def gemma_like() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return byte_fallback(decoders.Sequence(steps))


@cache
def word_pieces() -> Tokenizer:
    tokens = ["[UNK]", "[CLS]", "draft", "tree", "##s", "##ing", "verify", ".", ",", "'", "t"]
    rust = RustTokenizer(
        models.WordPiece(
            vocab={token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"
        )
    )
    rust.decoder = decoders.WordPiece(cleanup=False)
    rust.add_special_tokens(["[CLS]"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust), [])


def pieces_of(
    tokenizer: Tokenizer, token_ids: Sequence[int], prompt: Sequence[int] = ()
) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]


@given(text=texts)
def test_a_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = byte_level()

    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(token_ids=byte_level_ids)
def test_byte_level_pieces_join_to_the_decoded_whole_even_for_broken_characters(
    token_ids: list[int],
) -> None:
    tokenizer = byte_level()

    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("make", [llama_like, gemma_like])
@given(parts=st.lists(texts | st.just("hello, a world. "), max_size=4))
def test_byte_fallback_pieces_join_to_the_decoded_whole(
    make: MakeTokenizer, parts: list[str]
) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode("".join(parts))

    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(token_ids=st.lists(st.integers(0, 12)))
def test_word_pieces_join_to_the_decoded_whole(token_ids: list[int]) -> None:
    tokenizer = word_pieces()

    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(text=texts)
def test_byte_level_pieces_come_as_early_as_their_characters_are_complete(text: str) -> None:
    tokenizer = byte_level()
    detokenizer = tokenizer.detokenizer()
    emitted = ""
    token_ids = tokenizer.encode(text)
    for count, token_id in enumerate(token_ids, start=1):
        emitted += detokenizer.add(token_id)
        whole = tokenizer.decode(token_ids[:count])
        assert emitted == whole or REPLACEMENT in whole[len(emitted) :]


@pytest.mark.parametrize("make", [byte_level, llama_like, gemma_like])
def test_an_emoji_comes_out_in_one_piece_with_its_last_byte(make: MakeTokenizer) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode("🦑", add_special_tokens=False)[-4:]

    assert pieces_of(tokenizer, token_ids) == ["", "", "", "🦑", ""]


def test_spaces_between_words_are_kept_although_one_at_the_beginning_is_dropped() -> None:
    tokenizer = llama_like()
    token_ids = tokenizer.encode("hello a world")

    assert tokenizer.decode(token_ids) == "hello a world"
    assert "".join(pieces_of(tokenizer, token_ids)) == "hello a world"


def test_a_special_token_in_the_middle_leaves_no_trace() -> None:
    tokenizer = llama_like()
    ids = tokenizer.encode("hello a")
    special = tokenizer.encode("<s>")[-1]
    with_special = [special, *ids[:-1], special, ids[-1]]

    assert "".join(pieces_of(tokenizer, with_special)) == tokenizer.decode(with_special)


@pytest.mark.parametrize("make", [byte_level, llama_like, gemma_like])
def test_an_unfinished_character_becomes_one_replacement_or_more_at_the_end(
    make: MakeTokenizer,
) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode("🦑", add_special_tokens=False)[-4:-1]

    *pieces, rest = pieces_of(tokenizer, token_ids)

    assert pieces == ["", "", ""]
    assert rest == tokenizer.decode(token_ids)
    assert set(rest) == {REPLACEMENT}


def test_what_was_complete_before_a_broken_byte_run_is_not_revised() -> None:
    tokenizer = gemma_like()
    squid = tokenizer.encode("🦑", add_special_tokens=False)[-4:]
    (letter,) = tokenizer.encode("h", add_special_tokens=False)[-1:]

    pieces = pieces_of(tokenizer, [*squid, squid[1], letter])

    assert pieces == ["", "", "", "🦑", "", f"{REPLACEMENT}h", ""]


@pytest.mark.parametrize("make", [llama_like, gemma_like])
def test_text_is_held_back_for_four_tokens_at_most(make: MakeTokenizer) -> None:
    tokenizer = make()
    (broken,) = tokenizer.encode("🦑", add_special_tokens=False)[-1:]
    pieces = pieces_of(tokenizer, [broken] * 50)

    for count in range(1, 51):
        assert count - 4 < len("".join(pieces[:count])) <= count
    assert "".join(pieces) == tokenizer.decode([broken] * 50) == REPLACEMENT * 50


@pytest.mark.parametrize("make", [llama_like, gemma_like])
@given(count=st.integers(0, 12), before=st.sampled_from(["", "h", "é"]), after=st.text("h🦑é"))
def test_real_replacement_characters_are_counted_right(
    make: MakeTokenizer, count: int, before: str, after: str
) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode(f"a{before}{REPLACEMENT * count}{after}")

    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_a_token_costs_the_same_however_long_the_text_does_not_grow() -> None:
    tokenizer = gemma_like()
    tokenizer.decode([])
    (broken,) = tokenizer.encode("🦑", add_special_tokens=False)[-1:]
    special = tokenizer.encode("<s>")[-1]
    for token_id in (broken, special, tokenizer.vocab_size + 3):
        detokenizer = tokenizer.detokenizer()
        started_s = time.perf_counter()
        for _ in range(20_000):
            detokenizer.add(token_id)
        # A window of all tokens would take minutes.
        assert time.perf_counter() - started_s < 15.0


def test_tokens_without_text_do_not_part_a_word() -> None:
    tokenizer = word_pieces()
    beyond = [tokenizer.vocab_size] * 9

    assert "".join(pieces_of(tokenizer, [2, *beyond, 4])) == "drafts"


@pytest.mark.parametrize("make", [byte_level, llama_like, gemma_like])
@given(prompt=texts.filter(bool), answer=texts)
def test_after_a_prompt_the_pieces_continue_its_text(
    make: MakeTokenizer, prompt: str, answer: str
) -> None:
    tokenizer = make()
    token_ids, num_prompt = tokenizer.encode(prompt + answer), len(tokenizer.encode(prompt))
    prompt_ids, answer_ids = token_ids[:num_prompt], token_ids[num_prompt:]
    shown = tokenizer.decode(prompt_ids)
    whole = tokenizer.decode(token_ids)
    assume(REPLACEMENT not in whole + shown)

    assert "".join(pieces_of(tokenizer, answer_ids, prompt_ids)) == whole.removeprefix(shown)


def test_a_completion_keeps_the_space_that_the_model_wrote() -> None:
    tokenizer = llama_like()
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("world")

    assert "".join(pieces_of(tokenizer, answer)) == "world"
    assert "".join(pieces_of(tokenizer, answer, prompt)) == " world"


def test_a_special_token_that_ends_the_prompt_is_looked_through() -> None:
    tokenizer = llama_like()
    special = tokenizer.encode("<s>")[-1]
    answer = tokenizer.encode("world")

    assert "".join(pieces_of(tokenizer, answer, [special])) == "world"
    after_text = [*tokenizer.encode("hello"), special]
    assert "".join(pieces_of(tokenizer, answer, after_text)) == " world"


def test_a_word_that_the_prompt_began_is_continued() -> None:
    assert "".join(pieces_of(word_pieces(), [4, 6], [2])) == "s verify"


@pytest.mark.parametrize("make", [llama_like, gemma_like])
def test_a_prompt_that_ends_inside_a_character_leaks_nothing(make: MakeTokenizer) -> None:
    tokenizer = make()
    squid = tokenizer.encode("🦑", add_special_tokens=False)[-4:]
    (letter,) = tokenizer.encode("h", add_special_tokens=False)[-1:]

    assert "".join(pieces_of(tokenizer, [letter], [letter, *squid[:2]])) == "h"
    assert pieces_of(tokenizer, [], [letter, *squid[:2]]) == [""]


def test_an_added_token_with_characters_outside_the_byte_alphabet_means_itself() -> None:
    plain = tiny_tokenizer()
    plain.add_tokens(["\n  日\n"])
    tokenizer = Tokenizer(plain, [])
    token_ids = tokenizer.encode("a\n  日\nb")

    assert len(token_ids) == 3
    assert "".join(pieces_of(tokenizer, token_ids)) == "a\n  日\nb"


def test_flushing_twice_gives_the_rest_once() -> None:
    detokenizer = byte_level().detokenizer()
    detokenizer.add(byte_level().encode("🦑")[0])

    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_special_tokens_are_recognised_in_text_and_skipped_on_demand() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode(f"{BOS_TOKEN}tree{EOS_TOKEN}")

    assert (token_ids[0], token_ids[-1]) == (1, 2)
    assert tokenizer.decode(token_ids) == "tree"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == f"{BOS_TOKEN}tree{EOS_TOKEN}"


def test_half_a_surrogate_pair_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"no valid Unicode.*position 1"):
        byte_level().encode("a\ud83d")


def test_truncation_and_padding_saved_with_a_tokenizer_are_switched_off() -> None:
    plain = tiny_tokenizer()
    plain.backend_tokenizer.enable_truncation(max_length=3)
    plain.backend_tokenizer.enable_padding(length=64)
    tokenizer = Tokenizer(plain, [])
    text = "The target model verifies the tree."

    assert tokenizer.encode(text) == byte_level().encode(text)


def test_several_threads_may_encode_at_once() -> None:
    tokenizer = byte_level()
    texts = [f"draft tree number {number} 🦑" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(tokenizer.encode, texts))

    assert encoded == [tokenizer.encode(text) for text in texts]


def test_the_vocabulary_counts_added_tokens() -> None:
    plain = tiny_tokenizer()
    plain.add_tokens(["<one>", "<two>"])

    assert byte_level().vocab_size == VOCAB_SIZE
    assert Tokenizer(plain, []).vocab_size == VOCAB_SIZE + 2


def test_a_conversation_is_tokenized_as_its_template_writes_it() -> None:
    tokenizer = byte_level()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ça va? 🦑"},
    ]
    text = f"{BOS_TOKEN}system: Be brief.{EOS_TOKEN}user: Ça va? 🦑{EOS_TOKEN}"

    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(f"{text}assistant: ")
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == tokenizer.encode(
        text
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "oracle", "content": "Hi"}, "unknown role oracle"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, "only concatenate str"),
        ({"role": "user"}, "content"),
    ],
)
def test_messages_that_the_template_refuses_are_the_clients_error(
    message: dict[str, object], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        byte_level().apply_chat_template([message])

    assert caught.value.param == "messages"


def test_a_model_without_a_chat_template_refuses_conversations() -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None

    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        Tokenizer(plain, []).apply_chat_template([{"role": "user", "content": "Hi"}])

    assert caught.value.param == "messages"
