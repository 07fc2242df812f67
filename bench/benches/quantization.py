"""`quantization`: what quantised weights gain in seconds a step, and what they cost in quality.

Two engines over the same model, one with plain weights, take turns. Texts are the prompts, which
people wrote, and the plain engine's greedy answers to them. Both engines read these texts and say
how they would continue them; then both answer freely. Steps of growing size are timed in turn, so
that other load on the machine affects both alike.

Shapes: T tokens of a chunk, V vocabulary.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import median

import torch
from torch import Tensor

from bench.benches.setup import PLAIN, PromptOptions, build_engine, common_settings, prepare
from bench.errors import BenchError
from bench.measure.report import Outcome
from bench.measure.timing import device_waiter
from bench.workload.dialogues import Turn
from bench.workload.tracing import run_requests
from server.attention.backend import AttentionBatch, AttentionSpan
from server.cli.console import progress_bar
from server.cli.options import Command
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.engine.engine import Engine
from server.executor.batch import StepBatch
from server.executor.host import HostExecutor
from training.measure.perplexity import negative_log_likelihood

STEP_SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_LEN = 256
_NUM_REPEATS = 15
_CHUNK_LEN = 256


@dataclass(frozen=True, slots=True)
class TextComparison:
    """How two engines read the same texts.

    Attributes:
        num_tokens: Tokens of the texts after their first.
        plain_perplexity: Perplexity of these tokens with the plain weights.
        quantized_perplexity: Perplexity of the same tokens with the quantised weights.
        greedy_agreement: Share of positions at which both would continue with the same token.
        divergence: Mean Kullback-Leibler divergence of the quantised distribution from the plain
            one in nats.
    """

    num_tokens: int
    plain_perplexity: float
    quantized_perplexity: float
    greedy_agreement: float
    divergence: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of a forward pass over `num_tokens` tokens of one sequence, logits of all."""

    num_tokens: int
    plain_ms: float
    quantized_ms: float
    least_plain_ms: float
    least_quantized_ms: float
    speedup: float


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """What the bench reports.

    Attributes:
        prompts: How both read the prompts.
        answers: How both read the plain engine's answers.
        num_same_outputs: Outputs that are the same with plain and with quantised weights.
        same_share: Share of the output tokens that come before an output's first difference.
        num_speculation_differences: Outputs with quantised weights that speculation changed.
    """

    prompts: TextComparison
    answers: TextComparison
    num_outputs: int
    num_same_outputs: int
    same_share: float
    num_speculation_differences: int
    steps: tuple[StepTime, ...]


class Reader:
    """Runs an idle engine's model over tokens, in KV blocks that no request owns then.

    Raises:
        BenchError: If the engine's executor does not give the logits of a whole batch.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine.executor, HostExecutor):
            kind = type(engine.executor).__name__
            raise BenchError(f"quantization reads texts with HostExecutor, not with {kind}")
        self._engine = engine
        self._runner = engine.executor.runner
        self._wait_for_device = device_waiter(engine.loaded.device)

    def read(self, token_ids: Sequence[int], context_len: int) -> Tensor:
        """Logits [T, V] of tokens that follow `context_len` others, which were read before."""
        engine, num_tokens = self._engine, len(token_ids)
        positions_T = torch.arange(num_tokens, device=engine.loaded.device)
        slots_T = positions_T + context_len
        table = list(range(-(-(context_len + num_tokens) // engine.config.block_size)))
        span = AttentionSpan(0, num_tokens, context_len, table, None, None)
        output = self._runner.run(
            StepBatch(
                input_ids_T=torch.tensor(token_ids, device=engine.loaded.device),
                positions_T=slots_T,
                logits_rows_S=positions_T,
                attention=AttentionBatch((span,), slots_T),
                first_rows=(0,),
            )
        )
        self._wait_for_device()
        return output.logits_SV.float()


class ComparisonSums:
    """Sums over texts what two engines make of them."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, next_ids: Sequence[int], plain_TV: Tensor, quantized_TV: Tensor) -> None:
        """Count positions.

        Args:
            next_ids: The token that follows each position.
            plain_TV: Logits of the plain engine at these positions.
            quantized_TV: Logits of the quantised engine at these positions.
        """
        plain, quantized = plain_TV.log_softmax(-1), quantized_TV.log_softmax(-1)
        next_T = torch.tensor(next_ids, device=plain.device)
        sums = (
            negative_log_likelihood(plain_TV, next_T),
            negative_log_likelihood(quantized_TV, next_T),
            (plain.argmax(-1) == quantized.argmax(-1)).sum(),
            (plain.exp() * (plain - quantized)).sum(),
        )
        self._sums += torch.tensor([float(value) for value in sums], dtype=torch.float64)
        self._num_tokens += len(next_ids)

    def result(self) -> TextComparison:
        """The means; at least one position was counted."""
        plain, quantized, agreement, divergence = (self._sums / self._num_tokens).tolist()
        return TextComparison(
            num_tokens=self._num_tokens,
            plain_perplexity=math.exp(plain),
            quantized_perplexity=math.exp(quantized),
            greedy_agreement=agreement,
            divergence=divergence,
        )


@torch.inference_mode()
def compare_text(
    readers: Sequence[Reader],
    prompt: Sequence[int],
    answer: Sequence[int],
    into: Sequence[ComparisonSums],
) -> None:
    """Let both engines read a prompt and its answer.

    Args:
        readers: The plain engine's and the quantised engine's.
        prompt: At least one token.
        answer: Follows the prompt.
        into: Where the prompt's and where the answer's tokens count.
    """
    token_ids = [*prompt, *answer]
    last = len(token_ids) - 1
    for first in range(0, last, _CHUNK_LEN):
        end = min(first + _CHUNK_LEN, last)
        plain_TV, quantized_TV = (reader.read(token_ids[first:end], first) for reader in readers)
        split = min(max(len(prompt) - 1, first), end)
        for part, comparison in zip((slice(first, split), slice(split, end)), into, strict=True):
            rows = slice(part.start - first, part.stop - first)
            next_ids = token_ids[part.start + 1 : part.stop + 1]
            if next_ids:
                comparison.add(next_ids, plain_TV[rows], quantized_TV[rows])


def same_prefix_len(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens before the first difference."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def time_steps(readers: Sequence[Reader], vocab_size: int) -> tuple[StepTime, ...]:
    """Time steps of growing size after `CONTEXT_LEN` tokens, both engines in turn."""
    times = []
    for size in STEP_SIZES:
        token_ids = [(7 * i) % vocab_size for i in range(size)]
        samples: list[list[float]] = [[], []]
        for repeat in range(_NUM_REPEATS + 1):
            for reader, seconds in zip(readers, samples, strict=True):
                start = time.perf_counter()
                reader.read(token_ids, CONTEXT_LEN)
                elapsed_s = time.perf_counter() - start
                if repeat:  # everything runs once first
                    seconds.append(elapsed_s)
        plain_ms, quantized_ms = (1e3 * median(seconds) for seconds in samples)
        least_plain_ms, least_quantized_ms = (1e3 * min(seconds) for seconds in samples)
        times.append(
            StepTime(
                num_tokens=size,
                plain_ms=plain_ms,
                quantized_ms=quantized_ms,
                least_plain_ms=least_plain_ms,
                least_quantized_ms=least_quantized_ms,
                speedup=plain_ms / quantized_ms,
            )
        )
    return tuple(times)


class Answers:
    """Both engines' greedy answers: how far they agree, and what both make of the plain one's.

    Args:
        plain: Engine with plain weights.
        quantized: Engine with quantised weights.
        greedy: Sampling parameters of all answers.
        speculation: Request parameters of the answers with drafts.
    """

    def __init__(
        self,
        plain: Engine,
        quantized: Engine,
        greedy: SamplingParams,
        speculation: SpeculationParams,
    ) -> None:
        self._plain, self._quantized = plain, quantized
        self._greedy, self._speculation = greedy, speculation
        self._readers = (Reader(plain), Reader(quantized))
        self._texts = (ComparisonSums(), ComparisonSums())
        self._num_outputs = self._num_same = self._num_changed = 0
        self._num_tokens = self._num_same_tokens = 0

    def add(self, turn: Turn) -> None:
        """Answer a turn three times and read the plain answer."""
        expected = self._answer(self._plain, turn, self._speculation)
        answer = self._answer(self._quantized, turn, self._speculation)
        self._num_outputs += 1
        self._num_same += answer == expected
        self._num_changed += answer != self._answer(self._quantized, turn, PLAIN)
        self._num_tokens += len(expected)
        self._num_same_tokens += same_prefix_len(expected, answer)
        compare_text(self._readers, turn.prompt_token_ids, expected, self._texts)

    def result(self) -> QuantizationResult:
        """Everything that was counted, and step times."""
        prompts, answers = self._texts
        return QuantizationResult(
            prompts=prompts.result(),
            answers=answers.result(),
            num_outputs=self._num_outputs,
            num_same_outputs=self._num_same,
            same_share=self._num_same_tokens / self._num_tokens,
            num_speculation_differences=self._num_changed,
            steps=time_steps(self._readers, self._plain.loaded.vocab_size),
        )

    def _answer(
        self, engine: Engine, turn: Turn, speculation: SpeculationParams
    ) -> tuple[int, ...]:
        traces = run_requests(engine, [turn.request(self._greedy, speculation)])
        return traces[turn.key].token_ids


def run(prompts: PromptOptions, config: EngineConfig, speculation: SpeculationParams) -> Outcome:
    """Compare texts and answers of the first turns, and time steps.

    Raises:
        BenchError: If no prompt fits the context, or no quantisation is asked for.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    if config.quantization == "none":
        raise BenchError("quantization is 'none', which leaves nothing to compare; give 'int8'")
    setup = prepare(prompts, config, speculation)
    plain = build_engine(replace(config, quantization="none"))
    turns, skipped = setup.first_turns()
    answers = Answers(plain, setup.engine, setup.greedy, setup.speculation)
    with progress_bar("quantization", len(turns)) as bar:
        for turn in turns:
            answers.add(turn)
            bar.advance()
    return setup.outcome(answers.result(), skipped)


COMMAND = Command(
    "quantization",
    "Quantised weights against plain ones: step seconds, perplexity, agreement.",
    run,
    common_settings(quantization="int8"),
)
