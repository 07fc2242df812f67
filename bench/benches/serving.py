"""`serving`: a server under load, with speculation on and off, in interleaved rounds.

By default requests go through the whole server, over HTTP on 127.0.0.1, as a user's do; the clients
run in the same process and take their share of its CPU. `--engine` leaves HTTP out.
`bench.load.rounds` says what is sent, `bench.load.loops` what is measured. Ratios are `auto / off`
in each round; the headline is their median.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from statistics import median
from typing import Annotated

from bench.benches.setup import PLAIN, PromptOptions, Setup, build_engine, common_settings, prepare
from bench.errors import BenchError
from bench.load.loops import NAN, LoadFigures
from bench.load.rounds import (
    Arm,
    Closed,
    Draws,
    Level,
    LoadPlan,
    LoadRounds,
    Open,
    RoundPair,
    num_runs,
)
from bench.load.targets import engine_target, http_target
from bench.measure.plots import check_plots, plot_ratios
from bench.measure.report import Outcome
from server.cli.console import progress_bar
from server.cli.options import Command, ReadBy, Settings
from server.config import EngineConfig, SpeculationParams
from server.engine.engine import Engine
from server.engine.own_thread import in_own_thread
from server.speculation.tree_sizes import Foresight

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_log = logging.getLogger("euryale.bench")


def image_file(text: str) -> Path:
    """Read the name of a file for a plot.

    Raises:
        ValueError: If its ending names no format that plots are written in.
    """
    path = Path(text)
    if path.suffix not in _PLOT_SUFFIXES:
        raise ValueError(f"give a file that ends in {', '.join(_PLOT_SUFFIXES)}")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """Server and plot.

    Attributes:
        engine: Drive the asynchronous engine, without HTTP.
        plot: Image file for a plot of the ratios over the concurrency; nothing is drawn if not
            given.
    """

    engine: bool = False
    plot: Annotated[Path, ReadBy(image_file, "FILE")] | None = None


@dataclass(frozen=True, slots=True)
class LevelResult:
    """Figures of one load.

    Attributes:
        concurrency: Clients of the closed loop; None for an open one.
        rate: Requests per second of the open loop; None for a closed one.
        throughput_ratio: Ratio of output tokens per second; above 1, speculation is faster.
        itl_p95_ratio: Ratio of the 95th percentile of the time per token; below 1, speculation is
            better.
        chunk_gap_p95_ratio: The same ratio for the time between chunks.
        ttft_p95_ratio: The same ratio for the time to the first token.
        mean_acceptance_length: Tokens per verify step of the auto arm, median of the rounds.
        nodes_per_step: Nodes of a sequence's tree in the auto arm, root included, median of the
            rounds.
        predicted_over_measured_tokens_per_s: What the planner predicted by what was measured, over
            all rounds of the auto arm; not a number where nothing is planned.
        throughput_ratios: One ratio per round, as in the other lists.
        auto: Figures of each round with speculation.
        off: Figures of each round without speculation.
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
        predicted_over_measured_tokens_per_s: What the planner predicted by what was measured, over
            all rounds of the auto arm.
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


def _foresight(engine: Engine) -> Foresight | None:
    foresight = engine.speculator.stats().foresight
    return None if foresight is None else replace(foresight)


async def _measure(
    setup: Setup, draws: Draws, plan: LoadPlan, without_http: bool, into: list[RoundPair]
) -> None:
    arms: dict[Arm, SpeculationParams] = {"auto": setup.speculation, "off": PLAIN}

    def keep(pair: RoundPair) -> None:
        into.append(pair)
        _log.info(one_line(pair))

    opened = engine_target(setup.engine) if without_http else http_target(setup.engine)
    async with opened as target:
        rounds = LoadRounds(target, draws, arms, plan, lambda: _foresight(setup.engine))
        with progress_bar("serving", num_runs(plan)) as bar:
            await rounds.run(keep, bar.advance)


def run(
    prompts: PromptOptions,
    config: EngineConfig,
    speculation: SpeculationParams,
    plan: LoadPlan,
    options: ServingOptions,
) -> Outcome:
    """Put load on a server; an interrupt ends with what is measured until then.

    Raises:
        BenchError: If no prompt fits the context, or the first counted round was interrupted.
        EuryaleError: If matplotlib is missing, the prompts are wrong, or the engine cannot be built
            or rejects a request.
    """
    if options.plot is not None:
        check_plots()
    config = replace(config, max_num_seqs=max(plan.concurrency))
    setup = prepare(
        prompts, config, speculation, lambda config: in_own_thread(lambda: build_engine(config))
    )
    turns, skipped = setup.first_turns()
    draws = Draws(turns, prompts.max_new_tokens, plan.seed)
    pairs: list[RoundPair] = []
    is_complete = True
    try:
        asyncio.run(_measure(setup, draws, plan, options.engine, pairs))
    except KeyboardInterrupt:
        is_complete = False
        _log.info("interrupted; the figures are those of the rounds until here")
    if not pairs:
        raise BenchError("interrupted before the first counted round; let it run longer")
    result = summarise(pairs, is_complete)
    if options.plot is not None:
        plot_ratios(result.by_concurrency, options.plot)
    extra = {
        "path": "engine" if options.engine else "http",
        "seed": plan.seed,
        "max_num_seqs": config.max_num_seqs,
        "max_tokens_per_step": config.max_tokens_per_step,
    }
    return setup.outcome(result, skipped, extra)


COMMAND = Command(
    "serving",
    "A server under load, speculation on against off: throughput and latencies.",
    run,
    {**common_settings(), "plan": Settings(LoadPlan), "options": Settings(ServingOptions)},
)
