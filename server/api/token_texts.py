"""How a single token is written in log-probabilities, apart from the text around it."""

from server.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """Texts of single tokens, remembered; at most one entry per token of the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """A token's text with its leading space; U+FFFD stands for incomplete characters."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode(token_id)
        return text

    def utf8(self, token_id: int) -> list[int] | None:
        """UTF-8 of the text, or None if the token holds only part of a character."""
        text = self.text(token_id)
        return None if _REPLACEMENT in text else list(text.encode())

    def _decode(self, token_id: int) -> str:
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if _REPLACEMENT in alone:
            return alone
        # NOTE: Some tokenizers drop the space at the beginning of a text; the second one keeps it.
        twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return twice.removeprefix(alone)
