"""Runs requests through the engine and keeps which tokens each verify step emitted.

A *verify step* of a request is an engine step that verified a draft tree (the one-node tree of
plain decoding included) below its last token. The step that ends the prompt emits the first token
and is none.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.core.completion import StepSpan, join_outputs
from server.core.request import FinishReason, Request, RequestOutput, RequestStats
from server.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Trace:
    """One request's whole output.

    Attributes:
        token_ids: A token that ends the text is included.
        steps: Verify steps in order.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stats: RequestStats
    steps: tuple[StepSpan, ...]


FollowUp = Callable[[str, Trace], Request | None]


def no_follow_up(request_id: str, trace: Trace) -> None:
    """Let the next request not depend on this one."""


def run_requests(
    engine: Engine, requests: Iterable[Request], follow_up: FollowUp = no_follow_up
) -> dict[str, Trace]:
    """Run requests to their end, as many at once as the engine takes.

    Args:
        engine: Idle before and after.
        requests: With distinct ids.
        follow_up: Called with every ended request's id and trace; a request it returns is queued.

    Raises:
        InvalidRequestError: If the engine can never run one of `requests`.
    """
    pending: dict[str, tuple[Request, list[RequestOutput]]] = {}

    def submit(request: Request) -> None:
        engine.add_request(request)
        pending[request.request_id] = (request, [])

    for request in requests:
        submit(request)
    traces: dict[str, Trace] = {}
    while engine.has_unfinished:
        for output in engine.step():
            request, outputs = pending[output.request_id]
            outputs.append(output)
            if output.finish_reason is None:
                continue
            del pending[output.request_id]
            trace = traces[output.request_id] = make_trace(request, outputs)
            following = follow_up(output.request_id, trace)
            if following is not None:
                submit(following)
    return traces


def make_trace(request: Request, outputs: list[RequestOutput]) -> Trace:
    """Join a request's outputs, the last of which has a finish reason."""
    completion = join_outputs(outputs)
    return Trace(
        prompt_token_ids=request.prompt_token_ids,
        token_ids=completion.token_ids,
        text=completion.text,
        finish_reason=completion.finish_reason,
        stats=completion.stats,
        steps=completion.steps,
    )


@dataclass(frozen=True, slots=True)
class StepCount:
    """Verify steps and the tokens that they emitted."""

    num_steps: int
    num_tokens: int

    def __add__(self, other: "StepCount") -> "StepCount":
        return StepCount(self.num_steps + other.num_steps, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> float:
        """Tokens per verify step; 0.0 without steps."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0


NO_STEPS = StepCount(0, 0)


def count_steps(trace: Trace) -> StepCount:
    """All verify steps of an output."""
    return StepCount(len(trace.steps), sum(step.num_tokens for step in trace.steps))
