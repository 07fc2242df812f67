"""Text to token ids and back, for whole texts and for one token at a time.

Wraps the Rust tokenizer below a `transformers` one and calls it directly: that is safe from
several threads at once, and it decodes without the clean-up step that changes text around
punctuation. Knows nothing of models and requests.
"""

import codecs
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequestError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most this many bytes, and a token at least one.
_MAX_HELD_TOKENS = 4


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

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be written out."""
        return bool(self._transformers.chat_template)

    @property
    def chat_template_sha256(self) -> str:
        """Checksum of the chat template; of the empty text if there is none."""
        return hashlib.sha256(str(self._transformers.chat_template or "").encode()).hexdigest()

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
        return self.encode(self.chat_text(messages, add_generation_prompt), False)

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation out as `apply_chat_template` tokenizes it.

        Raises:
            InvalidRequestError: If the model has no chat template or it refuses the messages.
        """
        if not self.has_chat_template:
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
        return str(text)

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> IncrementalDetokenizer:
        """Begin a text that continues a prompt.

        Args:
            prompt_token_ids: Without them the text is one of its own, whose first word has no
                space before it in some tokenizers. Only the last few are looked at.
        """
        if self._token_bytes is not None:
            return _ByteDetokenizer(self._token_bytes)
        return _WindowDetokenizer(self._rust, self._special_ids, prompt_token_ids)


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

        _window   [ _num_out tokens already out | tokens whose text is held back ]
        text      [ _prefix                     | what comes out next            ]

    Tokens are held back while the text ends in U+FFFD, which may be half of a character, or does
    not grow; never more than a character can have, so a window is short and a token's cost fixed.

    NOTE: A byte-fallback decoder turns a whole run of bytes into U+FFFD if any of them is
    invalid. Characters that were complete before the invalid byte came are out by then.
    """

    def __init__(
        self, rust: RustTokenizer, special_ids: frozenset[int], prompt_token_ids: Sequence[int]
    ) -> None:
        self._rust = rust
        self._special_ids = special_ids
        self._window = self._last_character(prompt_token_ids)
        self._num_out = len(self._window)
        self._prefix = rust.decode(self._window)

    def add(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._rust.decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        if len(whole) > len(self._prefix):
            return self._emit(len(self._window), len(text) - len(whole))
        if len(self._window) - self._num_out < _MAX_HELD_TOKENS:
            return ""
        if text == self._prefix:
            # NOTE: Without text they need not be kept; what is already out is the better context.
            del self._window[self._num_out :]
            return ""
        return self._emit(self._oldest_character())

    def flush(self) -> str:
        if self._rust.decode(self._window) == self._prefix:
            return ""
        return self._emit(len(self._window))

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._special_ids and self._rust.id_to_token(token_id) is not None

    def _last_character(self, token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens with text, as few as end in a whole character."""
        tail: list[int] = []
        for token_id in reversed(token_ids):
            if self._has_text(token_id):
                tail.insert(0, token_id)
                if not self._rust.decode(tail).endswith(_REPLACEMENT):
                    return tail
                if len(tail) == _MAX_HELD_TOKENS:
                    break
        return []

    def _oldest_character(self) -> int:
        """Where the held tokens part with the least text before: there no character is cut.

        Three bytes that make up a real U+FFFD have less text than the first two of them.
        """
        ends = range(len(self._window), self._num_out, -1)
        return min(ends, key=lambda end: len(self._rust.decode(self._window[:end])))

    def _emit(self, end: int, num_unfinished: int = 0) -> str:
        """Release held tokens.

        Args:
            end: Length of the window up to the last token to release.
            num_unfinished: Characters at the end of their text that are still held back.
        """
        text = self._rust.decode(self._window[:end])
        released = self._window[self._num_out : end]
        alone = self._rust.decode(released)
        piece = text[len(self._prefix) :] if text.startswith(self._prefix) else alone
        self._window = self._window[self._num_out :]
        self._num_out = len(released)
        self._prefix = alone[: len(alone) - num_unfinished]
        return piece[: len(piece) - num_unfinished]
