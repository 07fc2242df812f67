"""`quality`: what typical acceptance gains over exact acceptance when sampling, and what it costs.

At each temperature the first turn of every prompt is answered three times, one request at a time
and in turn: decoded plainly, and with drafts under the exact and under the typical rule. Reported
are the speed and two measures of the texts: perplexity under the base model's own distribution (at
temperature 1) and the share of distinct n-grams. Exact acceptance samples as plain decoding does,
so a gap between those two is the noise of the measurement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.benches.setup import PLAIN, PromptOptions, common_settings, prepare
from bench.measure.reference import ReferenceModel
from bench.measure.report import Outcome
from bench.measure.timing import Timing, speed, time_request
from bench.workload.dialogues import Turn
from bench.workload.tracing import NO_STEPS, Trace, count_steps
from server.cli.console import progress_bar
from server.cli.options import Command
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.engine.engine import Engine
from training.measure.perplexity import negative_log_likelihood

TEMPERATURES = (0.7, 1.0)
NGRAM_LENGTHS = (1, 2, 3, 4)
_SEED = 20_000


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Speed and text of one way to decode.

    Attributes:
        decode_tokens_per_s: Speed of the tokens after each request's first.
        mean_acceptance_length: Tokens emitted per verify step.
        perplexity: Perplexity of all output tokens under the base model at temperature 1.
        distinct_ngrams: Entry n - 1: distinct n-grams by all n-grams, averaged over the outputs.
    """

    decode_tokens_per_s: float
    mean_acceptance_length: float
    perplexity: float
    distinct_ngrams: tuple[float, ...]
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class AtTemperature:
    """The three ways at one temperature."""

    temperature: float
    plain: TextQuality
    exact: TextQuality
    typical: TextQuality
    speedup_typical_vs_exact: float
    speedup_exact_vs_plain: float
    speedup_typical_vs_plain: float


@dataclass(frozen=True, slots=True)
class QualityResult:
    """What the bench reports."""

    by_temperature: tuple[AtTemperature, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One output with its clock and its summed negative log-likelihood in nats."""

    timing: Timing
    trace: Trace
    nll: float


def distinct_share(token_ids: Sequence[int], length: int) -> float:
    """Distinct n-grams by all n-grams of a text; 1.0 for a text shorter than one n-gram."""
    ngrams = [tuple(token_ids[i : i + length]) for i in range(len(token_ids) - length + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def describe(samples: Sequence[Sample]) -> TextQuality:
    """Pool the outputs of one way; there is at least one."""
    num_tokens = sum(len(sample.trace.token_ids) for sample in samples)
    steps = sum((count_steps(sample.trace) for sample in samples), NO_STEPS)
    return TextQuality(
        decode_tokens_per_s=speed([sample.timing for sample in samples]).decode_tokens_per_s,
        mean_acceptance_length=steps.mean,
        perplexity=math.exp(sum(sample.nll for sample in samples) / num_tokens),
        distinct_ngrams=tuple(
            sum(distinct_share(s.trace.token_ids, n) for s in samples) / len(samples)
            for n in NGRAM_LENGTHS
        ),
        num_output_tokens=num_tokens,
    )


def compare(
    temperature: float, plain: TextQuality, exact: TextQuality, typical: TextQuality
) -> AtTemperature:
    """Put the three ways side by side."""
    plain_speed, exact_speed = plain.decode_tokens_per_s, exact.decode_tokens_per_s
    return AtTemperature(
        temperature=temperature,
        plain=plain,
        exact=exact,
        typical=typical,
        speedup_typical_vs_exact=typical.decode_tokens_per_s / exact_speed,
        speedup_exact_vs_plain=exact_speed / plain_speed,
        speedup_typical_vs_plain=typical.decode_tokens_per_s / plain_speed,
    )


@torch.inference_mode()
def text_nll(reference: ReferenceModel, trace: Trace) -> float:
    """Negative log-likelihood in nats of an output after its prompt, from one forward pass."""
    num_output = len(trace.token_ids)
    token_ids = torch.tensor(
        [trace.prompt_token_ids + trace.token_ids], device=reference.model.device
    )
    output = reference.model(input_ids=token_ids[:, :-1], logits_to_keep=num_output)
    return negative_log_likelihood(output.logits[0], token_ids[0, -num_output:])


def run(prompts: PromptOptions, config: EngineConfig, speculation: SpeculationParams) -> Outcome:
    """Answer the prompts under every rule and temperature.

    Raises:
        BenchError: If no prompt fits the context.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    setup = prepare(prompts, config, speculation)
    reference = ReferenceModel(setup.engine.loaded)
    turns, skipped = setup.first_turns()
    ways = {
        "plain": PLAIN,
        "exact": replace(setup.speculation, acceptance="exact"),
        "typical": replace(setup.speculation, acceptance="typical"),
    }
    results = []
    with progress_bar("quality", len(turns) * len(TEMPERATURES)) as bar:
        for temperature in TEMPERATURES:
            samples: dict[str, list[Sample]] = {name: [] for name in ways}
            for index, turn in enumerate(turns):
                sampling = replace(setup.greedy, temperature=temperature, seed=_SEED + index)
                for name, way in ways.items():
                    samples[name].append(_sample(setup.engine, reference, turn, sampling, way))
                bar.advance()
            results.append(
                compare(temperature, **{name: describe(some) for name, some in samples.items()})
            )
    return setup.outcome(QualityResult(tuple(results)), skipped)


def _sample(
    engine: Engine,
    reference: ReferenceModel,
    turn: Turn,
    sampling: SamplingParams,
    speculation: SpeculationParams,
) -> Sample:
    timing, trace = time_request(engine, turn.request(sampling, speculation))
    return Sample(timing, trace, text_nll(reference, trace))


COMMAND = Command(
    "quality",
    "Typical against exact acceptance when sampling: speed, perplexity, variety.",
    run,
    common_settings(),
)
