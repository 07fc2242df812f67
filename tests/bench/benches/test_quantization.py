"""The comparison of two engines against one forward pass of plain transformers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.benches.quantization import (
    STEP_SIZES,
    ComparisonSums,
    Reader,
    compare_text,
    same_prefix_len,
    time_steps,
)
from bench.measure.reference import ReferenceModel
from server.engine.engine import Engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quantized(engine: Engine) -> Engine:
    return Engine.from_config(replace(engine.config, quantization="int8"))


@pytest.fixture(scope="module")
def reference(engine: Engine) -> ReferenceModel:
    return ReferenceModel(engine.loaded)


def slow_logits(reference: ReferenceModel, token_ids: list[int]) -> Tensor:
    """A forward pass for every position."""
    prefixes = [token_ids[: i + 1] for i in range(len(token_ids))]
    return torch.stack([reference.next_logits(prefix) for prefix in prefixes])


def text_of(num_tokens: int) -> list[int]:
    return torch.randint(3, 300, (num_tokens,), generator=torch.Generator().manual_seed(5)).tolist()


def test_a_text_is_read_in_chunks(engine: Engine, reference: ReferenceModel) -> None:
    text, reader = text_of(23), Reader(engine)
    with torch.inference_mode():
        chunks = [reader.read(text[:9], 0), reader.read(text[9:10], 9), reader.read(text[10:], 10)]

    torch.testing.assert_close(
        torch.cat(chunks), slow_logits(reference, text), rtol=1e-3, atol=1e-3
    )


def test_perplexities_are_those_of_prompt_and_answer(
    engine: Engine, reference: ReferenceModel
) -> None:
    text, texts = text_of(30), (ComparisonSums(), ComparisonSums())
    compare_text((Reader(engine), Reader(engine)), text[:12], text[12:], texts)

    log_probs_TV = slow_logits(reference, text).log_softmax(-1)
    nll = [-float(log_probs_TV[i, text[i + 1]]) for i in range(29)]
    for comparison, expected in zip(texts, (nll[:11], nll[11:]), strict=True):
        result = comparison.result()
        assert result.num_tokens == len(expected)
        perplexity = math.exp(sum(expected) / len(expected))
        assert result.plain_perplexity == pytest.approx(perplexity, rel=1e-3)
        assert result.quantized_perplexity == result.plain_perplexity
        assert result.greedy_agreement == 1.0
        assert result.divergence == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("prompt_len", "answer_len"), [(1, 300), (300, 1), (256, 256), (257, 40)])
def test_every_token_but_the_first_counts_once(
    engine: Engine, prompt_len: int, answer_len: int
) -> None:
    text, texts = text_of(prompt_len + answer_len), (ComparisonSums(), ComparisonSums())
    reader = Reader(engine)
    # A prompt of one token has nothing to count, and a mean over nothing is asked for nowhere.
    compare_text((reader, reader), text[:prompt_len], text[prompt_len:], texts)

    assert texts[0]._num_tokens == prompt_len - 1
    assert texts[1].result().num_tokens == answer_len


def test_a_comparison_counts_what_differs() -> None:
    comparison = ComparisonSums()
    plain = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    quantized = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    comparison.add([0, 1], plain, quantized)

    result = comparison.result()
    assert result.num_tokens == 2
    assert result.plain_perplexity == pytest.approx(math.sqrt(2 * 4))
    assert result.quantized_perplexity == pytest.approx(2.0)
    assert result.greedy_agreement == 0.5
    assert result.divergence == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)


def test_quantised_weights_differ_a_little(engine: Engine, quantized: Engine) -> None:
    text, texts = text_of(200), (ComparisonSums(), ComparisonSums())
    compare_text((Reader(engine), Reader(quantized)), text[:100], text[100:], texts)

    result = texts[1].result()
    assert 0.0 < result.divergence < 1.0
    assert 0.5 < result.greedy_agreement <= 1.0


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [((), (), 0), ((1, 2), (1, 2, 3), 2), ((1, 2, 3), (1, 9, 3), 1), ((4,), (5,), 0)],
)
def test_a_common_beginning_is_counted(
    left: tuple[int, ...], right: tuple[int, ...], length: int
) -> None:
    assert same_prefix_len(left, right) == length


def test_steps_of_every_size_are_timed(engine: Engine, quantized: Engine) -> None:
    steps = time_steps((Reader(engine), Reader(quantized)), engine.loaded.vocab_size)

    assert tuple(step.num_tokens for step in steps) == STEP_SIZES
    for step in steps:
        assert 0.0 < step.least_plain_ms <= step.plain_ms
        assert 0.0 < step.least_quantized_ms <= step.quantized_ms
        assert step.speedup == pytest.approx(step.plain_ms / step.quantized_ms)
