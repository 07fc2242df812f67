"""Hand-made outputs for tests of the figures that are computed from them."""

from bench.workload.conversations import Conversation
from bench.workload.dialogues import Turn
from bench.workload.tracing import Trace
from server.core.completion import StepSpan
from server.core.request import RequestStats


def make_trace(
    prompt: str, output: str, step_lengths: tuple[int, ...], accepted: tuple[int, ...] = ()
) -> Trace:
    """One token a letter; the first one is the prefill's, the others the steps'."""
    starts = [1 + sum(step_lengths[:i]) for i in range(len(step_lengths))]
    assert 1 + sum(step_lengths) == len(output)
    return Trace(
        prompt_token_ids=tuple(map(ord, prompt)),
        token_ids=tuple(map(ord, output)),
        text=output,
        finish_reason="length",
        stats=RequestStats(
            method="medusa",
            num_steps=len(step_lengths),
            num_draft_tokens=5 * len(step_lengths),
            num_accepted_tokens=sum(accepted),
            num_emitted_tokens=sum(step_lengths),
            accepted_per_depth=accepted,
        ),
        steps=tuple(StepSpan(s, n) for s, n in zip(starts, step_lengths, strict=True)),
    )


def make_conversation(
    *turns: str, line: int = 1, category: str = "chat", system: str | None = None
) -> Conversation:
    return Conversation(line, category, turns, system)


def make_turn(prompt_token_ids: tuple[int, ...], line: int = 1, index: int = 0) -> Turn:
    return Turn(make_conversation("hello", line=line), index, prompt_token_ids)
