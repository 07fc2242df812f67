"""A whole generation, for callers that want it in one piece."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.core.request import FinishReason, RequestOutput, RequestStats, TokenLogprob


@dataclass(frozen=True, slots=True)
class StepSpan:
    """Tokens that one verify step emitted: `num_tokens` from index `start` of the output."""

    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A request's outputs, joined.

    Attributes:
        token_ids: All tokens; one that ends the text is included.
        text: The whole text.
        token_texts: Each token's own piece of the text, as `RequestOutput` has it.
        logprobs: One entry per token if the request asked for them, else None.
        finish_reason: Why the request ended.
        stats: The request's counts.
        steps: Verify steps in order; tokens outside them ended a prompt, or one that was computed
            again after a preemption.
    """

    token_ids: tuple[int, ...]
    text: str
    token_texts: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stats: RequestStats
    steps: tuple[StepSpan, ...]


def join_outputs(outputs: Sequence[RequestOutput]) -> Completion:
    """Join all outputs of a request that has ended; in order."""
    last = outputs[-1]
    if last.finish_reason is None or last.stats is None:
        raise AssertionError(f"request {last.request_id!r} has not ended")
    token_ids: list[int] = []
    steps: list[StepSpan] = []
    for output in outputs:
        if output.is_verify_step:
            steps.append(StepSpan(len(token_ids), len(output.token_ids)))
        token_ids += output.token_ids
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(entry for output in outputs for entry in output.logprobs or ())
    return Completion(
        token_ids=tuple(token_ids),
        text="".join(output.text for output in outputs),
        token_texts=tuple(text for output in outputs for text in output.token_texts),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stats=last.stats,
        steps=tuple(steps),
    )
