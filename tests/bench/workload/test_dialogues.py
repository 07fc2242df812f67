import pytest

from bench.workload.dialogues import (
    SkippedTurn,
    Turn,
    answer_again,
    answer_turns,
    make_turn,
    skip_if_too_long,
)
from server.config import SamplingParams, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from tests.bench.traces import make_conversation
from tests.support.tiny_models import BOS_TOKEN, EOS_TOKEN, MAX_MODEL_LEN

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def ask(turn: Turn) -> Request:
    return turn.request(GREEDY, SpeculationParams())


def do_nothing() -> None:
    pass


def test_a_turn_is_rendered_with_the_system_message_and_all_answers(engine: Engine) -> None:
    conversation = make_conversation("first", "second", system="rules", line=4)
    turn = make_turn(engine.tokenizer, conversation, ["answer"])
    rendered = engine.tokenizer.decode(turn.prompt_token_ids, skip_special_tokens=False)
    begin, end = BOS_TOKEN, EOS_TOKEN
    assert rendered == (
        f"{begin}system: rules{end}user: first{end}assistant: answer{end}"
        f"user: second{end}assistant: "
    )
    assert (turn.index, turn.key) == (1, "4.2")


def test_the_next_turn_contains_the_models_own_answer(engine: Engine) -> None:
    conversation = make_conversation("How are you?", "And now?", "Bye.")
    answered = answer_turns(engine, [conversation], ask, do_nothing)
    assert [turn.index for turn in answered.turns] == [0, 1, 2]
    answers = [trace.text for trace in answered.traces]
    for turn in answered.turns:
        expected = make_turn(engine.tokenizer, conversation, answers[: turn.index])
        assert turn == expected


def test_turns_come_in_file_order_with_their_traces(engine: Engine) -> None:
    conversations = [make_conversation("a", "b", line=2), make_conversation("c", line=1)]
    done: list[int] = []
    answered = answer_turns(engine, conversations, ask, lambda: done.append(1))
    assert [turn.key for turn in answered.turns] == ["1.1", "2.1", "2.2"]
    assert len(done) == 2
    for turn, trace in zip(answered.turns, answered.traces, strict=True):
        assert trace.prompt_token_ids == turn.prompt_token_ids
    assert answered.skipped == ()


def test_a_conversation_that_outgrows_the_context_is_left_out_from_there(engine: Engine) -> None:
    long = "x " * MAX_MODEL_LEN
    conversations = [make_conversation("short", long, "never", line=1)]
    conversations.append(make_conversation(long, line=2))
    done: list[int] = []
    answered = answer_turns(engine, conversations, ask, lambda: done.append(1))
    assert [turn.key for turn in answered.turns] == ["1.1"]
    assert {(skipped.line, skipped.turn) for skipped in answered.skipped} == {(1, 2), (2, 1)}
    assert all(str(MAX_MODEL_LEN) in skipped.reason for skipped in answered.skipped)
    assert len(done) == 2


def test_turns_are_answered_again_in_order(engine: Engine) -> None:
    conversations = [make_conversation("a", line=1), make_conversation("b", "c", line=2)]
    answered = answer_turns(engine, conversations, ask, do_nothing)
    done: list[int] = []
    again = answer_again(engine, answered.turns, ask, lambda: done.append(1))
    assert [trace.token_ids for trace in again] == [t.token_ids for t in answered.traces]
    assert len(done) == 3


def test_length_is_the_only_reason_to_skip(engine: Engine) -> None:
    turn = make_turn(engine.tokenizer, make_conversation("hello"), [])
    assert skip_if_too_long(engine, turn, ask(turn)) is None
    too_much = SamplingParams(max_tokens=MAX_MODEL_LEN, temperature=0.0)
    found = skip_if_too_long(engine, turn, turn.request(too_much, SpeculationParams()))
    assert isinstance(found, SkippedTurn)
    wrong = turn.request(SamplingParams(logit_bias={10**6: 1.0}), SpeculationParams())
    with pytest.raises(InvalidRequestError, match="1000000"):
        skip_if_too_long(engine, turn, wrong)
