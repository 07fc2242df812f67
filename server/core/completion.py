"""A whole generation, for callers that want it in one piece."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.core.request import FinishReason, RequestOutput, SpecDecodeStats, TokenLogprob


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole generation, as `Engine.generate` returns it."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    stats: SpecDecodeStats


def join_outputs(outputs: Sequence[RequestOutput]) -> Completion:
    """Put a request's outputs together; the last one says why it ended."""
    last = outputs[-1]
    if last.finish_reason is None:
        raise AssertionError(f"request {last.request_id!r} ended without a reason")
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(entry for output in outputs for entry in output.logprobs or ())
    return Completion(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        finish_reason=last.finish_reason,
        logprobs=logprobs,
        stats=last.stats,
    )
