"""Counts a response's tokens and what speculation did for them."""

from collections.abc import Sequence

from server.api.schemas.usage import (
    CompletionTokensDetails,
    PromptTokensDetails,
    SpeculationUsage,
    Usage,
)
from server.core.request import RequestOutput, SpecDecodeStats


def usage_of(last_outputs: Sequence[RequestOutput], num_choices: int) -> Usage:
    """Count a response's tokens.

    Args:
        last_outputs: The last output of each choice, in order of index.
        num_choices: Choices per prompt; they share its tokens, and the first one tells how many
            of them were cached.
    """
    per_prompt = last_outputs[::num_choices]
    prompt_tokens = sum(output.num_prompt_tokens for output in per_prompt)
    completion_tokens = sum(output.num_output_tokens for output in last_outputs)
    stats = [output.stats for output in last_outputs]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(output.num_cached_tokens for output in per_prompt)
        ),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=sum(s.num_accepted_prediction_tokens for s in stats),
            rejected_prediction_tokens=sum(s.num_rejected_prediction_tokens for s in stats),
        ),
        speculation=_speculation_usage(stats),
    )


def _speculation_usage(stats: Sequence[SpecDecodeStats]) -> SpeculationUsage:
    num_depths = max(len(entry.accepted_per_depth) for entry in stats)
    accepted_per_depth = [0] * num_depths
    for entry in stats:
        for depth, count in enumerate(entry.accepted_per_depth):
            accepted_per_depth[depth] += count
    total = SpecDecodeStats(
        method=stats[0].method,
        acceptance=stats[0].acceptance,
        num_steps=sum(entry.num_steps for entry in stats),
        num_draft_tokens=sum(entry.num_draft_tokens for entry in stats),
        num_accepted_tokens=sum(entry.num_accepted_tokens for entry in stats),
        num_emitted_tokens=sum(entry.num_emitted_tokens for entry in stats),
    )
    return SpeculationUsage(
        method=total.method,
        acceptance=total.acceptance,
        num_steps=total.num_steps,
        num_draft_tokens=total.num_draft_tokens,
        num_accepted_tokens=total.num_accepted_tokens,
        mean_acceptance_length=total.mean_acceptance_length,
        accepted_per_depth=accepted_per_depth,
    )
