"""Committing a verdict: stop conditions among accepted drafts, counts, and log-probabilities."""

from dataclasses import replace

import pytest
import torch

from heads.calibration import Estimate
from heads.candidates import DraftTokens
from heads.tree import DraftTree
from server.config import SamplingParams
from server.core.step import StepEntry
from server.engine.output import Emission, emit, request_output, token_logprobs
from server.sampling.verify import Verdict
from tests.support.engine_tools import byte_tokenizer, make_sequence

EOS = 2
TOKENIZER = byte_tokenizer()
A, B, C, D, E = (TOKENIZER.encode(letter)[0] for letter in "abcde")


def chain_item(
    drafted: tuple[int, ...], sampling: SamplingParams, generated: tuple[int, ...] = (E,)
) -> StepEntry:
    """A decoding sequence with a chain of drafts below its last token."""
    sequence = make_sequence((A, B), generated, sampling)
    for token_id in generated:
        sequence.text.add(token_id)
    sequence.text.take()
    drafts = DraftTokens(DraftTree.chain(len(drafted)), (generated[-1], *drafted))
    return StepEntry(sequence, 1, drafts, is_verified=True, is_decoding=True)


def emit_all(
    item: StepEntry, bonus: int, num_accepted: int | None = None, max_len: int = 100
) -> Emission:
    """Emit a verdict that accepts the first drafts of a chain."""
    if num_accepted is None:
        num_accepted = item.drafts.tree.num_nodes - 1
    verdict = Verdict(tuple(range(num_accepted + 1)), bonus)
    return emit(item, verdict, frozenset({EOS}), max_len)


def predicted(item: StepEntry, places: tuple[int, ...]) -> StepEntry:
    """The same with drafts from those places of a prediction; -1 for drafts from elsewhere."""
    sequence = item.sequence
    sequence.request = replace(sequence.request, prediction_token_ids=(A,) * 9)
    estimates = tuple(Estimate(0.5, 0.5, 0.5, 0, place) for place in places)
    return replace(item, drafts=replace(item.drafts, estimates=estimates))


class TestPredictionTokens:
    def counts(self, item: StepEntry) -> tuple[int, int]:
        stats = item.sequence.stats()
        return stats.num_accepted_prediction_tokens, stats.num_rejected_prediction_tokens

    def test_are_the_drafts_from_the_prediction(self) -> None:
        item = predicted(chain_item((A, B, C), SamplingParams(max_tokens=50)), (0, -1, 4))
        emit_all(item, bonus=D, num_accepted=2)
        assert self.counts(item) == (1, 1)

    def test_count_once_however_often_they_are_drafted(self) -> None:
        item = predicted(chain_item((A, B, C), SamplingParams(max_tokens=50)), (3, 4, 5))
        emit_all(item, bonus=D, num_accepted=1)
        assert self.counts(item) == (1, 2)
        emit_all(item, bonus=D, num_accepted=0)
        assert self.counts(item) == (1, 2)
        emit_all(item, bonus=D, num_accepted=3)
        assert self.counts(item) == (3, 0)

    def test_that_a_stop_cut_off_are_not_accepted(self) -> None:
        item = predicted(chain_item((A, B, C), SamplingParams(max_tokens=3)), (0, 1, 2))
        emit_all(item, bonus=D)
        assert self.counts(item) == (2, 1)

    def test_are_none_without_a_prediction(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=50))
        emit_all(item, bonus=D)
        assert self.counts(item) == (0, 0)


class TestEmit:
    def test_accepted_tokens_come_before_the_bonus_token_with_their_depths(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=50))
        emission = emit_all(item, bonus=D, num_accepted=2)
        assert emission.token_ids == (A, B, D)
        assert emission.depths == (1, 2, 0)
        assert emission.texts == ("a", "b", "d")
        assert emission.finish_reason is None
        assert item.sequence.token_ids[-3:] == [A, B, D]
        assert item.sequence.text.take() == "abd"

    def test_end_of_sequence_among_the_accepted_drafts_drops_the_rest(self) -> None:
        item = chain_item((A, EOS, C), SamplingParams(max_tokens=50))
        emission = emit_all(item, bonus=D)
        assert emission.token_ids == (A, EOS)
        assert emission.finish_reason == "stop"
        assert item.sequence.text.take() == "a"
        assert item.sequence.token_ids[-2:] == [A, EOS]
        assert item.sequence.stats().num_accepted_tokens == 2

    def test_end_of_sequence_can_be_ignored(self) -> None:
        item = chain_item((A, EOS, C), SamplingParams(max_tokens=50, ignore_eos=True))
        emission = emit_all(item, bonus=D)
        assert emission.token_ids == (A, EOS, C, D)
        assert emission.finish_reason is None
        assert item.sequence.text.take() == "acd"

    def test_max_tokens_cuts_an_accepted_path(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=3))
        emission = emit_all(item, bonus=D)
        assert emission.token_ids == (A, B)
        assert emission.finish_reason == "length"
        assert item.sequence.num_output_tokens == 3

    def test_the_longest_text_of_the_model_cuts_too(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=50))
        assert emit_all(item, bonus=D, max_len=5).token_ids == (A, B)

    def test_a_stop_string_across_accepted_drafts_cuts_the_step(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=50, stop=("ab",)))
        emission = emit_all(item, bonus=D)
        assert emission.token_ids == (A, B)
        assert emission.finish_reason == "stop"
        assert item.sequence.text.take() == ""

    def test_a_stop_string_that_began_in_an_earlier_step_is_found(self) -> None:
        item = chain_item((B, C), SamplingParams(max_tokens=50, stop=("abc",)), generated=(E, A))
        emission = emit_all(item, bonus=D)
        assert emission.token_ids == (B, C)
        assert item.sequence.text.take() == ""

    def test_held_text_comes_out_with_the_last_token(self) -> None:
        item = chain_item((), SamplingParams(max_tokens=2, stop=("ab",)))
        emission = emit_all(item, bonus=A)
        assert emission.finish_reason == "length"
        assert item.sequence.text.take() == "a"

    def test_stop_takes_precedence_over_length(self) -> None:
        item = chain_item((), SamplingParams(max_tokens=2))
        assert emit_all(item, bonus=EOS).finish_reason == "stop"

    def test_penalties_count_the_emitted_tokens_and_no_others(self) -> None:
        sampling = SamplingParams(max_tokens=3, frequency_penalty=1.0)
        item = chain_item((A, A, C), sampling)
        emit_all(item, bonus=D)
        adjuster = item.sequence.adjuster
        assert adjuster is not None
        penalties = -adjuster.apply(torch.zeros(320), [])
        assert penalties[[A, C, D, E]].tolist() == [2.0, 0.0, 0.0, 1.0]


class TestCounts:
    def test_count_what_was_emitted_after_a_stop(self) -> None:
        item = chain_item((A, EOS, C), SamplingParams(max_tokens=50))
        emit_all(item, bonus=D)
        stats = item.sequence.stats()
        assert stats.num_steps == 1
        assert stats.num_draft_tokens == 3
        assert stats.num_accepted_tokens == 2
        assert stats.num_emitted_tokens == 2
        assert stats.accepted_per_depth == (1, 1)
        assert stats.mean_acceptance_length == 2.0

    def test_the_token_that_ends_a_prompt_belongs_to_no_verify_step(self) -> None:
        sequence = make_sequence((A, B), (), SamplingParams(max_tokens=5))
        drafts = DraftTokens(DraftTree.root_only(), (B,))
        item = StepEntry(sequence, 2, drafts, is_verified=True, is_decoding=False)
        emit_all(item, bonus=C)
        assert sequence.stats().num_steps == 0
        assert sequence.stats().mean_acceptance_length == 0.0

    def test_add_up_over_steps_by_depth(self) -> None:
        sampling = SamplingParams(max_tokens=50)
        item = chain_item((A, B), sampling)
        emit_all(item, bonus=C, num_accepted=2)
        emit_all(item, bonus=C, num_accepted=0)
        emit_all(item, bonus=C, num_accepted=1)
        stats = item.sequence.stats()
        assert stats.accepted_per_depth == (2, 1)
        assert (stats.num_steps, stats.num_draft_tokens, stats.num_emitted_tokens) == (3, 6, 6)
        assert stats.mean_acceptance_length == 2.0


class TestRequestOutput:
    def test_tells_only_what_is_new_and_at_the_end_the_counts(self) -> None:
        item = chain_item((A, B), SamplingParams(max_tokens=5))
        item.sequence.num_cached_tokens = 1
        first = request_output(item, emit_all(item, bonus=C), None)
        second = request_output(item, emit_all(item, bonus=D, num_accepted=0), None)
        assert (first.text, second.text) == ("abc", "d")
        assert first.stats is None
        assert second.stats is not None
        assert (second.stats.num_prompt_tokens, second.stats.num_cached_tokens) == (2, 1)
        assert (second.stats.num_output_tokens, second.stats.num_steps) == (5, 2)

    def test_says_whether_it_comes_from_a_verify_step(self) -> None:
        item = chain_item((), SamplingParams(max_tokens=50))
        assert request_output(item, emit_all(item, bonus=C), None).is_verify_step
        ended_prompt = replace(item, is_decoding=False)
        assert not request_output(ended_prompt, emit_all(item, bonus=D), None).is_verify_step


class TestLogprobs:
    def test_are_those_of_the_raw_distribution_at_each_position(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits_NV = torch.randn(4, 320, generator=generator)
        item = chain_item((A, B, C), SamplingParams(max_tokens=50, logprobs=3, temperature=0.1))
        emission = emit_all(item, bonus=D, num_accepted=2)
        entries = token_logprobs(logits_NV, Verdict((0, 1, 2), D), emission, 3)
        expected = logits_NV.double().log_softmax(-1)
        for row, (token_id, entry) in enumerate(zip((A, B, D), entries, strict=True)):
            assert entry.token_id == token_id
            assert entry.logprob == pytest.approx(expected[row, token_id].item(), abs=1e-5)
            best = expected[row].topk(3)
            assert [top for top, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-5
            )

    def test_follow_the_accepted_nodes_of_a_tree(self) -> None:
        logits_NV = torch.randn(4, 320, generator=torch.Generator().manual_seed(1))
        emission = Emission((A, B), (1, 0), ("a", "b"), None)
        entries = token_logprobs(logits_NV, Verdict((0, 2), B), emission, 0)
        expected = logits_NV.log_softmax(-1)
        assert entries[0].logprob == pytest.approx(expected[0, A].item(), abs=1e-5)
        assert entries[1].logprob == pytest.approx(expected[2, B].item(), abs=1e-5)
        assert entries[0].top == ()

    def test_there_is_none_for_tokens_that_a_stop_cut_off(self) -> None:
        item = chain_item((A, EOS, C), SamplingParams(max_tokens=50, logprobs=1))
        emission = emit_all(item, bonus=D)
        entries = token_logprobs(torch.zeros(4, 320), Verdict((0, 1, 2, 3), D), emission, 1)
        assert [entry.token_id for entry in entries] == [A, EOS]

    def test_half_precision_logits_are_normalised_in_float32(self) -> None:
        logits_NV = torch.randn(1, 320, generator=torch.Generator().manual_seed(2)).bfloat16()
        emission = Emission((A,), (0,), ("a",), None)
        (entry,) = token_logprobs(logits_NV, Verdict((0,), A), emission, 0)
        expected = logits_NV.double().log_softmax(-1)[0, A].item()
        assert entry.logprob == pytest.approx(expected, abs=1e-5)
