"""`serving`: a server under load, with speculation on and off, in interleaved rounds.

By default requests go through the whole server, over HTTP on 127.0.0.1, as a user's do; the clients
run in the same process and take their share of its CPU. `--engine` leaves HTTP out.
`bench.load.rounds` says what is sent, `bench.load.loops` what is measured. Ratios are `auto / off`
in each round; the headline is their median.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from statistics import median

from bench.benches.setup import (
    build_engine,
    describe_engine,
    engine_config,
    greedy,
    load_workload,
    speculation_off,
    speculation_on,
)
from bench.errors import BenchError
from bench.load.loops import NAN, LoadFigures
from bench.load.rounds import Arm, Closed, Draws, Level, LoadRounds, Open, RoundPair, num_runs
from bench.load.targets import engine_target, http_target
from bench.measure.plots import check_plots, plot_ratios
from bench.measure.report import Outcome
from bench.options import BenchOptions
from bench.progress import note, progress
from bench.workload.dialogues import first_turns
from server.config import SpeculationParams
from server.engine.engine import Engine
from server.engine.own_thread import in_own_thread
from server.speculation.tree_sizes import Foresight


@dataclass(frozen=True, slots=True)
class LevelResult:
    """Figures of one load.

    Attributes:
        concurrency: Clients of the closed loop; None for an open one.
        rate: Requests per second of the open loop; None for a closed one.
        throughput_ratio: Of output tokens per second; above 1, speculation is faster.
        itl_p95_ratio: Of the 95th percentile of the time per token; below 1, it is better.
        chunk_gap_p95_ratio: Likewise of the time between chunks.
        ttft_p95_ratio: Likewise of the time to the first token.
        mean_acceptance_length: Tokens per verify step of the auto arm, median of the rounds.
        nodes_per_step: Likewise nodes of a sequence's tree, root included.
        predicted_over_measured_tokens_per_s: Of the planner, over all rounds of the auto arm; not a
            number where nothing is planned.
        throughput_ratios: Of each round, as the other lists.
        auto: Figures of each round with speculation.
        off: Likewise without.
    """

    concurrency: int | None
    rate: float | None
    throughput_ratio: float
    itl_p95_ratio: float
    chunk_gap_p95_ratio: float
    ttft_p95_ratio: float
    mean_acceptance_length: float
    nodes_per_step: float
    predicted_over_measured_tokens_per_s: float
    throughput_ratios: tuple[float, ...]
    itl_p95_ratios: tuple[float, ...]
    chunk_gap_p95_ratios: tuple[float, ...]
    ttft_p95_ratios: tuple[float, ...]
    auto: tuple[LoadFigures, ...]
    off: tuple[LoadFigures, ...]


@dataclass(frozen=True, slots=True)
class ServingResult:
    """What the bench reports.

    Attributes:
        rounds: Counted rounds that every load of the report has.
        is_complete: Whether all rounds ran; False after an interrupt.
        by_concurrency: The closed loops.
        open_loop: The open loop, if one was asked for.
        predicted_over_measured_tokens_per_s: Of the planner, over all rounds of the auto arm.
    """

    rounds: int
    is_complete: bool
    by_concurrency: tuple[LevelResult, ...]
    open_loop: LevelResult | None
    predicted_over_measured_tokens_per_s: float


def summarise(pairs: Sequence[RoundPair], is_complete: bool) -> ServingResult:
    """Put the rounds of each load together; there is at least one."""
    by_level: dict[Level, list[RoundPair]] = {}
    for pair in pairs:
        by_level.setdefault(pair.level, []).append(pair)
    results = [level_result(level, own) for level, own in by_level.items()]
    return ServingResult(
        rounds=min(len(own) for own in by_level.values()),
        is_complete=is_complete,
        by_concurrency=tuple(result for result in results if result.rate is None),
        open_loop=next((result for result in results if result.rate is not None), None),
        predicted_over_measured_tokens_per_s=planner_accuracy(pairs),
    )


def level_result(level: Level, pairs: Sequence[RoundPair]) -> LevelResult:
    """Figures of one load over its rounds."""
    auto = tuple(pair.auto.figures for pair in pairs)
    off = tuple(pair.off.figures for pair in pairs)

    def ratios(figure: Callable[[LoadFigures], float]) -> tuple[float, ...]:
        return tuple(_ratio(figure(a), figure(b)) for a, b in zip(auto, off, strict=True))

    throughput = ratios(lambda figures: figures.tokens_per_s)
    itl = ratios(lambda figures: figures.itl_ms.p95)
    chunk_gap = ratios(lambda figures: figures.chunk_gap_ms.p95)
    ttft = ratios(lambda figures: figures.ttft_ms.p95)
    return LevelResult(
        concurrency=level.concurrency if isinstance(level, Closed) else None,
        rate=level.rate if isinstance(level, Open) else None,
        throughput_ratio=_median(throughput),
        itl_p95_ratio=_median(itl),
        chunk_gap_p95_ratio=_median(chunk_gap),
        ttft_p95_ratio=_median(ttft),
        mean_acceptance_length=_median([figures.mean_acceptance_length for figures in auto]),
        nodes_per_step=_median([figures.nodes_per_step for figures in auto]),
        predicted_over_measured_tokens_per_s=planner_accuracy(pairs),
        throughput_ratios=throughput,
        itl_p95_ratios=itl,
        chunk_gap_p95_ratios=chunk_gap,
        ttft_p95_ratios=ttft,
        auto=auto,
        off=off,
    )


def one_line(pair: RoundPair) -> str:
    """What a round says, so that a long bench can be watched."""
    level, auto, off = pair.level, pair.auto.figures, pair.off.figures
    load = f"{level.concurrency} clients" if isinstance(level, Closed) else f"{level.rate} a second"
    throughput = _ratio(auto.tokens_per_s, off.tokens_per_s)
    itl = _ratio(auto.itl_ms.p95, off.itl_ms.p95)
    return (
        f"{load}: {auto.tokens_per_s:.1f} against {off.tokens_per_s:.1f} tokens/s "
        f"({throughput:.2f}), p95 time per token {itl:.2f}"
    )


def planner_accuracy(pairs: Sequence[RoundPair]) -> float:
    """Predicted by measured tokens per second of the auto arm; not a number without a planner."""
    total = Foresight()
    for pair in pairs:
        own = pair.auto.foresight
        if own is not None:
            total.num_tokens += own.num_tokens
            total.seconds += own.seconds
            total.measured_tokens += own.measured_tokens
            total.measured_seconds += own.measured_seconds
    predicted = _ratio(total.num_tokens, total.seconds)
    return _ratio(predicted, _ratio(total.measured_tokens, total.measured_seconds))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0.0 else NAN


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return median(known) if known else NAN


async def _measure(
    engine: Engine, draws: Draws, options: BenchOptions, into: list[RoundPair]
) -> None:
    arms: dict[Arm, SpeculationParams] = {
        "auto": speculation_on(options),
        "off": speculation_off(),
    }

    def keep(pair: RoundPair) -> None:
        into.append(pair)
        note(one_line(pair))

    opened = engine_target(engine) if options.load.engine else http_target(engine)
    async with opened as target:
        rounds = LoadRounds(engine, target, draws, arms, options.load)
        with progress("serving", num_runs(options.load)) as advance:
            await rounds.run(keep, advance)


def run(options: BenchOptions) -> Outcome:
    """Put load on a server; an interrupt ends with what is measured until then.

    Raises:
        BenchError: If the prompts are wrong, none of them fits the context, matplotlib is missing,
            or the first counted round was interrupted.
        EuryaleError: If the engine cannot be built or refuses a request.
    """
    load = options.load
    if load.plot is not None:
        check_plots()
    workload = load_workload(options)
    config = replace(engine_config(options, tree_size="auto"), max_num_seqs=max(load.concurrencies))
    engine = in_own_thread(lambda: build_engine(config))
    turns, skipped = first_turns(engine, workload.conversations, greedy(options))
    draws = Draws(turns, options.max_new_tokens, load.seed)
    pairs: list[RoundPair] = []
    is_complete = True
    try:
        asyncio.run(_measure(engine, draws, options, pairs))
    except KeyboardInterrupt:
        is_complete = False
        note("interrupted; the figures are those of the rounds until here")
    if not pairs:
        raise BenchError("interrupted before the first counted round; let it run longer")
    result = summarise(pairs, is_complete)
    if load.plot is not None:
        plot_ratios(result.by_concurrency, load.plot)
    return Outcome(
        result=result,
        device=engine.loaded.device,
        dtype=engine.loaded.dtype,
        extra={
            "path": "engine" if load.engine else "http",
            "seed": load.seed,
            "max_num_seqs": config.max_num_seqs,
            "max_tokens_per_step": config.max_tokens_per_step,
            **describe_engine(engine),
            **workload.describe(skipped),
        },
    )
