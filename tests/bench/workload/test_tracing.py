import pytest

from bench.workload.tracing import (
    NO_STEPS,
    StepCount,
    Trace,
    count_steps,
    make_trace,
    run_requests,
)
from server.config import SamplingParams, SpeculationParams
from server.core.completion import StepSpan
from server.core.request import FinishReason, Request, RequestOutput, RequestStats
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from tests.bench import traces

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def output(
    token_ids: tuple[int, ...], is_verify_step: bool, reason: FinishReason | None = None
) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        token_ids=token_ids,
        depths=(0,) * len(token_ids),
        text="".join(map(str, token_ids)),
        token_texts=tuple(map(str, token_ids)),
        logprobs=None,
        is_verify_step=is_verify_step,
        finish_reason=reason,
        stats=None if reason is None else RequestStats(),
    )


def test_the_prefills_token_belongs_to_no_verify_step() -> None:
    trace = make_trace(
        Request("r", (7, 8)),
        [output((1,), False), output((2, 3), True), output((4,), True, "length")],
    )
    assert trace.token_ids == (1, 2, 3, 4)
    assert trace.steps == (StepSpan(1, 2), StepSpan(3, 1))
    assert (trace.text, trace.finish_reason) == ("1234", "length")


def test_a_token_that_a_recomputed_prompt_emits_belongs_to_no_verify_step() -> None:
    parts = [
        output((1,), False),
        output((2,), True),
        output((3,), False),
        output((4, 5), True, "stop"),
    ]
    trace = make_trace(Request("r", (7,)), parts)
    assert trace.steps == (StepSpan(1, 1), StepSpan(3, 2))


def test_an_output_that_has_not_ended_is_rejected() -> None:
    with pytest.raises(AssertionError, match="has not ended"):
        make_trace(Request("r", (7,)), [output((1,), False)])


def test_steps_add_up() -> None:
    trace = traces.make_trace("ab", "cdefgh", (3, 2))
    assert count_steps(trace) == StepCount(2, 5)
    assert (count_steps(trace) + NO_STEPS).mean == 2.5
    assert NO_STEPS.mean == 0.0


def test_requests_run_together_and_match_the_engines_own_counts(engine: Engine) -> None:
    requests = [Request(f"r{i}", (5 + i, 6, 7), GREEDY) for i in range(6)]
    found = run_requests(engine, requests)
    assert found.keys() == {request.request_id for request in requests}
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        trace = found[request.request_id]
        assert trace.token_ids == completion.token_ids
        assert trace.prompt_token_ids == request.prompt_token_ids
        assert len(trace.steps) == trace.stats.num_steps
        assert count_steps(trace).num_tokens == trace.stats.num_emitted_tokens
        assert len(trace.token_ids) == 1 + count_steps(trace).num_tokens


def test_plain_decoding_emits_one_token_a_step(engine: Engine) -> None:
    plain = SpeculationParams(method="none")
    trace = run_requests(engine, [Request("r", (5, 6), GREEDY, plain)])["r"]
    assert [step.num_tokens for step in trace.steps] == [1] * 19


def test_a_follow_up_is_asked_at_once(engine: Engine) -> None:
    asked: list[tuple[str, Trace]] = []

    def follow_up(request_id: str, trace: Trace) -> Request | None:
        asked.append((request_id, trace))
        if len(asked) == 3:
            return None
        return Request(f"r{len(asked)}", trace.prompt_token_ids + trace.token_ids, GREEDY)

    found = run_requests(engine, [Request("r0", (5, 6), GREEDY)], follow_up)
    assert list(found) == ["r0", "r1", "r2"]
    assert [len(trace.prompt_token_ids) for trace in found.values()] == [2, 22, 42]


def test_a_request_that_can_never_run_is_rejected(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError):
        run_requests(engine, [Request("r", ())])
    assert not engine.has_unfinished
