"""Turns committed tokens into text, looks for stop strings, and says what the client sees.

Tokens behind a stop string are dropped here, before anything is counted.
"""

from dataclasses import dataclass

from server.core.request import FinishReason, RequestOutput
from server.core.sequence import Sequence
from server.core.step import Outcome


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens that a step adds to a sequence's text.

    Attributes:
        token_ids: Accepted draft tokens, then the bonus token, up to the end of the text.
        depths: Their depths in the draft tree; 0 for the bonus token.
        texts: Each token's own piece of text.
        finish_reason: Why the text ends here, or None.
    """

    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    texts: tuple[str, ...]
    finish_reason: FinishReason | None


def emit(outcome: Outcome) -> Emission:
    """Add the tokens of a verified entry to the text until a stop string is complete, and count."""
    entry = outcome.entry
    sequence = entry.sequence
    texts: list[str] = []
    for token_id in outcome.token_ids:
        # A token that ends the text is the last one, and no part of it.
        texts.append("" if token_id in sequence.end_ids else sequence.text.add(token_id))
        if sequence.text.is_stopped:
            break
    reason: FinishReason | None = outcome.finish_reason
    if sequence.text.is_stopped:
        reason = "stop"
        _cut(sequence, len(outcome.token_ids) - len(texts))
    depths = outcome.depths[: len(texts)]
    if entry.is_decoding:
        sequence.counters.count_step(entry.drafts.tree.num_nodes - 1, depths)
        if sequence.request.prediction_token_ids:
            num_accepted = sum(depth > 0 for depth in depths)
            sequence.counters.count_prediction(entry.drafts, outcome.path[1 : 1 + num_accepted])
    if reason is not None:
        sequence.text.finish()
        if sequence.text.is_stopped:
            reason = "stop"
    return Emission(outcome.token_ids[: len(texts)], depths, tuple(texts), reason)


def _cut(sequence: Sequence, num_tokens: int) -> None:
    """Take committed tokens back that came behind a stop string."""
    if num_tokens:
        del sequence.token_ids[-num_tokens:]
        num_computed = min(sequence.num_computed_tokens, len(sequence.token_ids) - 1)
        sequence.num_computed_tokens = num_computed


def request_output(outcome: Outcome, emission: Emission) -> RequestOutput:
    """What the client gets of a step; the last step's has the request's counts."""
    sequence = outcome.entry.sequence
    logprobs = outcome.landed.logprobs
    return RequestOutput(
        request_id=sequence.request.request_id,
        token_ids=emission.token_ids,
        depths=emission.depths,
        text=sequence.text.take(),
        token_texts=emission.texts,
        logprobs=None if logprobs is None else logprobs[: len(emission.token_ids)],
        is_verify_step=outcome.entry.is_decoding,
        finish_reason=emission.finish_reason,
        stats=None if emission.finish_reason is None else sequence.stats(),
    )
