import pytest

from server.api.usage import usage_of
from server.core.request import RequestOutput, SpecDecodeStats


def last_output(
    num_prompt: int, num_cached: int, num_output: int, stats: SpecDecodeStats
) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        token_ids=(1,),
        depths=(0,),
        text="a",
        token_texts=("a",),
        logprobs=None,
        finish_reason="stop",
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        num_output_tokens=num_output,
        stats=stats,
    )


PLAIN = SpecDecodeStats()


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    outputs = [
        last_output(10, 0, 3, PLAIN),
        last_output(10, 8, 4, PLAIN),
        last_output(20, 16, 5, PLAIN),
        last_output(20, 16, 6, PLAIN),
    ]
    usage = usage_of(outputs, num_choices=2)
    assert usage.prompt_tokens == 30
    assert usage.prompt_tokens_details.cached_tokens == 16
    assert usage.completion_tokens == 18
    assert usage.total_tokens == 48


def test_speculation_is_summed_over_the_choices() -> None:
    first = SpecDecodeStats("medusa", "exact", 4, 40, 5, 9, (3, 2))
    second = SpecDecodeStats("medusa", "exact", 6, 60, 1, 7, (1,))
    speculation = usage_of(
        [last_output(5, 0, 10, first), last_output(5, 0, 8, second)], num_choices=2
    ).speculation
    assert (speculation.method, speculation.acceptance) == ("medusa", "exact")
    assert speculation.num_steps == 10
    assert speculation.num_draft_tokens == 100
    assert speculation.num_accepted_tokens == 6
    assert speculation.mean_acceptance_length == pytest.approx(1.6)
    assert speculation.accepted_per_depth == [4, 2]


def test_prediction_tokens_are_summed_over_the_choices() -> None:
    stats = [
        SpecDecodeStats(num_accepted_prediction_tokens=4, num_rejected_prediction_tokens=1),
        SpecDecodeStats(num_accepted_prediction_tokens=3),
    ]
    details = usage_of(
        [last_output(5, 0, 10, entry) for entry in stats], num_choices=2
    ).completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (7, 1)


def test_a_request_without_verify_steps_has_no_acceptance() -> None:
    speculation = usage_of([last_output(5, 0, 1, PLAIN)], num_choices=1).speculation
    assert speculation.mean_acceptance_length == 0.0
    assert speculation.accepted_per_depth == []
