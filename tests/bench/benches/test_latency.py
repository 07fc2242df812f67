import pytest

from bench.benches.latency import race_conversations, summarise
from bench.load.contenders import Contender, Race, Run, engine_contender, reference_contender
from bench.measure.reference import ReferenceModel
from bench.measure.timing import Timing
from bench.workload.conversations import Conversation
from server.config import SpeculationParams
from server.engine.engine import Engine
from tests.bench.traces import make_conversation
from tests.support.tiny_models import MAX_MODEL_LEN


def run_of(seconds: float, num_steps: int = 10, token: int = 0) -> Run:
    return Run(Timing(11, seconds + 1.0, 1.0), (token,) * 11, num_steps)


def race_of(category: str, on: float, off: float, slow: float, token: int = 0) -> Race:
    runs = {
        "speculation": run_of(on, num_steps=5, token=token),
        "plain": run_of(off),
        "transformers": run_of(slow),
    }
    return Race(category, runs)


def test_headline_figures_are_totals_of_whole_requests() -> None:
    result = summarise([race_of("a", 1.0, 2.0, 3.0), race_of("b", 2.0, 3.0, 4.0)])
    assert result.tokens_per_s == pytest.approx(22 / 5)
    assert result.speedup_vs_plain == pytest.approx(7 / 5)
    assert result.speedup_vs_transformers == pytest.approx(9 / 5)
    assert result.speeds["plain"].tokens_per_s == pytest.approx(22 / 7)
    assert result.speedups["plain"].decode_total == pytest.approx(5 / 3)
    assert result.num_outputs == 2


def test_steps_are_timed_without_the_prefill() -> None:
    result = summarise([race_of("a", 1.0, 2.0, 3.0)])
    assert result.step_ms == pytest.approx(
        {"speculation": 200.0, "plain": 200.0, "transformers": 300.0}
    )
    assert result.mean_acceptance_length == pytest.approx(2.0)


def test_categories_have_figures_of_their_own() -> None:
    result = summarise([race_of("a", 1.0, 2.0, 3.0), race_of("b", 1.0, 1.0, 1.0)])
    assert list(result.by_category) == ["a", "b"]
    assert result.by_category["a"].speedup_vs_plain == pytest.approx(1.5)
    assert result.by_category["a"].speedup_vs_transformers == pytest.approx(2.0)
    assert result.by_category["b"].speedup_vs_plain == pytest.approx(1.0)
    assert result.by_category["b"].num_outputs == 1


def test_outputs_that_differ_are_counted() -> None:
    races = [race_of("a", 1.0, 1.0, 1.0), race_of("a", 1.0, 1.0, 1.0, token=7)]
    assert summarise(races).num_different_outputs == 1


@pytest.fixture(scope="module")
def contenders(engine: Engine) -> dict[str, Contender]:
    return {
        "speculation": engine_contender(engine, SpeculationParams()),
        "plain": engine_contender(engine, SpeculationParams(method="none")),
        "transformers": reference_contender(ReferenceModel(engine.loaded)),
    }


def race_all(
    engine: Engine, contenders: dict[str, Contender], conversations: list[Conversation]
) -> tuple[list[Race], int, int]:
    done: list[int] = []
    races, skipped = race_conversations(
        engine,
        contenders,
        conversations,
        10,
        lambda: done.append(1),
    )
    return races, len(skipped), len(done)


def test_all_contenders_answer_every_turn_alike(
    engine: Engine, contenders: dict[str, Contender]
) -> None:
    conversations = [
        make_conversation("How many arms?", "Why?", line=1, category="x"),
        make_conversation("Hello.", line=2, category="y"),
    ]
    races, num_skipped, num_done = race_all(engine, contenders, conversations)
    assert [race.category for race in races] == ["x", "x", "y"]
    assert (num_skipped, num_done) == (0, 2)
    assert summarise(races).num_different_outputs == 0
    for race in races:
        assert race.runs["plain"].num_steps == race.runs["plain"].timing.num_decode_tokens
        assert race.runs["speculation"].num_steps <= race.runs["plain"].num_steps


def test_turns_beyond_the_context_are_skipped(
    engine: Engine, contenders: dict[str, Contender]
) -> None:
    conversations = [make_conversation("short", "long " * MAX_MODEL_LEN)]
    races, num_skipped, num_done = race_all(engine, contenders, conversations)
    assert (len(races), num_skipped, num_done) == (1, 1, 1)
