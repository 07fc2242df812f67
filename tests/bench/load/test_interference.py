from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.load.interference import Interference, Streams, measure_interference, time_chunks
from bench.load.loops import GapFigures, Percentiles
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.request import Request
from server.core.step import StepEntry
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler

LONG = tuple(range(10, 110))
OTHER = tuple(range(200, 300))
PLAIN = SpeculationParams(method="none")
CONFIG = EngineConfig(
    device="cpu",
    max_num_seqs=4,
    max_nodes=6,
    tree_size=6,
    max_prefill_tokens=24,
)


def build(model_dir: Path, heads_dir: Path, num_blocks: int = 128) -> Engine:
    config = replace(CONFIG, model=str(model_dir), heads=str(heads_dir), num_blocks=num_blocks)
    return Engine.from_config(config)


@pytest.fixture
def cold(model_dir: Path, heads_dir: Path) -> Engine:
    return build(model_dir, heads_dir)


def endless(
    name: str,
    token_ids: tuple[int, ...],
    speculation: SpeculationParams = PLAIN,
    max_tokens: int = 300,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(name, token_ids, sampling, speculation)


def streams_of(speculation: SpeculationParams = PLAIN) -> list[Request]:
    return [endless(f"s{i}", (5, 6, 7 + i), speculation) for i in range(3)]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[list[StepEntry]]:
    """What the engine scheduled, as the scheduler itself says."""
    seen: list[list[StepEntry]] = []
    schedule = Scheduler.schedule

    def noted(self: Scheduler) -> list[StepEntry]:
        seen.append(schedule(self))
        return seen[-1]

    monkeypatch.setattr(Scheduler, "schedule", noted)
    return seen


def gaps(itl_p95: float, chunk_gap_p95: float) -> GapFigures:
    return GapFigures(Percentiles(1.0, itl_p95, 99.0), Percentiles(1.0, chunk_gap_p95, 99.0))


def test_a_rise_is_of_the_95th_percentile() -> None:
    found = Interference(gaps(20.0, 30.0), gaps(50.0, 90.0), Percentiles(1.0, 2.0, 3.0), (64,))
    assert (found.itl_rise_ms, found.chunk_gap_rise_ms) == (30.0, 60.0)


@pytest.mark.parametrize("speculation", [PLAIN, SpeculationParams()])
def test_the_same_chunks_are_computed_with_streams_and_alone(
    speculation: SpeculationParams, cold: Engine, plans: list[list[StepEntry]]
) -> None:
    found = measure_interference(
        cold,
        streams_of(speculation),
        endless("long", LONG, speculation),
        endless("alone", OTHER, speculation),
    )
    assert found.chunk_tokens == (24, 24, 24, 24, 4)

    def chunks_of(name: str) -> list[tuple[int, int]]:
        return [
            (item.num_committed, len(plan))
            for plan in plans
            for item in plan
            if item.sequence.request.request_id == name and not item.is_decoding
        ]

    # With three streams, and with nothing else in the step.
    assert chunks_of("long") == [(24, 4), (24, 4), (24, 4), (24, 4), (4, 4)]
    assert chunks_of("alone") == [(24, 1), (24, 1), (24, 1), (24, 1), (4, 1)]


def test_all_figures_are_positive_and_the_engine_is_idle_afterwards(cold: Engine) -> None:
    prompts = endless("long", LONG), endless("alone", OTHER)
    found = measure_interference(cold, streams_of(), *prompts)
    for gap_figures in (found.quiet, found.busy):
        assert 0.0 < gap_figures.chunk_gap_ms.p50 <= gap_figures.chunk_gap_ms.p95
        # Plain decoding: a chunk is a token.
        assert gap_figures.itl_ms == gap_figures.chunk_gap_ms
    assert found.chunk_cost_ms.p95 > 0.0
    assert not cold.has_unfinished
    assert cold.blocks.num_in_use == 0
    assert "schedule" not in vars(cold._scheduler)
    assert cold._scheduler.prompt_limit is None


def test_no_part_of_a_long_prompt_is_cached(cold: Engine) -> None:
    measure_interference(cold, streams_of(), endless("long", LONG), endless("alone", OTHER))
    assert cold.counters.num_cached_tokens == 0


def test_chunks_alone_take_the_given_sizes(cold: Engine, plans: list[list[StepEntry]]) -> None:
    seconds = time_chunks(cold, endless("alone", LONG), (50, 1, 49))
    # The last plan is of a step that follows the prompt and is dropped.
    assert [[item.num_tokens for item in plan] for plan in plans] == [[50], [1], [49], [1]]
    assert len(seconds) == 3
    assert min(seconds) > 0.0
    assert not cold.has_unfinished


def test_chunks_are_taken_once_and_the_last_one_opens_the_next_stretch(cold: Engine) -> None:
    streams = Streams(cold, streams_of())
    assert not streams.all_began
    streams.step()
    assert streams.all_began
    streams.run(4)
    first = streams.take()
    streams.run(2)
    second = streams.take()
    assert [len(chunks) for chunks in first] == [5, 5, 5]
    assert [len(chunks) for chunks in second] == [3, 3, 3]
    for earlier, later in zip(first, second, strict=True):
        assert earlier[-1] is later[0]
    streams.abort()
    assert not cold.has_unfinished


def test_a_stream_that_ends_too_early_is_an_error(cold: Engine) -> None:
    short = [endless("s", (5, 6, 7), max_tokens=6)]
    with pytest.raises(BenchError, match=r"context's end of 512 tokens .* --long-prompt-tokens"):
        measure_interference(cold, short, endless("long", LONG), endless("alone", OTHER))


def test_a_cache_that_is_too_small_is_an_error(model_dir: Path, heads_dir: Path) -> None:
    engine = build(model_dir, heads_dir, num_blocks=12)
    prompts = endless("long", LONG, max_tokens=20), endless("alone", OTHER, max_tokens=20)
    streams = [endless(f"s{i}", (5, 6, 7 + i), max_tokens=150) for i in range(3)]
    with pytest.raises(BenchError, match="12 blocks is too small for 3 streams"):
        measure_interference(engine, streams, *prompts)
