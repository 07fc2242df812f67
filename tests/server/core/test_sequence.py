"""A sequence's derived state: its seed, where its text ends, and where it stands."""

from server.config import SamplingParams
from server.core.request import Request, RequestStats
from server.core.sequence import request_seed
from tests.support.engine_tools import make_sequence

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.7)


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
        sequence.drafts_allowed, sequence.sources = 8, ("medusa",)
        assert sequence.stats() == RequestStats(
            num_prompt_tokens=1, method="medusa", acceptance="typical"
        )

    def test_without_drafts_what_ran_was_exact_whatever_the_rule(self) -> None:
        sequence = make_sequence((1,), (), SAMPLED)
        assert sequence.acceptance == "typical"
        assert sequence.stats() == RequestStats(
            num_prompt_tokens=1, method="none", acceptance="exact"
        )

    def test_stats_name_all_sources_in_their_order(self) -> None:
        sequence = make_sequence((1,), (), GREEDY)
        sequence.sources = ("mtp", "lookup")
        assert sequence.stats().method == "mtp+lookup"


class TestEndAmong:
    def test_an_end_token_is_the_last_of_the_text(self) -> None:
        sequence = make_sequence((9,), (), GREEDY)
        assert sequence.end_ids == {2}
        assert sequence.end_among([5, 2, 6]) == (2, "stop")
        assert sequence.end_among([5, 6]) == (2, None)

    def test_a_text_is_no_longer_than_asked_for(self) -> None:
        sequence = make_sequence((9,), (4, 4), SamplingParams(max_tokens=4))
        assert sequence.end_among([5, 6, 7]) == (2, "length")
        assert sequence.end_among([5]) == (1, None)
        assert sequence.end_among([5, 2, 7]) == (2, "stop"), "a stop comes before the length"

    def test_a_text_is_no_longer_than_the_model_allows(self) -> None:
        sequence = make_sequence((9, 9), (4,), SamplingParams(max_tokens=40))
        sequence.max_len = 4
        assert sequence.end_among([5, 6]) == (1, "length")
