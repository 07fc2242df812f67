"""Prompts of any length, none of which begins like another."""

from collections.abc import Sequence
from itertools import count, cycle

from server.tokenizer import Tokenizer


class LongPrompts:
    """Long prompts out of short texts, each with a beginning of its own.

    Args:
        tokenizer: Cuts the prompts.
        texts: At least one, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._numbers = count(1)

    def token_ids(self, num_tokens: int) -> tuple[int, ...]:
        """The next prompt: its number, then the texts in turn, beginning with another each time."""
        number = next(self._numbers)
        start = number % len(self._texts)
        token_ids: list[int] = []
        for text in cycle((*self._texts[start:], *self._texts[:start])):
            heading = "" if token_ids else f"{number}. "
            token_ids += self._tokenizer.encode(f"{heading}{text}\n\n", add_special_tokens=False)
            if len(token_ids) >= num_tokens:
                break
        return tuple(token_ids[:num_tokens])

    def text(self, num_tokens: int) -> str:
        """The next prompt as text."""
        return self._tokenizer.decode(self.token_ids(num_tokens))
