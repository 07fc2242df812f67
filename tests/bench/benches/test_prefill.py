import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.benches.prefill import (
    ArmRound,
    PrefillRounds,
    summarise,
)
from bench.load.interference import Interference
from bench.load.loops import GapFigures, Percentiles
from bench.load.reuse import PromptTime, Reuse
from bench.load.rounds import Arm
from server.config import SamplingParams, SpeculationParams

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
ARMS: tuple[Arm, ...] = ("auto", "off")


def round_of(ratio: float, itl_rise: float, gap_rise: float, cost: float) -> ArmRound:
    def gaps(itl: float, chunk_gap: float) -> GapFigures:
        return GapFigures(Percentiles(1.0, itl, 900.0), Percentiles(1.0, chunk_gap, 900.0))

    first, second = PromptTime(100, 0, 50.0), PromptTime(200, 96, 100.0 * ratio)
    interference = Interference(
        gaps(20.0, 40.0),
        gaps(20.0 + itl_rise, 40.0 + gap_rise),
        Percentiles(1.0, cost, 900.0),
        (64, 64),
    )
    return ArmRound(Reuse(first, second), interference)


def test_figures_are_medians_of_the_rounds_and_those_of_auto_stand_in_front() -> None:
    auto = [
        round_of(0.1, itl_rise=10.0, gap_rise=60.0, cost=40.0),
        round_of(0.5, itl_rise=30.0, gap_rise=20.0, cost=20.0),
        round_of(0.2, itl_rise=20.0, gap_rise=40.0, cost=50.0),
    ]
    off = round_of(0.3, itl_rise=5.0, gap_rise=6.0, cost=10.0)
    result = summarise([{"auto": each, "off": off} for each in auto], is_complete=True)
    assert (result.rounds, result.is_complete) == (3, True)
    assert result.ttft_per_token_ratio == pytest.approx(0.2)
    assert result.itl_p95_rise_ms == pytest.approx(20.0)
    assert result.chunk_gap_p95_rise_ms == pytest.approx(40.0)
    assert result.chunk_cost_p95_ms == pytest.approx(40.0)
    # Medians of 0.25, 1.5, 0.4 and of 1.5, 1.0, 0.8.
    assert result.itl_rise_by_chunk_cost == pytest.approx(0.4)
    assert result.chunk_gap_rise_by_chunk_cost == pytest.approx(1.0)
    assert result.auto.rounds == tuple(auto)
    assert result.auto.first_ttft_ms == pytest.approx(50.0)
    assert result.auto.second_ttft_ms == pytest.approx(20.0)
    assert result.off.ttft_per_token_ratio == pytest.approx(0.3)
    assert result.off.itl_rise_by_chunk_cost == pytest.approx(0.5)
    assert result.off.chunk_gap_rise_by_chunk_cost == pytest.approx(0.6)


def test_streams_that_gain_have_a_negative_rise() -> None:
    each = round_of(0.1, itl_rise=-5.0, gap_rise=-10.0, cost=20.0)
    result = summarise([{"auto": each, "off": each}], is_complete=False)
    assert result.itl_rise_by_chunk_cost == pytest.approx(-0.25)
    assert not result.is_complete


@pytest.fixture
def arguments(model_dir: Path, heads_dir: Path) -> list[str]:
    common = "--device cpu --compile off --max-new-tokens 8 --max-nodes 8 --limit 4"
    sizes = "--rounds 2 --streams 3 --prompt-tokens 90 --long-prompt-tokens 80"
    return ["--model", str(model_dir), "--heads", str(heads_dir), *common.split(), *sizes.split()]


def prefill(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["prefill", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def test_both_arms_are_measured_in_each_round(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = prefill([*arguments, "--max-prefill-tokens", "32"], capsys)
    assert (report["rounds"], report["is_complete"]) == (2, True)
    assert (report["max_prefill_tokens"], report["max_tokens_per_step"]) == (32, 512)
    sizes = (report["prompt_tokens"], report["long_prompt_tokens"], report["streams"])
    assert sizes == (90, 80, 3)
    for arm in ARMS:
        assert len(report[arm]["rounds"]) == 2
        for each in report[arm]["rounds"]:
            reuse, interference = each["reuse"], each["interference"]
            assert 90 <= reuse["first"]["num_prompt_tokens"] < 90 + 30
            assert reuse["first"]["num_cached_tokens"] == 0
            assert reuse["second"]["num_cached_tokens"] >= 80
            assert interference["chunk_tokens"] == [32, 32, 16]
    off = report["off"]["rounds"][0]["interference"]
    assert off["busy"]["itl_ms"] == off["busy"]["chunk_gap_ms"]


def test_the_chunk_in_force_is_reported_where_none_was_asked_for(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = prefill([*arguments, "--rounds", "1"], capsys)
    assert report["max_prefill_tokens"] == 64
    assert report["auto"]["rounds"][0]["interference"]["chunk_tokens"] == [64, 16]


@pytest.mark.parametrize(
    ("option", "count", "message"),
    [
        ("--prompt-tokens", "400", "the context of 512 has room for 376"),
        ("--long-prompt-tokens", "511", "the context of 512 has room for 510"),
    ],
)
def test_prompts_beyond_the_context_are_rejected(
    option: str,
    count: str,
    message: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prefill", *arguments, option, count]) == 2
    shown = capsys.readouterr().err
    assert f"{option} is {count}" in shown
    assert message in shown


def test_an_interrupt_keeps_the_rounds_until_then(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = PrefillRounds._arm
    num_runs = 0

    def interrupted(self: PrefillRounds, speculation: SpeculationParams) -> ArmRound:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 6:
            raise KeyboardInterrupt
        return whole(self, speculation)

    monkeypatch.setattr(PrefillRounds, "_arm", interrupted)
    report = prefill(arguments, capsys)
    assert (report["rounds"], report["is_complete"]) == (1, False)


def test_an_interrupt_before_the_first_round_is_an_error(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: PrefillRounds, speculation: SpeculationParams) -> ArmRound:
        raise KeyboardInterrupt

    monkeypatch.setattr(PrefillRounds, "_arm", interrupted)
    assert main(["prefill", *arguments]) == 2
    assert "before the first counted round" in capsys.readouterr().err
