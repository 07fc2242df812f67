"""`acceptance`: how many tokens a verify step emits, with the tree fixed at `--max-nodes`.

Greedy decoding with many requests in flight, which changes no output. All figures pool the verify
steps: a text counts by its number of steps.

Greedy text of a small model loops, and any drafter predicts a loop well. So the figure is also
reported without the verify steps that only continue a repetition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.benches.setup import (
    BATCH_ENGINE_OPTIONS,
    BatchOptions,
    PromptOptions,
    common_settings,
    prepare,
)
from bench.measure.report import Outcome
from bench.workload.dialogues import answer_turns
from bench.workload.tracing import NO_STEPS, StepCount, Trace, count_steps
from server.cli.console import progress_bar
from server.cli.options import Command, Settings
from server.config import EngineConfig, SpeculationParams

NGRAM_LEN = 8


@dataclass(frozen=True, slots=True)
class WithoutRepeats:
    """The figure over the verify steps whose first token ends no repeated n-gram."""

    mean_acceptance_length: float
    by_category: dict[str, float]
    num_steps: int
    share_of_steps: float
    ngram_len: int = NGRAM_LEN


@dataclass(frozen=True, slots=True)
class AcceptanceResult:
    """What the bench reports.

    Attributes:
        mean_acceptance_length: Tokens emitted per verify step, bonus token included.
        by_category: The same of each category's steps.
        mean_over_categories: Unweighted mean of `by_category`.
        accept_rate_by_depth: Entry d - 1: share of verify steps that emitted a draft token of
            depth d.
        mean_draft_tokens: Tree nodes below the root, per verify step.
    """

    mean_acceptance_length: float
    by_category: dict[str, float]
    mean_over_categories: float
    accept_rate_by_depth: tuple[float, ...]
    without_repeats: WithoutRepeats
    num_outputs: int
    num_output_tokens: int
    num_steps: int
    mean_draft_tokens: float


def repeated_positions(token_ids: Sequence[int], ngram_len: int = NGRAM_LEN) -> list[bool]:
    """Mark every position that ends a repeated n-gram.

    Position i is a repeat if the `ngram_len` tokens that end at i, `token_ids[i - n + 1 : i + 1]`,
    also end at some earlier position; the two may overlap. The first n - 1 positions never are.
    """
    seen: set[tuple[int, ...]] = set()
    repeats = [False] * len(token_ids)
    for end in range(ngram_len, len(token_ids) + 1):
        ngram = tuple(token_ids[end - ngram_len : end])
        repeats[end - 1] = ngram in seen
        seen.add(ngram)
    return repeats


def count_fresh_steps(trace: Trace) -> StepCount:
    """The verify steps of an output whose first token ends no repeat in prompt and output."""
    repeats = repeated_positions(trace.prompt_token_ids + trace.token_ids)
    first = len(trace.prompt_token_ids)
    fresh = [step for step in trace.steps if not repeats[first + step.start]]
    return StepCount(len(fresh), sum(step.num_tokens for step in fresh))


def accept_rates(traces: Sequence[Trace]) -> tuple[float, ...]:
    """Share of all verify steps that emitted a draft token of depth 1, 2, and so on."""
    num_steps = sum(trace.stats.num_steps for trace in traces)
    depth = max((len(trace.stats.accepted_per_depth) for trace in traces), default=0)
    counts = [0] * depth
    for trace in traces:
        for index, count in enumerate(trace.stats.accepted_per_depth):
            counts[index] += count
    return tuple(count / num_steps for count in counts)


def summarise(traces: Sequence[Trace], categories: Sequence[str]) -> AcceptanceResult:
    """Pool the verify steps of all outputs; `categories` go with `traces`."""
    every: dict[str, StepCount] = {}
    fresh: dict[str, StepCount] = {}
    for trace, category in zip(traces, categories, strict=True):
        every[category] = every.get(category, NO_STEPS) + count_steps(trace)
        fresh[category] = fresh.get(category, NO_STEPS) + count_fresh_steps(trace)
    total, total_fresh = sum(every.values(), NO_STEPS), sum(fresh.values(), NO_STEPS)
    by_category = _means(every)
    num_draft_tokens = sum(trace.stats.num_draft_tokens for trace in traces)
    return AcceptanceResult(
        mean_acceptance_length=total.mean,
        by_category=by_category,
        mean_over_categories=sum(by_category.values()) / max(len(by_category), 1),
        accept_rate_by_depth=accept_rates(traces),
        without_repeats=WithoutRepeats(
            mean_acceptance_length=total_fresh.mean,
            by_category=_means(fresh),
            num_steps=total_fresh.num_steps,
            share_of_steps=total_fresh.num_steps / max(total.num_steps, 1),
        ),
        num_outputs=len(traces),
        num_output_tokens=sum(len(trace.token_ids) for trace in traces),
        num_steps=total.num_steps,
        mean_draft_tokens=num_draft_tokens / max(total.num_steps, 1),
    )


def _means(counts: dict[str, StepCount]) -> dict[str, float]:
    return {category: count.mean for category, count in counts.items() if count.num_steps}


def run(
    prompts: PromptOptions,
    config: EngineConfig,
    speculation: SpeculationParams,
    batch: BatchOptions,
) -> Outcome:
    """Answer the prompts and count what the verify steps emitted.

    Raises:
        BenchError: If no prompt fits the context.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    setup = prepare(prompts, batch.applied(config), speculation)
    conversations = setup.workload.conversations
    with progress_bar("acceptance", len(conversations)) as bar:
        answered = answer_turns(
            setup.engine,
            conversations,
            lambda turn: turn.request(setup.greedy, setup.speculation),
            bar.advance,
        )
    categories = [turn.conversation.category for turn in answered.turns]
    return setup.outcome(summarise(answered.traces, categories), answered.skipped)


COMMAND = Command(
    "acceptance",
    "Mean acceptance length, in all, by category and by depth.",
    run,
    {**common_settings(BATCH_ENGINE_OPTIONS), "batch": Settings(BatchOptions)},
)
