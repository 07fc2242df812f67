import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.api.token_texts import TokenTexts
from server.tokenizer import Tokenizer
from tests.support.tiny_models import EOS_TOKEN, tiny_tokenizer


@pytest.fixture
def byte_level() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), [2])


@pytest.fixture
def with_word_marks() -> Tokenizer:
    """Its decoder drops the space at the beginning of a text, as Llama 2's does."""
    vocabulary = {"<unk>": 0, "\N{LOWER ONE EIGHTH BLOCK}go": 1, "ing": 2}
    rust = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust), [0])


def test_the_texts_of_a_words_tokens_make_the_word(byte_level: Tokenizer) -> None:
    texts = TokenTexts(byte_level)
    text = "A draft tree, verified at once."
    assert "".join(texts.text(token_id) for token_id in byte_level.encode(text)) == text


def test_special_tokens_are_written_out(byte_level: Tokenizer) -> None:
    assert TokenTexts(byte_level).text(2) == EOS_TOKEN
    assert TokenTexts(byte_level).utf8(2) == list(EOS_TOKEN.encode())


def test_a_part_of_a_character_has_no_utf8(byte_level: Tokenizer) -> None:
    texts = TokenTexts(byte_level)
    parts = byte_level.encode("\N{OCTOPUS}")
    assert len(parts) > 1
    assert all("\N{REPLACEMENT CHARACTER}" in texts.text(part) for part in parts)
    assert [texts.utf8(part) for part in parts] == [None] * len(parts)


def test_every_token_has_a_text_that_its_utf8_spells(byte_level: Tokenizer) -> None:
    texts = TokenTexts(byte_level)
    for token_id in range(byte_level.vocab_size):
        utf8 = texts.utf8(token_id)
        assert utf8 is None or bytes(utf8).decode() == texts.text(token_id)


def test_a_leading_space_is_kept_where_the_decoder_drops_it(with_word_marks: Tokenizer) -> None:
    texts = TokenTexts(with_word_marks)
    assert with_word_marks.decode([1]) == "go"
    assert texts.text(1) == " go"
    assert texts.text(2) == "ing"
