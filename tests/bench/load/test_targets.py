import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from bench.errors import BenchError
from bench.load.loops import Answer, Ask
from bench.load.targets import Target, engine_target, http_target
from bench.workload.dialogues import make_turn
from server.config import SamplingParams, SpeculationParams
from server.engine.engine import Engine
from tests.bench.traces import make_conversation

Opened = Callable[[Engine], AbstractAsyncContextManager[Target]]
QUESTIONS = ("How many arms?", "Why is that?", "Count them.")


def asks_for(engine: Engine) -> list[Ask]:
    turns = [make_turn(engine.tokenizer, make_conversation(text), []) for text in QUESTIONS]
    return [Ask(turn, 6 + index) for index, turn in enumerate(turns)]


def answers_of(engine: Engine, opened: Opened, speculation: SpeculationParams) -> list[Answer]:
    async def send_all() -> list[Answer]:
        async with opened(engine) as target:
            asks = asks_for(engine)
            return await asyncio.gather(*(target.answer(ask, speculation) for ask in asks))

    return asyncio.run(send_all())


@pytest.mark.parametrize("opened", [engine_target, http_target])
@pytest.mark.parametrize("method", ["auto", "none"])
def test_answers_are_those_of_the_engine(engine: Engine, opened: Opened, method: str) -> None:
    speculation = SpeculationParams(method=method)
    answers = answers_of(engine, opened, speculation)
    for ask, answer in zip(asks_for(engine), answers, strict=True):
        sampling = SamplingParams(max_tokens=ask.max_tokens, temperature=0.0)
        [expected] = engine.generate([ask.turn.request(sampling, speculation)])
        assert answer.num_output_tokens == len(expected.token_ids)
        assert answer.num_emitted_tokens == pytest.approx(answer.num_output_tokens - 1)
        assert (answer.num_draft_tokens > 0) == (method == "auto")
        assert answer.arrived_s < answer.chunks[0].at_s <= answer.ended_s
    assert not engine.has_unfinished


def test_the_engines_chunks_hold_all_tokens(engine: Engine) -> None:
    for answer in answers_of(engine, engine_target, SpeculationParams()):
        assert sum(chunk.num_tokens for chunk in answer.chunks) == answer.num_output_tokens
        assert len(answer.chunks) == 1 + answer.num_steps


def test_a_target_is_open_again_after_it_was_closed(engine: Engine) -> None:
    for opened in (http_target, engine_target, http_target):
        assert len(answers_of(engine, opened, SpeculationParams())) == len(QUESTIONS)


def test_an_error_status_is_an_error(engine: Engine) -> None:
    with pytest.raises(BenchError, match=r"answered 400: .*max_nodes"):
        answers_of(engine, http_target, _too_many_nodes())


def _too_many_nodes() -> SpeculationParams:
    params = SpeculationParams()
    object.__setattr__(params, "max_nodes", 1000)
    return params
