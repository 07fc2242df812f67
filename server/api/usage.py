"""Counts a response's tokens and what speculation did for them."""

from collections.abc import Sequence
from itertools import zip_longest

from server.api.schemas.usage import (
    CompletionTokensDetails,
    PromptTokensDetails,
    SpeculationUsage,
    Usage,
)
from server.core.request import RequestStats


def usage_of(stats: Sequence[RequestStats], num_choices: int) -> Usage:
    """Count a response's tokens.

    Args:
        stats: Counts of each choice, in order of index.
        num_choices: Choices per prompt; they share its tokens, and the first one says how many of
            them were cached.
    """
    per_prompt = stats[::num_choices]
    prompt_tokens = sum(entry.num_prompt_tokens for entry in per_prompt)
    completion_tokens = sum(entry.num_output_tokens for entry in stats)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(entry.num_cached_tokens for entry in per_prompt)
        ),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=sum(s.num_accepted_prediction_tokens for s in stats),
            rejected_prediction_tokens=sum(s.num_rejected_prediction_tokens for s in stats),
        ),
        speculation=_speculation_usage(stats),
    )


def _speculation_usage(stats: Sequence[RequestStats]) -> SpeculationUsage:
    num_steps = sum(entry.num_steps for entry in stats)
    num_emitted_tokens = sum(entry.num_emitted_tokens for entry in stats)
    by_depth = zip_longest(*(entry.accepted_per_depth for entry in stats), fillvalue=0)
    return SpeculationUsage(
        method=stats[0].method,
        acceptance=stats[0].acceptance,
        num_steps=num_steps,
        num_draft_tokens=sum(entry.num_draft_tokens for entry in stats),
        num_accepted_tokens=sum(entry.num_accepted_tokens for entry in stats),
        mean_acceptance_length=num_emitted_tokens / num_steps if num_steps else 0.0,
        accepted_per_depth=[sum(counts) for counts in by_depth],
    )
