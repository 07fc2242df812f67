"""Log-probabilities in the two forms that OpenAI's APIs have for them."""

from collections.abc import Sequence

from server.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, TokenAlternative
from server.api.schemas.completions import CompletionLogprobs
from server.api.token_texts import TokenTexts
from server.core.request import TokenLogprob

# JSON has no infinity; OpenAI writes this for tokens that cannot occur.
_LOWEST = -9999.0


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> ChatLogprobs:
    """Write log-probabilities as chat completions have them."""
    content = []
    for entry in entries:
        token = _alternative(entry.token_id, entry.logprob, texts)
        top = [_alternative(token_id, logprob, texts) for token_id, logprob in entry.top]
        content.append(
            ChatTokenLogprob(
                token=token.token, logprob=token.logprob, bytes=token.bytes, top_logprobs=top
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    entries: Sequence[TokenLogprob],
    token_texts: Sequence[str],
    text_offset: int,
    texts: TokenTexts,
) -> CompletionLogprobs:
    """Write log-probabilities as completions have them.

    Args:
        entries: One per token.
        token_texts: Each token's piece of the choice's text.
        text_offset: Where the first token's piece begins in it.
        texts: Writes single tokens.
    """
    offsets = []
    for text in token_texts:
        offsets.append(text_offset)
        text_offset += len(text)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[_finite(entry.logprob) for entry in entries],
        tokens=[texts.text(entry.token_id) for entry in entries],
        top_logprobs=[_by_text(entry, texts) for entry in entries],
    )


def _by_text(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """The most probable tokens and the drawn one; of tokens with one text, the likelier."""
    logprobs: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        logprobs.setdefault(texts.text(token_id), _finite(logprob))
    return logprobs


def _alternative(token_id: int, logprob: float, texts: TokenTexts) -> TokenAlternative:
    return TokenAlternative(
        token=texts.text(token_id), logprob=_finite(logprob), bytes=texts.utf8(token_id)
    )


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
