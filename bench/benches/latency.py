"""`latency`: tokens per second of one request at a time, against two slower ways to run it.

The contenders answer the same greedy prompts in one process, prompt by prompt and in rotating
order, so that drifts of the machine hit all of them alike: *speculation* and *plain* are the same
engine with drafts on and off, *transformers* is a separate plain model's `generate`. A request is
timed as a whole; figures without its prefill are under `decode`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.benches.setup import PLAIN, PromptOptions, common_settings, prepare
from bench.errors import BenchError
from bench.load.contenders import (
    Contender,
    Race,
    Run,
    engine_contender,
    race_turn,
    reference_contender,
    warm_up,
)
from bench.measure.limits import WeightTraffic, read_speed, weight_bytes
from bench.measure.reference import ReferenceModel
from bench.measure.report import Outcome
from bench.measure.timing import Speed, Speedup, speed, speedup
from bench.workload.conversations import Conversation
from bench.workload.dialogues import SkippedTurn, make_turn, skip_if_too_long
from server.cli.console import progress_bar
from server.cli.options import Command
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.engine.engine import Engine

NAMES = ("speculation", "plain", "transformers")


@dataclass(frozen=True, slots=True)
class CategorySpeed:
    """Whole-request speed of speculation in one category, totals over its outputs."""

    num_outputs: int
    tokens_per_s: float
    speedup_vs_plain: float
    speedup_vs_transformers: float


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """What the bench reports.

    Attributes:
        tokens_per_s: Speed over whole requests with speculation: all tokens by all seconds.
        speedup_vs_plain: Speed with speculation by that of plain decoding, both totals; `speedups`
            has medians and decode-only figures.
        speedup_vs_transformers: The same ratio to transformers.
        mean_acceptance_length: Tokens per verify step with speculation.
        step_ms: Mean measured milliseconds of a decode step, the engine's own work included.
        num_outputs: Turns that were raced.
        num_different_outputs: Turns where the contenders' tokens are not all the same; see
            the exactness bench for why.
    """

    tokens_per_s: float
    speedup_vs_plain: float
    speedup_vs_transformers: float
    speeds: dict[str, Speed]
    speedups: dict[str, Speedup]
    by_category: dict[str, CategorySpeed]
    mean_acceptance_length: float
    step_ms: dict[str, float]
    num_outputs: int
    num_different_outputs: int


def summarise(races: Sequence[Race]) -> LatencyResult:
    """Pool the races, of which there is at least one."""
    names = tuple(races[0].runs)
    runs: dict[str, list[Run]] = {name: [race.runs[name] for race in races] for name in names}
    timings = {name: [run.timing for run in runs[name]] for name in names}
    speedups: dict[str, Speedup] = {
        name: speedup(timings["speculation"], timings[name]) for name in names[1:]
    }
    by_category: dict[str, list[Race]] = {}
    for race in races:
        by_category.setdefault(race.category, []).append(race)
    speeds = {name: speed(timings[name]) for name in names}
    return LatencyResult(
        tokens_per_s=speeds["speculation"].tokens_per_s,
        speedup_vs_plain=speedups["plain"].total,
        speedup_vs_transformers=speedups["transformers"].total,
        speeds=speeds,
        speedups=speedups,
        by_category={name: _category(group) for name, group in by_category.items()},
        mean_acceptance_length=_acceptance_length(runs["speculation"]),
        step_ms={name: _step_ms(runs[name]) for name in names},
        num_outputs=len(races),
        num_different_outputs=sum(
            len({run.token_ids for run in race.runs.values()}) > 1 for race in races
        ),
    )


def _category(races: Sequence[Race]) -> CategorySpeed:
    fast, plain, slow = ([race.runs[name].timing for race in races] for name in NAMES)
    return CategorySpeed(
        num_outputs=len(races),
        tokens_per_s=speed(fast).tokens_per_s,
        speedup_vs_plain=speedup(fast, plain).total,
        speedup_vs_transformers=speedup(fast, slow).total,
    )


def _acceptance_length(runs: Sequence[Run]) -> float:
    num_decoded = sum(run.timing.num_decode_tokens for run in runs)
    return num_decoded / max(1, sum(run.num_steps for run in runs))


def _step_ms(runs: Sequence[Run]) -> float:
    num_steps = sum(run.num_steps for run in runs)
    return sum(run.timing.decode_s for run in runs) / max(num_steps, 1) * 1e3


def race_conversations(
    engine: Engine,
    contenders: Mapping[str, Contender],
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    on_done: Callable[[], None],
) -> tuple[list[Race], list[SkippedTurn]]:
    """Race every turn; the answer with speculation is the context of the next."""
    races: list[Race] = []
    skipped: list[SkippedTurn] = []
    for conversation in conversations:
        answers: list[str] = []
        while len(answers) < len(conversation.turns):
            turn = make_turn(engine.tokenizer, conversation, answers)
            sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
            request = turn.request(sampling, PLAIN)
            obstacle = skip_if_too_long(engine, turn, request)
            if obstacle is not None:
                skipped.append(obstacle)
                break
            if not races:
                warm_up(contenders, turn, max_new_tokens)
            race = race_turn(contenders, turn, max_new_tokens, len(races))
            races.append(race)
            answers.append(race.runs["speculation"].text)
        on_done()
    return races, skipped


def run(prompts: PromptOptions, config: EngineConfig, speculation: SpeculationParams) -> Outcome:
    """Race speculation, plain decoding and transformers.

    Raises:
        BenchError: If no prompt fits the context.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    setup = prepare(prompts, config, speculation)
    engine, conversations = setup.engine, setup.workload.conversations
    reference = ReferenceModel(engine.loaded)
    memory_gb_per_s = read_speed(engine.loaded.device)
    contenders = {
        "speculation": engine_contender(engine, setup.speculation),
        "plain": engine_contender(engine, PLAIN),
        "transformers": reference_contender(reference),
    }
    with progress_bar("latency", len(conversations)) as bar:
        races, skipped = race_conversations(
            engine, contenders, conversations, prompts.max_new_tokens, bar.advance
        )
    if not races:
        raise BenchError("no prompt fits the model's context; give shorter ones")
    result = summarise(races)
    num_bytes = weight_bytes(reference.model, config.quantization)
    traffic = WeightTraffic(
        weight_bytes=num_bytes,
        memory_gb_per_s=memory_gb_per_s,
        plain_gb_per_s=_gb_per_s(num_bytes, result.step_ms["plain"]),
        speculation_gb_per_s=_gb_per_s(num_bytes, result.step_ms["speculation"]),
    )
    extra = {"limit": traffic.describe(), **describe_cost(engine)}
    return setup.outcome(result, skipped, extra)


def describe_cost(engine: Engine) -> dict[str, object]:
    """Fields of the report: the step cost as it was measured on start."""
    costs = engine.speculator.stats().costs
    cost = None if costs is None else costs.measured
    return {
        "draft_ms": None if cost is None else cost.draft_s * 1e3,
        "cost_model": None
        if cost is None
        else {
            "num_tokens": list(cost.num_tokens),
            "forward_ms": [step_s * 1e3 for step_s in cost.step_s],
            "sequence_ms": cost.sequence_s * 1e3,
            "draft_sequence_ms": cost.draft_sequence_s * 1e3,
            "kv_token_ms": cost.kv_token_s * 1e3,
        },
    }


def _gb_per_s(num_bytes: int, step_ms: float) -> float:
    return num_bytes / (step_ms * 1e6) if step_ms > 0.0 else 0.0


COMMAND = Command(
    "latency",
    "Tokens per second at batch 1: speculation on, off, and transformers' generate.",
    run,
    common_settings(),
)
