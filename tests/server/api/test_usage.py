import pytest

from server.api.usage import usage_of
from server.core.request import RequestStats


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    stats = [
        RequestStats(10, 0, 3),
        RequestStats(10, 8, 4),
        RequestStats(20, 16, 5),
        RequestStats(20, 16, 6),
    ]
    usage = usage_of(stats, num_choices=2)
    assert usage.prompt_tokens == 30
    assert usage.prompt_tokens_details.cached_tokens == 16
    assert usage.completion_tokens == 18
    assert usage.total_tokens == 48


def test_speculation_is_summed_over_the_choices() -> None:
    first = RequestStats(5, 0, 10, "medusa", "exact", 4, 40, 5, 9, (3, 2))
    second = RequestStats(5, 0, 8, "medusa", "exact", 6, 60, 1, 7, (1,))
    speculation = usage_of([first, second], num_choices=2).speculation
    assert (speculation.method, speculation.acceptance) == ("medusa", "exact")
    assert speculation.num_steps == 10
    assert speculation.num_draft_tokens == 100
    assert speculation.num_accepted_tokens == 6
    assert speculation.mean_acceptance_length == pytest.approx(1.6)
    assert speculation.accepted_per_depth == [4, 2]


def test_prediction_tokens_are_summed_over_the_choices() -> None:
    stats = [
        RequestStats(num_accepted_prediction_tokens=4, num_rejected_prediction_tokens=1),
        RequestStats(num_accepted_prediction_tokens=3),
    ]
    details = usage_of(stats, num_choices=2).completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (7, 1)


def test_a_request_without_verify_steps_has_no_acceptance() -> None:
    speculation = usage_of([RequestStats(5, 0, 1)], num_choices=1).speculation
    assert speculation.mean_acceptance_length == 0.0
    assert speculation.accepted_per_depth == []
