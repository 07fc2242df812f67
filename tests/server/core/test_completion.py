"""A request's outputs, joined."""

import pytest

from server.core.completion import StepSpan, join_outputs
from server.core.request import FinishReason, RequestOutput, RequestStats, TokenLogprob

STATS = RequestStats(num_prompt_tokens=2, num_output_tokens=4)


def output(
    token_ids: tuple[int, ...],
    is_verify_step: bool = True,
    reason: FinishReason | None = None,
    has_logprobs: bool = False,
) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        token_ids=token_ids,
        depths=(0,) * len(token_ids),
        text="".join(map(str, token_ids)),
        token_texts=tuple(map(str, token_ids)),
        logprobs=tuple(TokenLogprob(t, -1.0, ()) for t in token_ids) if has_logprobs else None,
        is_verify_step=is_verify_step,
        finish_reason=reason,
        stats=STATS if reason else None,
    )


def test_has_all_that_the_outputs_brought() -> None:
    completion = join_outputs([output((1,), False), output((2, 3)), output((4,), reason="length")])
    assert completion.token_ids == (1, 2, 3, 4)
    assert completion.text == "1234"
    assert completion.token_texts == ("1", "2", "3", "4")
    assert completion.finish_reason == "length"
    assert completion.stats is STATS
    assert completion.logprobs is None


def test_log_probabilities_are_joined_if_there_are_any() -> None:
    outputs = [output((1,), has_logprobs=True), output((2, 3), True, "stop", has_logprobs=True)]
    logprobs = join_outputs(outputs).logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs] == [1, 2, 3]


def test_the_token_of_a_prompt_belongs_to_no_verify_step() -> None:
    outputs = [output((1,), False), output((2, 3)), output((4,), reason="stop")]
    assert join_outputs(outputs).steps == (StepSpan(1, 2), StepSpan(3, 1))


def test_nor_does_that_of_a_prompt_that_is_computed_again() -> None:
    outputs = [output((1,), False), output((2,)), output((3,), False), output((4, 5), True, "stop")]
    assert join_outputs(outputs).steps == (StepSpan(1, 1), StepSpan(3, 2))


def test_an_output_that_has_not_ended_is_refused() -> None:
    with pytest.raises(AssertionError, match="has not ended"):
        join_outputs([output((1,), False)])
