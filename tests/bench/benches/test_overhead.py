import pytest

from bench.benches.overhead import (
    DRAFT,
    FORWARD,
    OTHER,
    StepLap,
    summarise,
    time_steps,
)
from server.config import SamplingParams, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPT = (5, 6, 7)
PARTS = {
    "schedule",
    "launch",
    "pack",
    FORWARD,
    "verify",
    "compact",
    DRAFT,
    "commit",
    "propose",
    "finish",
    OTHER,
}


def test_shares_are_of_the_summed_seconds() -> None:
    laps = [
        StepLap(0.1, {FORWARD: 0.07, DRAFT: 0.01, "verify": 0.02}),
        StepLap(0.3, {FORWARD: 0.21, DRAFT: 0.03, "finish": 0.06}),
    ]
    result = summarise(laps)
    assert result.forward_share == pytest.approx(0.7)
    assert result.draft_share == pytest.approx(0.1)
    assert result.overhead_share == pytest.approx(0.2)
    assert result.step_ms == pytest.approx(200.0)
    assert result.median_step_ms == pytest.approx(200.0)
    assert result.parts_ms == pytest.approx(
        {FORWARD: 140.0, DRAFT: 20.0, "finish": 30.0, "verify": 10.0}
    )
    assert list(result.parts_ms) == [FORWARD, "finish", DRAFT, "verify"]
    assert result.num_steps == 2


def test_steps_without_drafts_have_no_draft_share() -> None:
    assert summarise([StepLap(1.0, {FORWARD: 0.9, OTHER: 0.1})]).draft_share == 0.0


def test_every_stage_of_a_step_is_timed_and_completed_by_other(engine: Engine) -> None:
    laps = time_steps(engine, Request("r", PROMPT, GREEDY))
    for lap in laps:
        assert lap.parts_s.keys() == PARTS
        assert sum(lap.parts_s.values()) == pytest.approx(lap.step_s)
        assert min(lap.parts_s.values()) >= 0.0
        assert lap.parts_s[OTHER] < lap.step_s / 2


def test_one_lap_is_taken_for_each_verify_step(engine: Engine) -> None:
    request = Request("r", PROMPT, GREEDY)
    num_steps = engine.generate([request])[0].stats.num_steps
    assert len(time_steps(engine, request)) == num_steps


def test_plain_decoding_runs_no_draft_heads(engine: Engine) -> None:
    request = Request("r", PROMPT, GREEDY, SpeculationParams(method="none"))
    laps = time_steps(engine, request)
    assert len(laps) == 15
    with_heads = time_steps(engine, Request("r", PROMPT, GREEDY))
    least = min(lap.parts_s[DRAFT] for lap in with_heads[:-1])
    assert all(lap.parts_s[DRAFT] < least for lap in laps)
