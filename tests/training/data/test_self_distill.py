from collections.abc import Iterable

import pytest
from safetensors.torch import load_file, save_file

from server.config import EngineConfig
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from tests.support.engine_tools import SlowModel, make_engine, make_request
from tests.support.tiny_models import save_tiny_model
from training.data.distilled import DistilledConversation, Sampling
from training.data.prompts import Prompts
from training.data.self_distill import MIN_REPEATED_TOKENS, SelfDistiller

pytestmark = pytest.mark.slow

SHORT = Sampling(max_new_tokens=6, stop_repeats=False)


def prompts(count: int, num_turns: int = 1) -> list[Prompts]:
    turns = ("How many?", "And then?", "Why?")
    return [
        Prompts(f"p{i}", "x", tuple(f"{t} {i}" for t in turns[:num_turns])) for i in range(count)
    ]


def distill(
    asked: Iterable[Prompts],
    sampling: Sampling = SHORT,
    max_in_flight: int = 8,
    engine: Engine | None = None,
) -> dict[str, DistilledConversation]:
    engine = engine or make_engine(heads="none")
    distiller = SelfDistiller(engine, sampling, max_in_flight=max_in_flight)
    found = list(distiller.run(asked, lambda _: None))
    assert not engine.has_unfinished
    assert engine.blocks.num_in_use == 0
    return {conversation.id: conversation for conversation in found}


def test_answers_are_those_of_the_model_one_turn_after_the_other() -> None:
    slow, engine = SlowModel(), make_engine(heads="none")
    for conversation in distill(prompts(3, num_turns=2), engine=engine).values():
        messages: list[dict[str, str]] = []
        assert len(conversation.turns) == 2
        for question, turn in zip(conversation.user_turns, conversation.turns, strict=True):
            messages.append({"role": "user", "content": question})
            prompt = engine.tokenizer.apply_chat_template(messages)
            assert list(turn.prompt_token_ids) == prompt
            expected = slow.complete(make_request(prompt, max_tokens=6))
            assert (turn.token_ids, turn.text) == (expected.token_ids, expected.text)
            assert turn.finish_reason == expected.finish_reason
            messages.append({"role": "assistant", "content": turn.text})


def test_a_system_message_opens_every_prompt() -> None:
    engine = make_engine(heads="none")
    asked = Prompts("s", "", ("How many?",), system="Be brief.")
    turn = distill([asked], engine=engine)["s"].turns[0]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
    ]
    assert list(turn.prompt_token_ids) == engine.tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_do_not_depend_on_what_else_runs(temperature: float) -> None:
    sampling = Sampling(max_new_tokens=6, temperatures=(temperature,), stop_repeats=False)
    together = distill(prompts(5, num_turns=2), sampling, max_in_flight=5)
    alone = distill(reversed(prompts(5, num_turns=2)), sampling, max_in_flight=1)
    assert together == alone


def test_sampled_answers_differ_by_seed_and_by_conversation() -> None:
    asked = [Prompts("a", "", ("Why?",)), Prompts("b", "", ("Why?",))]
    found = distill(asked, Sampling(max_new_tokens=12, temperatures=(1.5,)))
    other = distill(asked, Sampling(max_new_tokens=12, temperatures=(1.5,), seed=1))
    texts = {c.turns[0].token_ids for c in (*found.values(), *other.values())}
    assert len(texts) == 4


def test_drafts_change_no_answer() -> None:
    plain = distill(prompts(4))
    engine = make_engine()
    distiller = SelfDistiller(engine, SHORT, method="medusa", max_in_flight=4)
    drafted = {c.id: c for c in distiller.run(prompts(4), lambda _: None)}
    assert engine.counters.num_draft_tokens > 0
    assert drafted == plain


def test_at_most_so_many_conversations_are_in_flight() -> None:
    started = []

    def counted() -> Iterable[Prompts]:
        for item in prompts(7):
            started.append(item.id)
            yield item

    distiller = SelfDistiller(make_engine(heads="none"), SHORT, max_in_flight=3)
    for num_finished, _ in enumerate(distiller.run(counted(), lambda _: None)):
        assert len(started) - num_finished <= 3
    assert len(started) == 7


def test_every_token_is_counted() -> None:
    counts: list[int] = []
    distiller = SelfDistiller(make_engine(heads="none"), SHORT)
    found = list(distiller.run(prompts(3, num_turns=2), counts.append))
    assert sum(counts) == sum(conversation.num_tokens for conversation in found)


def test_a_prompt_that_does_not_fit_leaves_a_conversation_without_turns() -> None:
    asked = [Prompts("huge", "", ("word " * 400,)), *prompts(1)]
    found = distill(asked)
    assert found["huge"].turns == ()
    assert len(found["p0"].turns) == 1


def test_a_turn_that_does_not_fit_ends_its_conversation() -> None:
    found = distill([Prompts("grows", "", ("short", "word " * 400, "short"))])
    assert len(found["grows"].turns) == 1


def test_a_prompt_that_is_wrong_in_another_way_is_an_error() -> None:
    engine = make_engine(heads="none")
    distiller = SelfDistiller(engine, SHORT, method="medusa")
    with pytest.raises(InvalidRequestError, match="'medusa', but this server has auto, none"):
        list(distiller.run(prompts(1), lambda _: None))


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine whose model says its last token again and again: no layer adds anything."""
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("parrot"))
    tensors = load_file(directory / "model.safetensors")
    for name, weight in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = EngineConfig(model=str(directory), heads="none", device="cpu", num_blocks=256)
    return Engine.from_config(config)


def test_an_answer_that_goes_in_circles_is_cut_and_ends_its_conversation(parrot: Engine) -> None:
    found = distill(prompts(3, num_turns=2), Sampling(max_new_tokens=200), engine=parrot)
    for conversation in found.values():
        (turn,) = conversation.turns
        assert turn.finish_reason == "repeats"
        assert set(turn.token_ids) == {turn.prompt_token_ids[-1]}
        assert MIN_REPEATED_TOKENS <= len(turn.token_ids) < 2 * MIN_REPEATED_TOKENS


def test_circles_may_run_on_if_asked(parrot: Engine) -> None:
    sampling = Sampling(max_new_tokens=100, stop_repeats=False)
    (found,) = distill(prompts(1, num_turns=2), sampling, engine=parrot).values()
    assert [turn.finish_reason for turn in found.turns] == ["length", "length"]
