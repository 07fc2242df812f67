"""A sequence's derived state: which rule verifies it, its seed, and where it stands."""

import pytest

from server.config import AcceptanceName, SamplingParams, SpeculationParams
from server.core.request import Request, RequestStats
from server.core.sequence import DraftSources, acceptance_rule, request_seed
from tests.support.engine_tools import make_sequence

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.7)
SEEDED = SamplingParams(temperature=0.7, seed=1)
LOGPROBS = SamplingParams(temperature=0.7, logprobs=0)


class TestAcceptanceRule:
    @pytest.mark.parametrize(
        ("sampling", "asked", "server", "rule"),
        [
            (SAMPLED, "auto", "auto", "typical"),
            (GREEDY, "auto", "auto", "exact"),
            (SEEDED, "auto", "auto", "exact"),
            (LOGPROBS, "auto", "auto", "exact"),
            (SAMPLED, "exact", "auto", "exact"),
            (SAMPLED, "auto", "exact", "exact"),
            (SAMPLED, "exact", "typical", "exact"),
            (SEEDED, "typical", "auto", "typical"),
            (SEEDED, "typical", "exact", "typical"),
            (LOGPROBS, "typical", "auto", "typical"),
            (GREEDY, "typical", "typical", "exact"),
            (GREEDY, "auto", "typical", "exact"),
            (SAMPLED, "auto", "typical", "typical"),
            (SEEDED, "auto", "typical", "exact"),
            (LOGPROBS, "auto", "typical", "exact"),
            (SEEDED, "typical", "typical", "typical"),
        ],
    )
    def test_the_request_is_asked_first_then_the_sampling_then_the_server(
        self, sampling: SamplingParams, asked: AcceptanceName, server: AcceptanceName, rule: str
    ) -> None:
        request = Request("r", (1,), sampling, SpeculationParams(acceptance=asked))
        assert acceptance_rule(request, server) == rule


class TestSeed:
    def test_is_what_the_request_says(self) -> None:
        assert request_seed(Request("r", (1,), SamplingParams(seed=7))) == 7

    def test_zero_is_a_seed(self) -> None:
        assert request_seed(Request("r", (1,), SamplingParams(seed=0))) == 0

    def test_is_never_the_same_without_one(self) -> None:
        request = Request("r", (1,), SAMPLED)
        assert len({request_seed(request) for _ in range(50)}) == 50


class TestSequence:
    def test_a_fresh_prompt_is_not_decoding(self) -> None:
        sequence = make_sequence((1, 2, 3), (), GREEDY)
        assert (sequence.num_uncomputed_tokens, sequence.is_decoding) == (3, False)

    def test_a_prompt_of_one_token_is_not_decoding_either(self) -> None:
        assert not make_sequence((1,), (), GREEDY).is_decoding

    def test_with_only_the_root_left_it_decodes(self) -> None:
        sequence = make_sequence((1, 2, 3), (4,), GREEDY)
        sequence.num_computed_tokens = 3
        assert sequence.is_decoding
        assert (sequence.num_prompt_tokens, sequence.num_output_tokens) == (3, 1)

    def test_after_a_preemption_it_prefills_again(self) -> None:
        assert not make_sequence((1, 2, 3), (4, 5), GREEDY).is_decoding

    def test_stats_name_the_method_and_the_rule(self) -> None:
        sequence = make_sequence((1,), (), SAMPLED)
        sequence.drafts_allowed, sequence.sources = 8, DraftSources("medusa")
        assert sequence.stats() == RequestStats(
            num_prompt_tokens=1, method="medusa", acceptance="typical"
        )

    def test_without_drafts_what_ran_was_exact_whatever_the_rule(self) -> None:
        sequence = make_sequence((1,), (), SAMPLED)
        assert sequence.acceptance == "typical"
        assert sequence.stats() == RequestStats(
            num_prompt_tokens=1, method="none", acceptance="exact"
        )
