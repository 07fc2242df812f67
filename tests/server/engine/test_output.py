"""Committing a verdict: stop conditions among accepted drafts, counts, and log-probabilities."""

from dataclasses import replace

import torch

from heads.calibration import Estimate
from heads.candidates import DraftTokens
from heads.tree import DraftTree
from server.config import SamplingParams
from server.core.request import TokenLogprob
from server.core.step import Landed, Outcome, StepEntry, Verdict, root_only
from server.engine.commit import commit
from server.engine.output import Emission, emit, request_output
from tests.support.engine_tools import byte_tokenizer, make_sequence
from tests.support.trees import chain

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
    drafts = DraftTokens(chain(len(drafted)), (generated[-1], *drafted))
    return StepEntry(sequence, 1, drafts, is_verified=True, is_decoding=True)


def emit_all(
    item: StepEntry, bonus: int, num_accepted: int | None = None, max_len: int = 100
) -> Emission:
    """Emit a verdict that accepts the first drafts of a chain."""
    return emit(commit_all(item, bonus, num_accepted, max_len))


def commit_all(
    item: StepEntry, bonus: int, num_accepted: int | None = None, max_len: int = 100
) -> Outcome:
    """Commit a verdict that accepts the first drafts of a chain."""
    if num_accepted is None:
        num_accepted = item.drafts.tree.num_nodes - 1
    item.sequence.max_len = max_len
    item.sequence.num_computed_tokens = len(item.sequence.token_ids) - item.num_committed
    verdict = Verdict(tuple(range(num_accepted + 1)), bonus)
    return commit(item, Landed(verdict))


def predicted(item: StepEntry, places: tuple[int, ...]) -> StepEntry:
    """The same with drafts from those places of a prediction; -1 for drafts from elsewhere."""
    sequence = item.sequence
    sequence.request = replace(sequence.request, prediction_token_ids=(A,) * 9)
    estimates = tuple(Estimate(0.5, 0.5, 0.5, "lookup", 0, place) for place in places)
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
        (processor,) = item.sequence.processors
        penalties = -processor.apply(torch.zeros(320), [])
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
        outcome = commit_all(item, bonus=C)
        first = request_output(outcome, emit(outcome))
        outcome = commit_all(item, bonus=D, num_accepted=0)
        second = request_output(outcome, emit(outcome))
        assert (first.text, second.text) == ("abc", "d")
        assert first.stats is None
        assert second.stats is not None
        assert (second.stats.num_prompt_tokens, second.stats.num_cached_tokens) == (2, 1)
        assert (second.stats.num_output_tokens, second.stats.num_steps) == (5, 2)

    def test_says_whether_it_comes_from_a_verify_step(self) -> None:
        item = chain_item((), SamplingParams(max_tokens=50))
        for is_decoding in (True, False):
            outcome = commit_all(replace(item, is_decoding=is_decoding), bonus=C)
            assert request_output(outcome, emit(outcome)).is_verify_step == is_decoding

    def test_there_is_no_log_probability_of_tokens_that_were_cut_off(self) -> None:
        entries = tuple(TokenLogprob(token_id, -1.0, ()) for token_id in (A, B, C, D))
        verdict = Verdict((0, 1, 2, 3), D)
        for sampling in (
            SamplingParams(max_tokens=50, logprobs=1, stop=("ab",)),
            SamplingParams(max_tokens=3, logprobs=1),
        ):
            outcome = commit(chain_item((A, B, C), sampling), Landed(verdict, entries))
            output = request_output(outcome, emit(outcome))
            assert output.logprobs == entries[:2]


class TestCommit:
    def test_all_tokens_but_the_next_root_are_computed(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=50))
        commit_all(item, bonus=D, num_accepted=2)
        sequence = item.sequence
        assert sequence.token_ids[-4:] == [E, A, B, D]
        assert sequence.num_computed_tokens == len(sequence.token_ids) - 1

    def test_a_chunk_of_a_prompt_is_computed_whole(self) -> None:
        sequence = make_sequence((A, B, C, D), (), SamplingParams())
        item = StepEntry(sequence, 3, root_only(sequence), is_verified=False, is_decoding=False)
        outcome = commit(item, Landed())
        assert sequence.num_computed_tokens == 3
        assert (outcome.token_ids, outcome.path, outcome.finish_reason) == ((), (), None)

    def test_tokens_behind_a_stop_string_are_taken_back(self) -> None:
        item = chain_item((A, B, C), SamplingParams(max_tokens=50, stop=("a",)))
        outcome = commit_all(item, bonus=D)
        assert item.sequence.token_ids[-4:] == [A, B, C, D]
        assert outcome.finish_reason is None
        emission = emit(outcome)
        assert (emission.token_ids, emission.finish_reason) == ((A,), "stop")
        assert item.sequence.token_ids[-2:] == [E, A]
        assert item.sequence.num_computed_tokens == len(item.sequence.token_ids) - 1
        assert item.sequence.stats().num_emitted_tokens == 1
