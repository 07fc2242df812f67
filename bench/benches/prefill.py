"""`prefill`: what a cached prefix saves, and what a long prompt costs streams that decode.

*Reuse.* A conversation opens with a long message. The time to the first token of its second turn,
whose beginning is in the prefix cache, is compared with that of the first turn, each per token of
its prompt.

*Interference.* Streams decode, and a long prompt arrives. The rise of their latencies, while the
prompt is computed chunk by chunk, is compared with what the same chunks cost alone.

Both run on the engine, step by step, without HTTP. Every prompt begins with a number of its own,
so that none is in the cache.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.benches.setup import (
    ENGINE_OPTIONS,
    PLAIN,
    PromptOptions,
    Setup,
    common_settings,
    prepare,
    with_room,
)
from bench.errors import BenchError
from bench.load.interference import Interference, measure_interference
from bench.load.reuse import FOLLOW_UP_TOKENS, Reuse, measure_reuse
from bench.load.rounds import Arm
from bench.measure.report import Outcome
from bench.workload.conversations import UNCATEGORISED, Conversation
from bench.workload.dialogues import Turn
from bench.workload.long_prompts import LongPrompts
from server.cli.console import progress_bar
from server.cli.options import Command, Count, Settings
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.request import Request

_FOLLOW_UP = "Say the same in one sentence."
# Room for the follow-up, its answer, and what the chat template puts around two turns.
_DIALOGUE_TOKENS = 128
_log = logging.getLogger("euryale.bench")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOptions:
    """Sizes of the bench.

    Attributes:
        prompt_tokens: Tokens of a conversation's first message.
        long_prompt_tokens: Tokens of the prompt that arrives while streams decode.
        streams: Requests that decode when the long prompt arrives.
        rounds: Counted rounds.
    """

    prompt_tokens: Count = 2000
    long_prompt_tokens: Count = 4000
    streams: Count = 8
    rounds: Count = 5


@dataclass(frozen=True, slots=True)
class ArmRound:
    """What one round measured with speculation, or without."""

    reuse: Reuse
    interference: Interference


@dataclass(frozen=True, slots=True)
class ArmResult:
    """Medians of the rounds, and the rounds themselves.

    Attributes:
        ttft_per_token_ratio: Time to the first token per token of the prompt, second by first turn
            of a conversation.
        itl_p95_rise_ms: Rise of the 95th percentile of the streams' time per token, while the
            prompt is computed.
        chunk_gap_p95_rise_ms: The same rise of the time between their chunks.
        chunk_cost_p95_ms: What a chunk of the prompt costs alone.
        itl_rise_by_chunk_cost: `itl_p95_rise_ms` by this cost; up to 1, a stream waits no longer
            than the chunk takes.
        chunk_gap_rise_by_chunk_cost: `chunk_gap_p95_rise_ms` by this cost.
    """

    ttft_per_token_ratio: float
    first_ttft_ms: float
    second_ttft_ms: float
    itl_p95_rise_ms: float
    chunk_gap_p95_rise_ms: float
    chunk_cost_p95_ms: float
    itl_rise_by_chunk_cost: float
    chunk_gap_rise_by_chunk_cost: float
    rounds: tuple[ArmRound, ...]


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """What the bench reports; the plain figures are those with speculation.

    Attributes:
        rounds: Counted rounds.
        is_complete: Whether all rounds ran; False after an interrupt.
        auto: With speculation.
        off: Without.
    """

    rounds: int
    is_complete: bool
    ttft_per_token_ratio: float
    itl_p95_rise_ms: float
    chunk_gap_p95_rise_ms: float
    chunk_cost_p95_ms: float
    itl_rise_by_chunk_cost: float
    chunk_gap_rise_by_chunk_cost: float
    auto: ArmResult
    off: ArmResult


def summarise(rounds: Sequence[dict[Arm, ArmRound]], is_complete: bool) -> PrefillResult:
    """Put the rounds together; there is at least one."""
    auto = arm_result([each["auto"] for each in rounds])
    return PrefillResult(
        rounds=len(rounds),
        is_complete=is_complete,
        ttft_per_token_ratio=auto.ttft_per_token_ratio,
        itl_p95_rise_ms=auto.itl_p95_rise_ms,
        chunk_gap_p95_rise_ms=auto.chunk_gap_p95_rise_ms,
        chunk_cost_p95_ms=auto.chunk_cost_p95_ms,
        itl_rise_by_chunk_cost=auto.itl_rise_by_chunk_cost,
        chunk_gap_rise_by_chunk_cost=auto.chunk_gap_rise_by_chunk_cost,
        auto=auto,
        off=arm_result([each["off"] for each in rounds]),
    )


def arm_result(rounds: Sequence[ArmRound]) -> ArmResult:
    """Medians over the rounds of one arm."""
    reuses = [each.reuse for each in rounds]
    runs = [each.interference for each in rounds]
    return ArmResult(
        ttft_per_token_ratio=median(reuse.ratio for reuse in reuses),
        first_ttft_ms=median(reuse.first.ttft_ms for reuse in reuses),
        second_ttft_ms=median(reuse.second.ttft_ms for reuse in reuses),
        itl_p95_rise_ms=median(run.itl_rise_ms for run in runs),
        chunk_gap_p95_rise_ms=median(run.chunk_gap_rise_ms for run in runs),
        chunk_cost_p95_ms=median(run.chunk_cost_ms.p95 for run in runs),
        itl_rise_by_chunk_cost=median(run.itl_rise_ms / run.chunk_cost_ms.p95 for run in runs),
        chunk_gap_rise_by_chunk_cost=median(
            run.chunk_gap_rise_ms / run.chunk_cost_ms.p95 for run in runs
        ),
        rounds=tuple(rounds),
    )


class PrefillRounds:
    """Runs the rounds.

    Args:
        setup: The engine is idle; it has a prefix cache, and room for the streams and one request
            more.
        turns: What the streams answer, in turn.
        sizes: Sizes of the prompts, numbers of streams and rounds.
    """

    def __init__(self, setup: Setup, turns: Sequence[Turn], sizes: PrefillOptions) -> None:
        self._setup = setup
        self._turns = turns
        self._sizes = sizes
        conversations = setup.workload.conversations
        texts = [text for conversation in conversations for text in conversation.turns]
        self._prompts = LongPrompts(setup.engine.tokenizer, texts)
        self._arms: Mapping[Arm, SpeculationParams] = {"auto": setup.speculation, "off": PLAIN}

    def run(self, into: list[dict[Arm, ArmRound]], on_run: Callable[[], None]) -> None:
        """Run all rounds, the first of which warms up and is not counted.

        Args:
            into: Gets each counted round as soon as both arms ran; they begin in turn.
            on_run: Called after each arm.
        """
        for number in range(self._sizes.rounds + 1):
            both: dict[Arm, ArmRound] = {}
            for arm in ("auto", "off") if number % 2 else ("off", "auto"):
                both[arm] = self._arm(self._arms[arm])
                on_run()
            if number:
                into.append(both)

    def _arm(self, speculation: SpeculationParams) -> ArmRound:
        engine = self._setup.engine
        turns = (self._prompts.text(self._sizes.prompt_tokens), _FOLLOW_UP)
        conversation = Conversation(1, UNCATEGORISED, turns)
        reuse = measure_reuse(engine, conversation, self._setup.greedy, speculation)
        chosen = [self._turns[i % len(self._turns)] for i in range(self._sizes.streams)]
        interference = measure_interference(
            engine,
            [
                self._endless(f"stream {i}", turn.prompt_token_ids, speculation)
                for i, turn in enumerate(chosen)
            ],
            self._long("prompt", speculation),
            self._long("prompt alone", speculation),
        )
        return ArmRound(reuse, interference)

    def _long(self, name: str, speculation: SpeculationParams) -> Request:
        token_ids = self._prompts.token_ids(self._sizes.long_prompt_tokens)
        return self._endless(name, token_ids, speculation)

    def _endless(
        self, name: str, token_ids: tuple[int, ...], speculation: SpeculationParams
    ) -> Request:
        room = self._setup.engine.max_model_len - len(token_ids)
        sampling = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        return Request(name, token_ids, sampling, speculation)


def check_lengths(context: int, max_new_tokens: int, sizes: PrefillOptions) -> None:
    """Reject prompts that the context has no room for.

    Args:
        context: Longest prompt plus output in tokens.
        max_new_tokens: Longest answer to a conversation's first message.
        sizes: Lengths of the prompts.

    Raises:
        BenchError: If a prompt is too long; names the longest that fits.
    """
    room = context - max_new_tokens - _DIALOGUE_TOKENS
    if sizes.prompt_tokens > room:
        raise BenchError(
            f"--prompt-tokens is {sizes.prompt_tokens}, but with an answer of "
            f"{max_new_tokens} tokens and {_DIALOGUE_TOKENS} for the second turn, the "
            f"context of {context} has room for {max(room, 0)}; give at most that, or a smaller "
            "--max-new-tokens"
        )
    if sizes.long_prompt_tokens > context - FOLLOW_UP_TOKENS:
        raise BenchError(
            f"--long-prompt-tokens is {sizes.long_prompt_tokens}, but the context of {context} has "
            f"room for {context - FOLLOW_UP_TOKENS}; give at most that"
        )


def run(
    prompts: PromptOptions,
    config: EngineConfig,
    speculation: SpeculationParams,
    sizes: PrefillOptions,
) -> Outcome:
    """Measure reuse and interference; an interrupt ends with the rounds until then.

    Raises:
        BenchError: If prompts do not fit the context, or the first counted round was interrupted.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    config = replace(with_room(config, sizes.streams + 1), prefix_caching=True)
    setup = prepare(prompts, config, speculation)
    engine = setup.engine
    check_lengths(engine.max_model_len, prompts.max_new_tokens, sizes)
    turns, skipped = setup.first_turns()
    rounds: list[dict[Arm, ArmRound]] = []
    is_complete = True
    try:
        with progress_bar("prefill", 2 * (sizes.rounds + 1)) as bar:
            PrefillRounds(setup, turns, sizes).run(rounds, bar.advance)
    except KeyboardInterrupt:
        is_complete = False
        _log.info("interrupted; the figures are those of the rounds until here")
    if not rounds:
        raise BenchError("interrupted before the first counted round; let it run longer")
    extra = {
        "prompt_tokens": sizes.prompt_tokens,
        "long_prompt_tokens": sizes.long_prompt_tokens,
        "streams": sizes.streams,
        "max_prefill_tokens": engine.config.max_prefill_tokens,
        "max_tokens_per_step": engine.config.max_tokens_per_step,
    }
    return setup.outcome(summarise(rounds, is_complete), skipped, extra)


COMMAND = Command(
    "prefill",
    "What a cached prefix saves, and what a long prompt costs the streams that decode meanwhile.",
    run,
    {
        **common_settings((*ENGINE_OPTIONS, "max_prefill_tokens")),
        "sizes": Settings(PrefillOptions),
    },
)
