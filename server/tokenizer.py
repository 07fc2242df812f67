"""Text to token ids and back, for whole texts and for one token at a time.

Wraps the Rust tokenizer below a `transformers` one and calls it directly: that is safe from
several threads at once, and it decodes without the clean-up step that changes text around
punctuation. Knows nothing of models and requests.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequestError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer(Protocol):
    """Decodes a growing list of tokens; what it returned so far is never revised."""

    def add(self, token_id: int) -> str:
        """Append a token.

        Returns:
            The text that became complete; '' while a character is incomplete, and for special
            tokens and ids without a token.
        """

    def flush(self) -> str:
        """End the text.

        Returns:
            What is left; an incomplete character becomes U+FFFD.
        """


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        eos_token_ids: Tokens that end a text.
        vocab_size: Token ids are below it; the model's embedding may have more rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_token_ids: Iterable[int]) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)
        self._transformers = tokenizer
        self._rust: RustTokenizer = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self.vocab_size = 1 + max(self._rust.get_vocab(with_added_tokens=True).values())
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._rust.get_added_tokens_decoder().items()
            if token.special
        )
        self._token_bytes: _TokenBytes | None = None
        if isinstance(self._rust.decoder, ByteLevel):
            self._token_bytes = _TokenBytes(self._rust, self._special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a text; special tokens that are written out in it are recognised.

        Raises:
            InvalidRequestError: If the text holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is no valid Unicode: {error}; send whole surrogate pairs"
            ) from error
        return self._rust.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn tokens into text; incomplete characters become U+FFFD, unknown ids nothing."""
        return self._rust.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Tokenize a conversation as the model was trained to see it.

        Args:
            messages: What the template expects, mostly mappings with `role` and `content`.
            add_generation_prompt: End with the beginning of an assistant's turn.

        Raises:
            InvalidRequestError: If the model has no chat template or it refuses the messages.
        """
        if not self._transformers.chat_template:
            raise InvalidRequestError(
                "the model has no chat template; send a plain prompt to /v1/completions",
                param="messages",
            )
        try:
            text = self._transformers.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {error}; change their roles, "
                "order or content",
                param="messages",
            ) from error
        return self.encode(str(text), add_special_tokens=False)

    def detokenizer(self) -> IncrementalDetokenizer:
        """Begin a new text."""
        if self._token_bytes is not None:
            return _ByteDetokenizer(self._token_bytes)
        return _WindowDetokenizer(self._rust, self._special_ids)


class _TokenBytes:
    """The bytes that tokens of a byte-level tokenizer stand for, looked up once each."""

    def __init__(self, rust: RustTokenizer, special_ids: frozenset[int]) -> None:
        self._rust = rust
        self._byte_of_char = _byte_level_alphabet()
        self._bytes = dict.fromkeys(special_ids, b"")

    def of(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> bytes:
        token = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        # An added token may hold characters outside the byte alphabet; such a one means itself.
        if any(char not in self._byte_of_char for char in token):
            return token.encode()
        return bytes(self._byte_of_char[char] for char in token)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping: printable Latin-1 bytes mean themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


class _ByteDetokenizer:
    """For byte-level tokenizers, whose text is the concatenation of their tokens' bytes."""

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes.of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For all other tokenizers: decodes the newest tokens with and without those before them.

    A token's text may depend on its neighbours (a space that is dropped at the beginning, bytes
    that make up a character), so every decoded window starts with tokens that are already out:

        _window   [ tokens already out | tokens whose text is held back ]
        text      [ _prefix            | what comes out next            ]

    NOTE: A byte-fallback decoder turns a whole run of bytes into U+FFFD if any of them is
    invalid. Characters that were complete before the invalid byte came are out by then.
    """

    def __init__(self, rust: RustTokenizer, special_ids: frozenset[int]) -> None:
        self._rust = rust
        self._special_ids = special_ids
        self._window: list[int] = []
        self._num_out = 0
        self._prefix = ""

    def add(self, token_id: int) -> str:
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._rust.decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._prefix):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        if self._num_out == len(self._window):
            return ""
        return self._emit(self._rust.decode(self._window))

    def _emit(self, text: str) -> str:
        held = self._window[self._num_out :]
        if text.startswith(self._prefix):
            piece = text[len(self._prefix) :]
        else:
            piece = self._rust.decode(held)
        self._window = held
        self._num_out = len(held)
        self._prefix = self._rust.decode(held)
        return piece
