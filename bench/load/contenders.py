"""Contenders: ways to answer a turn greedily, one request at a time, on a clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.measure.reference import ReferenceModel
from bench.measure.timing import Timing, time_request
from bench.workload.dialogues import Turn
from server.config import SamplingParams, SpeculationParams
from server.engine.engine import Engine

_WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's answer to one turn.

    Attributes:
        num_steps: Decode steps after the prefill.
        text: The answer, which is the next turn's context; '' where it is not needed.
    """

    timing: Timing
    token_ids: tuple[int, ...]
    num_steps: int
    text: str = ""


# Answers a turn in at most so many tokens.
Contender = Callable[[Turn, int], Run]


@dataclass(frozen=True, slots=True)
class Race:
    """All contenders' answers to one turn.

    Attributes:
        category: The conversation's.
        runs: Answer by contender, in the order in which the contenders were given.
    """

    category: str
    runs: Mapping[str, Run]


def warm_up(contenders: Mapping[str, Contender], turn: Turn, max_new_tokens: int) -> None:
    """Let every contender answer briefly, so that the first race pays for no first use."""
    for contender in contenders.values():
        contender(turn, min(_WARMUP_TOKENS, max_new_tokens))


def race_turn(
    contenders: Mapping[str, Contender], turn: Turn, max_new_tokens: int, number: int
) -> Race:
    """Let all contenders answer a turn one after the other.

    Args:
        contenders: At least one.
        turn: What they answer.
        max_new_tokens: Longest answer.
        number: Races before this one; with each race the next contender begins.
    """
    names = list(contenders)
    first = number % len(names)
    runs = {name: contenders[name](turn, max_new_tokens) for name in names[first:] + names[:first]}
    return Race(turn.conversation.category, {name: runs[name] for name in names})


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
