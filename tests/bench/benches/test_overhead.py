import pytest

import server.engine.engine as engine_module
from bench.benches.overhead import (
    DRAFT,
    FORWARD,
    OTHER,
    StepLap,
    instrumented,
    summarise,
    time_steps,
)
from bench.measure.stopwatch import Stopwatch
from server.config import SamplingParams, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPT = (5, 6, 7)
PARTS = {
    "schedule",
    "batch",
    "prepare",
    FORWARD,
    "verify",
    "compact",
    "emit",
    "advance",
    "propose",
    DRAFT,
    "count",
    "outputs",
    OTHER,
}


def do_nothing() -> None:
    pass


def test_shares_are_of_the_summed_seconds() -> None:
    laps = [
        StepLap(0.1, {FORWARD: 0.07, DRAFT: 0.01, "verify": 0.02}),
        StepLap(0.3, {FORWARD: 0.21, DRAFT: 0.03, "emit": 0.06}),
    ]
    result = summarise(laps)
    assert result.forward_share == pytest.approx(0.7)
    assert result.draft_share == pytest.approx(0.1)
    assert result.overhead_share == pytest.approx(0.2)
    assert result.step_ms == pytest.approx(200.0)
    assert result.median_step_ms == pytest.approx(200.0)
    assert result.parts_ms == pytest.approx(
        {FORWARD: 140.0, DRAFT: 20.0, "emit": 30.0, "verify": 10.0}
    )
    assert list(result.parts_ms) == [FORWARD, "emit", DRAFT, "verify"]
    assert result.num_steps == 2


def test_steps_without_drafts_have_no_draft_share() -> None:
    assert summarise([StepLap(1.0, {FORWARD: 0.9, OTHER: 0.1})]).draft_share == 0.0


def test_every_part_of_a_step_is_timed_and_completed_by_other(engine: Engine) -> None:
    watch = Stopwatch(do_nothing)
    with instrumented(engine, watch):
        laps = time_steps(engine, watch, Request("r", PROMPT, GREEDY))
    assert laps[0].parts_s.keys() == PARTS
    for lap in laps:
        assert lap.parts_s.keys() <= PARTS
        assert sum(lap.parts_s.values()) == pytest.approx(lap.step_s)
        assert min(lap.parts_s.values()) >= 0.0


def test_one_lap_is_taken_for_each_verify_step(engine: Engine) -> None:
    request = Request("r", PROMPT, GREEDY)
    num_steps = engine.generate([request])[0].stats.num_steps
    watch = Stopwatch(do_nothing)
    with instrumented(engine, watch):
        assert len(time_steps(engine, watch, request)) == num_steps


def test_plain_decoding_runs_no_draft_heads(engine: Engine) -> None:
    watch = Stopwatch(do_nothing)
    request = Request("r", PROMPT, GREEDY, SpeculationParams(method="none"))
    with instrumented(engine, watch):
        laps = time_steps(engine, watch, request)
    assert len(laps) == 15
    assert all(DRAFT not in lap.parts_s for lap in laps)


def test_instruments_change_no_output_and_leave_no_trace(engine: Engine) -> None:
    request = Request("r", PROMPT, GREEDY)
    before = engine.generate([request])[0]
    original = vars(engine_module)["verify"]
    watch = Stopwatch(do_nothing)
    with instrumented(engine, watch):
        assert vars(engine_module)["verify"] is not original
        assert engine.generate([request])[0] == before
    assert vars(engine_module)["verify"] is original
    assert "forward" not in vars(engine.loaded.model)
    assert "_compact" not in vars(engine)
    watch.lap()
    engine.generate([request])
    assert watch.lap() == {}
