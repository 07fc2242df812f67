"""Two turns of a conversation, the second of which begins with what the first one computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.measure.timing import time_request
from bench.workload.conversations import Conversation
from bench.workload.dialogues import make_turn
from server.config import SamplingParams, SpeculationParams
from server.engine.engine import Engine

# Of the second turn only the first token is of interest.
FOLLOW_UP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class PromptTime:
    """Time to the first token of a prompt of so many tokens, of which some came from the cache."""

    num_prompt_tokens: int
    num_cached_tokens: int
    ttft_ms: float

    @property
    def ms_per_token(self) -> float:
        """Time to the first token per token of the prompt."""
        return self.ttft_ms / self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Reuse:
    """Both turns of a conversation."""

    first: PromptTime
    second: PromptTime

    @property
    def ratio(self) -> float:
        """Second by first turn, of the time to the first token per token of the prompt."""
        return self.second.ms_per_token / self.first.ms_per_token


def measure_reuse(
    engine: Engine,
    conversation: Conversation,
    sampling: SamplingParams,
    speculation: SpeculationParams,
) -> Reuse:
    """Answer both turns of a conversation on an idle engine."""
    first, answer = _time_turn(engine, conversation, [], sampling, speculation)
    short = replace(sampling, max_tokens=min(FOLLOW_UP_TOKENS, sampling.max_tokens))
    second, _ = _time_turn(engine, conversation, [answer], short, speculation)
    return Reuse(first, second)


def _time_turn(
    engine: Engine,
    conversation: Conversation,
    answers: Sequence[str],
    sampling: SamplingParams,
    speculation: SpeculationParams,
) -> tuple[PromptTime, str]:
    turn = make_turn(engine.tokenizer, conversation, answers)
    before = engine.counters.num_cached_tokens
    timing, trace = time_request(engine, turn.request(sampling, speculation))
    num_cached = engine.counters.num_cached_tokens - before
    num_prompt = len(turn.prompt_token_ids)
    return PromptTime(num_prompt, num_cached, timing.first_token_s * 1e3), trace.text
