"""Contenders: ways to answer a turn greedily, one request at a time, on a clock."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.measure.reference import ReferenceModel
from bench.measure.timing import Timing, time_request
from bench.workload.dialogues import Turn
from server.config import SamplingParams, SpeculationParams
from server.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's answer to one turn.

    Attributes:
        num_steps: Decode steps behind the prefill.
        text: The answer, which is the next turn's context; '' where it is not needed.
    """

    timing: Timing
    token_ids: tuple[int, ...]
    num_steps: int
    text: str = ""


Contender = Callable[[Turn, int], Run]


def engine_contender(engine: Engine, speculation: SpeculationParams) -> Contender:
    """The engine, one request at a time."""

    def answer(turn: Turn, max_new_tokens: int) -> Run:
        sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
        timing, trace = time_request(engine, turn.request(sampling, speculation))
        return Run(timing, trace.token_ids, len(trace.steps), trace.text)

    return answer


def reference_contender(
    reference: ReferenceModel, num_lookup_tokens: int | None = None
) -> Contender:
    """Transformers' generate: every token after the first is counted as one step."""

    def answer(turn: Turn, max_new_tokens: int) -> Run:
        timing, token_ids = reference.generate(
            turn.prompt_token_ids, max_new_tokens, num_lookup_tokens
        )
        return Run(timing, token_ids, timing.num_decode_tokens)

    return answer
