import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.benches.serving import one_line, planner_accuracy, summarise
from bench.load.loops import LoadFigures, Percentiles
from bench.load.rounds import ArmRun, Closed, Level, LoadRounds, Open, RoundPair
from server.speculation.tree_sizes import Foresight

pytestmark = pytest.mark.slow


def figures_of(speed: float, itl: float, ttft: float = 10.0) -> LoadFigures:
    def around(p95: float) -> Percentiles:
        return Percentiles(p95 / 2, p95, p95 * 2)

    return LoadFigures(
        num_requests=4,
        num_output_tokens=100,
        seconds=100 / speed,
        tokens_per_s=speed,
        ttft_ms=around(ttft),
        itl_ms=around(itl),
        chunk_gap_ms=around(3 * itl),
        mean_acceptance_length=1.5,
        nodes_per_step=6.0,
    )


def pair_of(
    level: Level, speed: float, itl: float = 10.0, foresight: Foresight | None = None
) -> RoundPair:
    auto = ArmRun(figures_of(speed, itl, ttft=12.0), foresight)
    return RoundPair(level, auto, ArmRun(figures_of(10.0, 20.0), Foresight(1.0, 1.0, 9, 1.0)))


def test_ratios_are_medians_of_the_rounds() -> None:
    pairs = [
        pair_of(Closed(4), speed, itl) for speed, itl in ((30.0, 5.0), (5.0, 40.0), (20.0, 8.0))
    ]
    [level] = summarise(pairs, is_complete=True).by_concurrency
    assert level.concurrency == 4
    assert level.throughput_ratios == pytest.approx((3.0, 0.5, 2.0))
    assert level.throughput_ratio == pytest.approx(2.0)
    assert level.itl_p95_ratios == pytest.approx((0.25, 2.0, 0.4))
    assert level.itl_p95_ratio == pytest.approx(0.4)
    assert level.chunk_gap_p95_ratio == pytest.approx(0.4)
    assert level.ttft_p95_ratio == pytest.approx(1.2)
    assert (level.mean_acceptance_length, level.nodes_per_step) == (1.5, 6.0)
    assert [figures.tokens_per_s for figures in level.auto] == [30.0, 5.0, 20.0]


def test_loads_are_kept_apart() -> None:
    pairs = [pair_of(Closed(1), 10.0), pair_of(Closed(2), 20.0), pair_of(Open(3.5), 40.0)]
    result = summarise(pairs, is_complete=True)
    assert [level.concurrency for level in result.by_concurrency] == [1, 2]
    assert [level.throughput_ratio for level in result.by_concurrency] == [1.0, 2.0]
    assert result.open_loop is not None
    assert (result.open_loop.rate, result.open_loop.concurrency) == (3.5, None)
    assert result.open_loop.throughput_ratio == 4.0


def test_rounds_are_those_that_every_load_has() -> None:
    pairs = [pair_of(Closed(1), 10.0), pair_of(Closed(2), 10.0), pair_of(Closed(1), 10.0)]
    result = summarise(pairs, is_complete=False)
    assert (result.rounds, result.is_complete, result.open_loop) == (1, False, None)


def test_a_round_is_logged_in_a_line() -> None:
    line = one_line(pair_of(Closed(4), 15.0, itl=8.0))
    assert line == "4 clients: 15.0 against 10.0 tokens/s (1.50), p95 time per token 0.40"
    assert one_line(pair_of(Open(2.5), 15.0)).startswith("2.5 a second: ")


def test_the_planner_is_judged_by_tokens_per_second_of_the_auto_arm() -> None:
    pairs = [
        pair_of(Closed(1), 10.0, foresight=Foresight(30.0, 1.0, 30, 2.0)),
        pair_of(Closed(1), 10.0, foresight=Foresight(30.0, 2.0, 10, 2.0)),
    ]
    # Predicted 60 / 3 tokens per second, measured 40 / 4.
    assert planner_accuracy(pairs) == pytest.approx(2.0)
    assert summarise(pairs, True).by_concurrency[0].predicted_over_measured_tokens_per_s == 2.0
    assert math.isnan(planner_accuracy([pair_of(Closed(1), 10.0)]))


@pytest.fixture
def arguments(model_dir: Path, heads_dir: Path) -> list[str]:
    options = "--device cpu --compile off --max-new-tokens 8 --max-nodes 8 --limit 4"
    load = "--concurrency 1,3 --rounds 2 --requests-per-round 3"
    return ["--model", str(model_dir), "--heads", str(heads_dir), *options.split(), *load.split()]


def serve(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["serving", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


@pytest.mark.parametrize("extra", [[], ["--engine"]])
def test_a_real_server_is_measured(
    extra: list[str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plots" / "ratios.png"
    options = [*extra, "--rate", "100", "--plot", str(plot)]
    report = serve([*arguments, *options], capsys)
    assert (report["rounds"], report["is_complete"]) == (2, True)
    assert report["path"] == ("engine" if extra else "http")
    assert [level["concurrency"] for level in report["by_concurrency"]] == [1, 3]
    for level in (*report["by_concurrency"], report["open_loop"]):
        assert len(level["throughput_ratios"]) == len(level["auto"]) == len(level["off"]) == 2
        assert level["throughput_ratio"] > 0.0
        assert level["mean_acceptance_length"] >= 1.0
        assert level["predicted_over_measured_tokens_per_s"] > 0.0
        for auto, off in zip(level["auto"], level["off"], strict=True):
            assert auto["num_requests"] == off["num_requests"] == 3
            assert auto["num_output_tokens"] == off["num_output_tokens"]
            assert off["nodes_per_step"] == off["mean_acceptance_length"] == 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_the_rounds_until_then(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = LoadRounds._pair

    async def interrupted(self: LoadRounds, level: Level, number: int, on_run: Any) -> RoundPair:
        if number == 2 and level == Closed(3):
            raise KeyboardInterrupt
        return await whole(self, level, number, on_run)

    monkeypatch.setattr(LoadRounds, "_pair", interrupted)
    report = serve([*arguments, "--engine"], capsys)
    assert (report["rounds"], report["is_complete"]) == (1, False)
    assert [len(level["auto"]) for level in report["by_concurrency"]] == [2, 1]


def test_an_interrupt_before_the_first_round_is_an_error(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def interrupted(self: LoadRounds, into: list[RoundPair], on_run: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadRounds, "run", interrupted)
    assert main(["serving", *arguments, "--engine"]) == 2
    assert "before the first counted round" in capsys.readouterr().err
