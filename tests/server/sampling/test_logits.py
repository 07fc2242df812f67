"""From logits to the target distribution: against transformers' own processors and naive oracles.

Shapes: X rows, V vocabulary.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.config import SamplingParams
from server.core.processor import LogitProcessor
from server.core.request import Request
from server.sampling.logits import draw_tokens, filter_logits
from server.sampling.processors import make_processors
from tests.support.slow_sampling import Filtered, adjust_slowly, draw_slowly, filter_slowly, softmax

VOCAB = 40
CPU = torch.device("cpu")
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def random_logits(seed: int, num_rows: int = 1, vocab_size: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4


def processors_of(
    params: SamplingParams, prompt: Sequence[int], vocab_size: int = VOCAB
) -> tuple[LogitProcessor, ...]:
    return make_processors(Request("r", tuple(prompt), params), vocab_size, CPU)


def adjust(
    params: SamplingParams,
    logits_V: Tensor,
    prompt: Sequence[int] = (1,),
    generated: Sequence[int] = (),
    path: Sequence[int] = (),
) -> Tensor:
    for processor in processors_of(params, prompt, len(logits_V)):
        processor.commit(generated)
        logits_V = processor.apply(logits_V, path)
    return logits_V


class TestPenalties:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 999),
        prompt=PROMPTS,
        generated=TOKENS,
        penalty=st.sampled_from([0.5, 0.9, 1.1, 1.3, 2.0]),
    )
    def test_repetition_penalty_is_that_of_transformers(
        self, seed: int, prompt: list[int], generated: list[int], penalty: float
    ) -> None:
        logits_XV = random_logits(seed)
        ours = adjust(SamplingParams(repetition_penalty=penalty), logits_XV[0], prompt, generated)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([prompt + generated]), logits_XV.clone()
        )
        assert torch.equal(ours, theirs[0])

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 999),
        prompt=PROMPTS,
        generated=TOKENS,
        path=TOKENS,
        presence=st.sampled_from([-2.0, 0.0, 0.7]),
        frequency=st.sampled_from([-1.0, 0.0, 0.3]),
        repetition=st.sampled_from([1.0, 1.4]),
        bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 3.0]), max_size=3),
    )
    def test_all_penalties_together_follow_the_formulas_along_a_draft_path(
        self,
        seed: int,
        prompt: list[int],
        generated: list[int],
        path: list[int],
        presence: float,
        frequency: float,
        repetition: float,
        bias: dict[int, float],
    ) -> None:
        params = SamplingParams(
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias=bias,
        )
        logits_V = random_logits(seed)[0]
        ours = adjust(params, logits_V, prompt, generated, path)
        expected = adjust_slowly(params, logits_V.tolist(), prompt, generated + path)
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-5)

    def test_prompt_tokens_count_for_repetition_but_not_for_presence_and_frequency(self) -> None:
        logits_V = torch.full((VOCAB,), 2.0)
        params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0)
        assert torch.equal(adjust(params, logits_V, prompt=[5, 5]), logits_V)
        params = SamplingParams(repetition_penalty=2.0)
        assert adjust(params, logits_V, prompt=[5, 5])[5] == 1.0

    def test_a_draft_path_is_forgotten_after_the_row(self) -> None:
        params = SamplingParams(frequency_penalty=1.0, presence_penalty=0.5)
        logits_V = random_logits(3)[0]
        (penalties,) = processors_of(params, [1])
        penalties.commit([2])
        before = penalties.apply(logits_V, [])
        penalties.apply(logits_V, [7, 7, 2])
        assert torch.equal(penalties.apply(logits_V, []), before)

    def test_the_given_logits_are_not_modified(self) -> None:
        params = SamplingParams(frequency_penalty=1.0, repetition_penalty=2.0, logit_bias={3: 1.0})
        logits_V = random_logits(4)[0]
        original = logits_V.clone()
        adjust(params, logits_V, [1], [2], [3])
        assert torch.equal(logits_V, original)

    def test_bias_alone_needs_no_earlier_token(self) -> None:
        logits_V = random_logits(5)[0]
        adjusted = adjust(SamplingParams(logit_bias={4: -100.0, 9: 2.5}), logits_V)
        expected = logits_V.clone()
        expected[4] -= 100.0
        expected[9] += 2.5
        assert torch.equal(adjusted, expected)

    def test_there_is_no_processor_where_nothing_is_to_process(self) -> None:
        assert not processors_of(SamplingParams(temperature=0.5), [1])
        for params in (
            SamplingParams(logit_bias={1: 1.0}),
            SamplingParams(presence_penalty=0.1),
            SamplingParams(frequency_penalty=0.1),
            SamplingParams(repetition_penalty=1.1),
        ):
            assert len(processors_of(params, [1])) == 1


def transformers_warpers(params: SamplingParams) -> LogitsProcessorList:
    """What `generate` builds from the same options, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers


SAMPLED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 10, VOCAB, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


class TestFilters:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 9999), params=SAMPLED)
    def test_temperature_top_k_top_p_and_min_p_are_those_of_transformers(
        self, seed: int, params: SamplingParams
    ) -> None:
        logits_XV = random_logits(seed)
        ours = filter_logits(logits_XV, [params])
        theirs = transformers_warpers(params)(torch.LongTensor([[0]]), logits_XV.clone())
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours, theirs)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 9999), params=SAMPLED)
    def test_probabilities_are_those_of_the_formulas(
        self, seed: int, params: SamplingParams
    ) -> None:
        logits_XV = random_logits(seed)
        expected = filter_slowly(logits_XV[0].tolist(), params)
        ours = filter_logits(logits_XV, [params]).double().softmax(-1)[0]
        torch.testing.assert_close(ours.tolist(), expected.probabilities, rtol=1e-4, atol=1e-9)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 9999), params=st.lists(SAMPLED, min_size=1, max_size=5))
    def test_a_row_does_not_depend_on_its_neighbours(
        self, seed: int, params: list[SamplingParams]
    ) -> None:
        logits_XV = random_logits(seed, len(params))
        together = filter_logits(logits_XV, params)
        for row, row_params in enumerate(params):
            alone = filter_logits(logits_XV[row : row + 1], [row_params])
            assert torch.equal(together[row], alone[0])

    @pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
    @pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
    def test_a_nucleus_wider_than_the_first_guess_is_found_in_full(
        self, top_p: float, spread: float
    ) -> None:
        logits_XV = random_logits(1, vocab_size=2000) * spread / 4
        params = SamplingParams(top_p=top_p)
        ours = filter_logits(logits_XV, [params])
        theirs = TopPLogitsWarper(top_p)(torch.tensor([[0]]), logits_XV.clone())
        assert int(ours.isinf().ne(theirs.isinf()).sum()) <= 1, "float rounding at the border"
        probabilities = logits_XV[0].double().softmax(0)
        kept = ours[0].isfinite()
        mass = probabilities[kept].sum()
        assert mass >= top_p - 1e-9
        assert mass - probabilities[kept].min() < top_p + 1e-9

    def test_a_greedy_row_keeps_its_logits(self) -> None:
        logits_XV = random_logits(2, 2)
        greedy = SamplingParams(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)
        filtered = filter_logits(logits_XV, [greedy, SamplingParams(temperature=0.5)])
        assert torch.equal(filtered[0], logits_XV[0])
        assert torch.equal(filtered[1], logits_XV[1] / 0.5)

    def test_the_given_logits_are_not_modified(self) -> None:
        logits_XV = random_logits(3)
        original = logits_XV.clone()
        filter_logits(logits_XV, [SamplingParams(top_k=2, top_p=0.5, min_p=0.5)])
        assert torch.equal(logits_XV, original)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 999), params=SAMPLED)
    def test_the_most_probable_token_always_survives(
        self, seed: int, params: SamplingParams
    ) -> None:
        logits_XV = random_logits(seed)
        filtered = filter_logits(logits_XV, [params])
        assert filtered[0, logits_XV[0].argmax()].isfinite()

    @pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-30, 1e-320])
    def test_a_tiny_temperature_is_nearly_greedy_and_never_a_nan(self, temperature: float) -> None:
        logits_XV = random_logits(4) * 10
        params = SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1)
        filtered = filter_logits(logits_XV, [params])
        assert not filtered.isnan().any()
        assert draw_tokens(filtered, [0.999]).item() == logits_XV.argmax().item()

    def test_tokens_banned_by_bias_stay_improbable_under_every_filter(self) -> None:
        logits_V = adjust(SamplingParams(logit_bias={0: -100.0}), torch.zeros(VOCAB))
        filtered = filter_logits(logits_V[None], [SamplingParams(top_p=0.999)])
        assert filtered[0, 0].isinf()
        assert filtered[0, 1:].isfinite().all()


class TestDrawTokens:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 9999),
        params=SAMPLED,
        uniform=st.floats(0.0, 1.0, exclude_max=True),
    )
    def test_is_the_inverse_of_the_cumulative_distribution(
        self, seed: int, params: SamplingParams, uniform: float
    ) -> None:
        filtered = filter_logits(random_logits(seed), [params])
        expected = draw_slowly(Filtered(softmax(filtered[0].tolist())), uniform)
        if expected.margin > 1e-9:
            assert draw_tokens(filtered, [uniform]).tolist() == [expected.token_id]

    @pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53])
    @pytest.mark.parametrize("possible", [[0], [3], [39], [1, 38], [10, 11, 12]])
    def test_a_token_of_probability_zero_is_never_drawn(
        self, uniform: float, possible: list[int]
    ) -> None:
        logits_XV = torch.full((1, VOCAB), float("-inf"))
        logits_XV[0, possible] = random_logits(5)[0, possible]
        assert draw_tokens(logits_XV, [uniform]).item() in possible

    def test_a_token_whose_probability_underflows_is_never_drawn(self) -> None:
        logits_XV = torch.tensor([[-2000.0, 0.0, -2000.0, 0.0, -2000.0]])
        drawn = {int(draw_tokens(logits_XV, [u])) for u in (0.0, 0.4999, 0.5, 1.0 - 2.0**-53)}
        assert drawn == {1, 3}

    def test_rows_are_drawn_on_their_own(self) -> None:
        logits_XV = random_logits(6, 5)
        uniforms = [0.1, 0.9, 0.3, 0.0, 0.7]
        together = draw_tokens(logits_XV, uniforms)
        assert together.dtype == torch.int64
        for row, uniform in enumerate(uniforms):
            assert draw_tokens(logits_XV[row : row + 1], [uniform])[0] == together[row]

    def test_the_borders_between_tokens_lie_at_the_cumulative_probabilities(self) -> None:
        logits_XV = torch.tensor([[0.5, 0.25, 0.25]]).log()
        cases = {0.0: 0, 0.4999: 0, 0.5001: 1, 0.7499: 1, 0.7501: 2, 0.9999: 2}
        for uniform, token_id in cases.items():
            assert draw_tokens(logits_XV, [uniform]).item() == token_id

    def test_a_broken_row_still_gives_a_token_of_the_vocabulary(self) -> None:
        # An id beyond the embedding would take the engine and all other requests down.
        drawn = draw_tokens(torch.full((1, VOCAB), float("nan")), [0.5])
        assert 0 <= int(drawn) < VOCAB


@pytest.mark.gpu
class TestOnCuda:
    def test_the_target_distribution_is_that_of_the_cpu(self) -> None:
        params = [SamplingParams(top_p=0.9), SamplingParams(temperature=0.5, top_k=7, min_p=0.1)]
        logits_XV = random_logits(1, 2)
        slow, fast = filter_logits(logits_XV, params), filter_logits(logits_XV.cuda(), params)
        torch.testing.assert_close(fast.cpu(), slow)
        assert draw_tokens(fast, [0.3, 0.8]).tolist() == draw_tokens(slow, [0.3, 0.8]).tolist()
