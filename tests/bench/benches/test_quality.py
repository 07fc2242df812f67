import math
from pathlib import Path

import pytest

from bench.benches import quality
from bench.benches.quality import Sample, compare, describe, distinct_share, text_nll
from bench.benches.setup import PromptOptions
from bench.measure.reference import ReferenceModel
from bench.measure.timing import Timing
from bench.workload.tracing import Trace
from server.config import EngineConfig, SpeculationParams
from server.core.completion import StepSpan
from server.core.request import RequestStats
from server.engine.engine import Engine


def make_trace(token_ids: tuple[int, ...], prompt: tuple[int, ...] = (1,)) -> Trace:
    spans = tuple(StepSpan(start, 1) for start in range(1, len(token_ids)))
    return Trace(prompt, token_ids, "", "length", RequestStats(), spans)


def make_sample(token_ids: tuple[int, ...], decode_s: float, nll: float) -> Sample:
    timing = Timing(len(token_ids), request_s=decode_s + 1.0, first_token_s=1.0)
    return Sample(timing, make_trace(token_ids), nll)


@pytest.mark.parametrize(
    ("token_ids", "length", "share"),
    [
        ((5, 5, 5, 5), 1, 0.25),
        ((5, 6, 5, 6, 5), 2, 0.5),
        ((1, 2, 3), 1, 1.0),
        ((1, 2), 3, 1.0),
        ((), 1, 1.0),
    ],
)
def test_distinct_ngrams_are_counted_once(
    token_ids: tuple[int, ...], length: int, share: float
) -> None:
    assert distinct_share(token_ids, length) == share


def test_quality_pools_tokens_and_averages_variety() -> None:
    samples = [make_sample((1, 2, 3, 4), 1.0, 4.0), make_sample((7, 7), 1.0, 2.0)]
    pooled = describe(samples)
    assert pooled.perplexity == pytest.approx(math.exp(6.0 / 6))
    assert pooled.distinct_ngrams[0] == pytest.approx((1.0 + 0.5) / 2)
    assert pooled.decode_tokens_per_s == pytest.approx((3 + 1) / 2.0)
    assert pooled.mean_acceptance_length == 1.0
    assert pooled.num_output_tokens == 6


def test_speedups_compare_decoding_speeds() -> None:
    slow, fast = (describe([make_sample((1, 2, 3), s, 1.0)]) for s in (2.0, 1.0))
    result = compare(0.7, plain=slow, exact=slow, typical=fast)
    assert result.speedup_typical_vs_exact == pytest.approx(2.0)
    assert result.speedup_exact_vs_plain == pytest.approx(1.0)
    assert result.speedup_typical_vs_plain == pytest.approx(2.0)


def test_likelihood_equals_one_token_at_a_time(engine: Engine) -> None:
    reference = ReferenceModel(engine.loaded)
    trace = make_trace((9, 40, 7), prompt=(1, 30, 12))
    expected = 0.0
    for index, token_id in enumerate(trace.token_ids):
        prefix = trace.prompt_token_ids + trace.token_ids[:index]
        expected -= float(reference.next_logits(prefix).log_softmax(-1)[token_id])
    assert text_nll(reference, trace) == pytest.approx(expected, rel=1e-4)


def test_bench_reports_three_ways_at_each_temperature(model_dir: Path, heads_dir: Path) -> None:
    prompts = PromptOptions(limit=2, max_new_tokens=8)
    config = EngineConfig(model=str(model_dir), heads=str(heads_dir), device="cpu", max_nodes=6)
    result = quality.run(prompts, config, SpeculationParams()).result
    assert [entry.temperature for entry in result.by_temperature] == list(quality.TEMPERATURES)
    for entry in result.by_temperature:
        for way in (entry.plain, entry.exact, entry.typical):
            assert way.perplexity > 1.0
            assert way.num_output_tokens > 0
        # With one seed both sample the same text, so their quality is the same.
        assert entry.exact.perplexity == pytest.approx(entry.plain.perplexity, rel=1e-3)
