"""The engine's own promises: reproducibility, cancellation, prefix reuse, counters, refusals."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from server.config import SpeculationParams
from server.core.completion import Completion, join_outputs
from server.core.request import Request, RequestOutput
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from server.speculation.cost_model import CostModel
from server.tokenizer import Tokenizer
from tests.support.engine_tools import (
    NUM_HEADS,
    NUM_RANKS,
    SlowModel,
    assert_as_expected,
    byte_tokenizer,
    known_continuation,
    make_engine,
    make_request,
    random_prompt,
    tiny_reference,
)

ORACLE = SlowModel()
PROMPT = random_prompt(11, 14)


def complete(engine: Engine, request: Request) -> Completion:
    return engine.generate([request])[0]


def always_right(request: Request) -> Engine:
    text = PROMPT + ORACLE.complete(request).token_ids
    return make_engine(script=known_continuation({request.request_id: text}, right_share=1.0))


class TestReproducibility:
    @pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
    def test_a_seeded_text_is_the_same_with_any_tree_any_drafts_and_any_neighbours(
        self, temperature: float
    ) -> None:
        def ask() -> Request:
            return make_request(PROMPT, max_tokens=20, temperature=temperature, seed=3)

        expected = ORACLE.complete(ask())
        noise = [make_request(random_prompt(i, 5 * i), max_tokens=9) for i in range(1, 4)]
        right = ask()
        for engine, request, others in (
            (make_engine(heads="none"), ask(), []),
            (make_engine(max_nodes=2), ask(), []),
            (make_engine(max_nodes=16, max_tokens_per_step=64), ask(), noise),
            (make_engine(max_nodes=8, max_tokens_per_step=9), ask(), noise),
            (always_right(right), right, []),
            (make_engine(prefix_caching=False, block_size=1), ask(), noise),
        ):
            assert_as_expected(engine.generate([request, *others])[0], expected)

    def test_unseeded_samples_differ_from_run_to_run(self) -> None:
        texts = {
            complete(make_engine(), make_request(PROMPT, max_tokens=12, temperature=1.5)).token_ids
            for _ in range(4)
        }
        assert len(texts) == 4

    @pytest.mark.parametrize("acceptance", ["exact", "typical"])
    def test_both_rules_are_truly_random_without_a_seed(self, acceptance: str) -> None:
        speculation = SpeculationParams(
            acceptance="typical" if acceptance == "typical" else "exact"
        )
        requests = [
            make_request(PROMPT, speculation, max_tokens=12, temperature=1.5) for _ in range(4)
        ]
        completions = make_engine().generate(requests)
        assert len({completion.token_ids for completion in completions}) == 4
        assert {completion.stats.acceptance for completion in completions} == {acceptance}

    def test_preemption_does_not_change_a_text(self) -> None:
        def ask() -> list[Request]:
            return [
                make_request(random_prompt(i, 6), max_tokens=26, temperature=0.8, seed=i)
                for i in range(4)
            ]

        engine = make_engine(num_blocks=14, block_size=4)
        completions = engine.generate(ask())
        assert engine.counters.num_preemptions >= 2
        for completion, request in zip(completions, ask(), strict=True):
            assert_as_expected(completion, ORACLE.complete(request))


class TestDrafts:
    def test_right_drafts_save_steps_and_are_counted_by_depth(self) -> None:
        request = make_request(PROMPT, max_tokens=21, ignore_eos=True)
        engine = always_right(request)
        completion = complete(engine, request)
        assert_as_expected(completion, ORACLE.complete(request))
        stats = completion.stats
        assert stats.num_steps == 5, "20 tokens after the first, 4 by a step"
        assert stats.accepted_per_depth == (5, 5, 5)
        assert stats.mean_acceptance_length == 4.0
        assert engine.counters.num_accepted_tokens == 15
        assert engine.counters.num_verify_steps == 5

    def test_the_heads_see_the_state_that_the_root_was_drawn_from(self) -> None:
        seen: list[tuple[tuple[int, ...], Tensor]] = []
        requests = [
            make_request(random_prompt(i, 9 + i), max_tokens=12, ignore_eos=True) for i in range(3)
        ]
        texts = {r.request_id: r.prompt_token_ids + ORACLE.complete(r).token_ids for r in requests}
        sometimes_right = known_continuation(texts, 0.7)

        def record(request_id: str, text: tuple[int, ...], hidden_D: Tensor) -> list[list[int]]:
            seen.append((text, hidden_D.clone()))
            return sometimes_right(request_id, text, hidden_D)

        make_engine(script=record, max_tokens_per_step=16).generate(requests)
        assert len(seen) > 15
        for token_ids, hidden_D in seen:
            with torch.inference_mode():
                output = tiny_reference()(
                    torch.tensor([token_ids[:-1]]), output_hidden_states=True, use_cache=False
                )
            expected = output.hidden_states[-1][0, -1]
            torch.testing.assert_close(hidden_D, expected, rtol=1e-3, atol=1e-3)

    def test_candidates_of_an_earlier_position_are_never_drafted(self) -> None:
        # Alone a sequence gets a tree; for two together trees cost too much and no head runs.
        costs = CostModel((1, 2, 3, 4), (1.0, 1.0, 50.0, 100.0), draft_s=0.0)
        proposed_at: set[int] = set()

        def propose(request_id: str, text: tuple[int, ...], hidden_D: Tensor) -> list[list[int]]:
            proposed_at.add(len(text))
            return [[5, 6, 7]] * NUM_HEADS

        engine = make_engine(script=propose, costs=costs)
        long = make_request(PROMPT, max_tokens=30, ignore_eos=True)
        engine.add_request(long)
        (sequence,) = engine._scheduler.waiting
        counters, length, num_drafted = sequence.counters, len(PROMPT), 0
        loads: list[int] = []
        while engine.has_unfinished:
            if length == len(PROMPT) + 8:
                engine.add_request(make_request(random_prompt(8, 5), max_tokens=9, ignore_eos=True))
            outputs = {output.request_id: output for output in engine.step()}
            loads.append(engine.num_running)
            if long.request_id in outputs:
                drafted = counters.num_draft_tokens
                if drafted > num_drafted:
                    assert length in proposed_at
                num_drafted = drafted
                length += len(outputs[long.request_id].token_ids)
        assert num_drafted > 10
        assert loads.count(2) > 5

    def test_what_was_foretold_is_measured_too(self) -> None:
        costs = CostModel((1, 8, 32), (0.001, 0.0011, 0.0012), draft_s=0.0001)
        engine = make_engine(costs=costs)
        prompts = [random_prompt(seed, length) for seed, length in ((1, 3), (2, 40), (3, 9))]
        completions = engine.generate([make_request(prompt, max_tokens=12) for prompt in prompts])
        foresight = engine.speculator.stats().foresight
        assert foresight is not None
        emitted = sum(completion.stats.num_emitted_tokens for completion in completions)
        assert foresight.measured_tokens == emitted > 0
        assert foresight.num_tokens >= sum(c.stats.num_steps for c in completions)
        assert foresight.measured_seconds > 0.0
        assert foresight.seconds >= 0.001 * engine.counters.num_steps * 0.2

    def test_a_request_can_switch_drafts_off(self) -> None:
        request = make_request(PROMPT, SpeculationParams(method="none"), max_tokens=8)
        completion = complete(make_engine(), request)
        assert completion.stats.method == "none"
        assert completion.stats.num_draft_tokens == 0

    def test_a_request_for_medusa_without_heads_is_refused(self) -> None:
        request = make_request(PROMPT, SpeculationParams(method="medusa"), max_tokens=5)
        with pytest.raises(InvalidRequestError, match="'medusa', but this server has auto, none"):
            make_engine(heads="none").add_request(request)

    def test_drafts_of_padding_are_never_accepted(self) -> None:
        engine = make_engine(
            script=lambda request_id, text, hidden_D: [[-1] * NUM_RANKS] * NUM_HEADS
        )
        request = make_request(PROMPT, max_tokens=8)
        completion = complete(engine, request)
        assert_as_expected(completion, ORACLE.complete(request))
        assert completion.stats.num_draft_tokens == 0


class TestAbort:
    def start(self, engine: Engine, num_steps: int, max_tokens: int = 30) -> Request:
        request = make_request(PROMPT, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(request)
        for _ in range(num_steps):
            engine.step()
        return request

    def test_a_running_request_gives_its_blocks_back_at_once(self) -> None:
        engine = make_engine()
        request = self.start(engine, num_steps=3)
        assert engine.blocks.num_in_use > 0
        engine.abort(request.request_id)
        assert engine.blocks.num_in_use == 0
        assert not engine.has_unfinished
        assert engine.step() == []
        engine.blocks.check()

    def test_a_request_in_the_middle_of_its_prompt_too(self) -> None:
        engine = make_engine(max_tokens_per_step=8)
        request = self.start(engine, num_steps=1)
        assert engine.num_running == 1
        engine.abort(request.request_id)
        assert engine.blocks.num_in_use == 0

    def test_a_waiting_request_never_starts(self) -> None:
        engine = make_engine(max_num_seqs=1)
        running = self.start(engine, num_steps=1, max_tokens=3)
        waiting = self.start(engine, num_steps=0)
        assert (engine.num_running, engine.num_waiting) == (1, 1)
        engine.abort(waiting.request_id)
        assert engine.num_waiting == 0
        outputs = [output for _ in range(5) for output in engine.step()]
        assert {output.request_id for output in outputs} == {running.request_id}

    def test_the_neighbours_go_on_undisturbed(self) -> None:
        engine = make_engine()
        kept = make_request(random_prompt(4, 9), max_tokens=15)
        engine.add_request(kept)
        doomed = self.start(engine, num_steps=4)
        engine.abort(doomed.request_id)
        outputs: list[RequestOutput] = []
        while engine.has_unfinished:
            outputs += engine.step()
        assert outputs[-1].finish_reason is not None
        tail = tuple(token for output in outputs for token in output.token_ids)
        assert ORACLE.complete(kept).token_ids[-len(tail) :] == tail

    def test_an_unknown_or_ended_request_is_no_error(self) -> None:
        engine = make_engine()
        request = make_request(PROMPT, max_tokens=2)
        complete(engine, request)
        engine.abort(request.request_id)
        engine.abort("never heard of")

    def test_its_id_can_be_used_again(self) -> None:
        engine = make_engine()
        request = self.start(engine, num_steps=2)
        with pytest.raises(ValueError, match="already in flight"):
            engine.add_request(request)
        engine.abort(request.request_id)
        assert_as_expected(complete(engine, request), ORACLE.complete(request))


class TestLateStops:
    """A stop string is found when its sequence takes part in the next step already."""

    def stopping(self, **sampling: Any) -> tuple[Request, Completion]:
        """A request whose text ends by a stop string in the middle, and its completion."""
        free = make_request(PROMPT, max_tokens=24, ignore_eos=True, **sampling)
        text = ORACLE.complete(free).text
        stop = next(c for c in text[len(text) // 3 :] if c.isascii() and c.isprintable())
        request = make_request(PROMPT, max_tokens=24, ignore_eos=True, stop=(stop,), **sampling)
        return request, complete(make_engine(), request)

    def test_nothing_of_the_step_under_way_is_emitted_or_counted(self) -> None:
        request, _ = self.stopping()
        engine = make_engine()
        completion = complete(engine, request)
        assert_as_expected(completion, ORACLE.complete(request))
        assert completion.finish_reason == "stop"
        assert engine.counters.num_generated_tokens == len(completion.token_ids)
        assert engine.counters.num_verify_steps == completion.stats.num_steps
        assert engine.blocks.num_in_use == 0
        assert engine.step() == []
        engine.blocks.check()

    def test_the_neighbours_of_that_step_go_on(self) -> None:
        engine = make_engine()
        request, _ = self.stopping()
        others = [make_request(random_prompt(i, 5 + i), max_tokens=25) for i in (1, 2)]
        completions = engine.generate([request, *others])
        for completion, one in zip(completions, [request, *others], strict=True):
            assert_as_expected(completion, ORACLE.complete(one))
        assert engine.blocks.num_in_use == 0

    def test_its_blocks_can_be_used_by_others_at_once(self) -> None:
        engine = make_engine(num_blocks=12, block_size=4)
        request, _ = self.stopping()
        asked = [request, *(make_request(random_prompt(i, 9), max_tokens=20) for i in range(4))]
        for completion, one in zip(engine.generate(asked), asked, strict=True):
            assert_as_expected(completion, ORACLE.complete(one))
        engine.blocks.check()


class TestAdmit:
    def test_requests_that_come_before_the_launch_take_part_in_it(self) -> None:
        engine = make_engine()
        engine.add_request(make_request(PROMPT, max_tokens=20, ignore_eos=True))
        newcomer = make_request(random_prompt(1, 5), max_tokens=3, ignore_eos=True)
        engine.step(admit=lambda: engine.add_request(newcomer))
        assert newcomer.request_id in {output.request_id for output in engine.step()}

    def test_requests_that_are_aborted_before_the_launch_do_not(self) -> None:
        engine = make_engine()
        doomed, kept = (
            make_request(random_prompt(i, 6), max_tokens=20, ignore_eos=True) for i in (1, 2)
        )
        for request in (doomed, kept):
            engine.add_request(request)
        outputs = engine.step(admit=lambda: engine.abort(doomed.request_id))
        assert {output.request_id for output in outputs} == {kept.request_id}
        assert engine.num_running == 1
        assert {output.request_id for output in engine.step()} == {kept.request_id}


def test_chunks_of_prompts_can_be_limited_for_a_while() -> None:
    engine = make_engine(heads="none")
    engine.limit_prompts(4)
    engine.add_request(make_request(PROMPT, max_tokens=4, ignore_eos=True))
    chunks = []
    while not (outputs := engine.step()):
        chunks.append(engine.trace.num_prompt_tokens)
        engine.trace.clear()
    assert chunks == [4, 4, 4]
    assert len(outputs) == 1
    engine.limit_prompts(None)
    engine.add_request(make_request(random_prompt(3, 9), max_tokens=4, ignore_eos=True))
    engine.trace.clear()
    engine.step()
    engine.step()
    assert engine.trace.num_prompt_tokens == 9


def test_a_trace_tells_where_the_time_of_steps_goes() -> None:
    engine = make_engine()
    engine.trace.clear()
    complete(engine, make_request(PROMPT, max_tokens=9, ignore_eos=True))
    assert engine.trace.num_steps == engine.counters.num_steps
    assert engine.trace.num_prompt_tokens == len(PROMPT)
    assert engine.trace.num_tokens >= len(PROMPT) + engine.trace.num_steps - 1
    stages = {"schedule", "launch", "pack", "forward", "verify", "compact", "draft"}
    assert set(engine.trace.stage_s) == stages | {"commit", "propose", "finish"}
    assert min(engine.trace.stage_s.values()) >= 0.0


class TestPrefixReuse:
    def test_the_second_time_only_the_tail_is_computed_and_the_text_is_the_same(self) -> None:
        engine = make_engine(block_size=4)
        first = complete(engine, make_request(PROMPT, max_tokens=10))
        steps = engine.counters.num_steps
        engine.add_request(make_request(PROMPT, max_tokens=10))
        outputs: list[RequestOutput] = []
        while engine.has_unfinished:
            outputs += engine.step()
        second = join_outputs(outputs)
        assert second.stats.num_cached_tokens == 12
        assert second.token_ids == first.token_ids
        assert engine.counters.num_steps - steps <= steps
        assert engine.counters.num_cached_tokens == 12
        assert engine.counters.num_prompt_tokens == 28

    def test_a_conversation_reuses_its_last_turn(self) -> None:
        engine = make_engine(block_size=4)
        first = complete(engine, make_request(PROMPT, max_tokens=12, ignore_eos=True))
        turn = make_request((*PROMPT, *first.token_ids, 9, 9), max_tokens=6)
        assert_as_expected(complete(engine, turn), ORACLE.complete(turn))
        assert engine.counters.num_cached_tokens == 24, "all whole blocks of 25 computed tokens"

    def test_tokens_of_rejected_drafts_are_never_reused(self) -> None:
        wrong = make_engine(script=known_continuation({}, 0.0), block_size=2)
        for seed in range(4):
            prompt = random_prompt(20, 6 + seed)
            request = make_request(prompt, max_tokens=8, temperature=0.9, seed=seed)
            assert_as_expected(complete(wrong, request), ORACLE.complete(request))

    def test_without_the_cache_nothing_is_reused(self) -> None:
        engine = make_engine(prefix_caching=False)
        for _ in range(2):
            complete(engine, make_request(PROMPT, max_tokens=4))
        assert engine.counters.num_cached_tokens == 0


class TestOutputs:
    def test_stream_pieces_add_up_to_the_text_of_the_tokens(self) -> None:
        engine = make_engine()
        request = make_request(PROMPT, max_tokens=30, temperature=1.2, seed=4, ignore_eos=True)
        engine.add_request(request)
        outputs: list[RequestOutput] = []
        while engine.has_unfinished:
            outputs += engine.step()
        tokens = [token for output in outputs for token in output.token_ids]
        assert "".join(o.text for o in outputs) == byte_tokenizer().decode(tokens)
        assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert all(len(o.token_ids) == len(o.depths) == len(o.token_texts) for o in outputs)

    def test_log_probabilities_are_those_of_the_raw_model_at_every_token(self) -> None:
        request = make_request(PROMPT, max_tokens=12, logprobs=2, logit_bias={7: 3.0})
        text = PROMPT + ORACLE.complete(request).token_ids
        engine = make_engine(script=known_continuation({request.request_id: text}, 0.8))
        completion = complete(engine, request)
        assert completion.stats.num_accepted_tokens > 0
        assert completion.logprobs is not None
        assert tuple(entry.token_id for entry in completion.logprobs) == completion.token_ids
        for index, entry in enumerate(completion.logprobs):
            prefix = PROMPT + completion.token_ids[:index]
            expected = torch.tensor(ORACLE.logits(prefix)).log_softmax(-1)
            assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-3)
            assert [token for token, _ in entry.top] == expected.topk(2).indices.tolist()

    def test_a_request_without_logprobs_gets_none(self) -> None:
        assert complete(make_engine(), make_request(PROMPT, max_tokens=2)).logprobs is None

    def test_one_token_is_all_a_request_may_ask_for(self) -> None:
        request = make_request(PROMPT, max_tokens=1)
        completion = complete(make_engine(), request)
        assert_as_expected(completion, ORACLE.complete(request))
        assert completion.stats.num_steps == 0

    def test_completions_come_in_the_order_of_the_requests(self) -> None:
        requests = [make_request(random_prompt(i, 6), max_tokens=12 - 3 * i) for i in range(4)]
        completions = make_engine().generate(requests)
        for completion, request in zip(completions, requests, strict=True):
            assert_as_expected(completion, ORACLE.complete(request))


class TestRefusals:
    def test_a_request_that_cannot_fit_the_cache_is_refused_before_it_is_queued(self) -> None:
        engine = make_engine(num_blocks=5, block_size=4)
        assert engine.max_model_len == 20
        with pytest.raises(InvalidRequestError, match="together they may be 20"):
            engine.add_request(make_request(PROMPT, max_tokens=7))
        assert not engine.has_unfinished
        request = make_request(PROMPT, max_tokens=6, ignore_eos=True)
        assert len(complete(engine, request).token_ids) == 6

    def test_a_text_may_fill_the_models_last_position(self) -> None:
        engine = make_engine(num_blocks=200, max_tokens_per_step=128)
        prompt = random_prompt(3, 505)
        request = make_request(prompt, max_tokens=7, ignore_eos=True)
        assert_as_expected(complete(engine, request), ORACLE.complete(request))
        with pytest.raises(InvalidRequestError, match="512"):
            engine.add_request(make_request(prompt, max_tokens=8))


class TestText:
    def test_the_text_continues_the_prompt_with_the_space_that_the_model_wrote(self) -> None:
        vocab = {"<unk>": 0, "▁draft": 1, "▁tree": 2, "s": 3}
        rust = RustTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        rust.decoder = decoders.Metaspace()
        engine = make_engine()
        engine.tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust), [])
        for token_id, text in ((2, " tree tree tree"), (3, "sss")):
            request = make_request((1,), max_tokens=3, ignore_eos=True, logit_bias={token_id: 100})
            completion = complete(engine, request)
            assert (completion.token_ids, completion.text) == ((token_id,) * 3, text)


class TestTotals:
    def test_gauges_follow_the_work(self) -> None:
        engine = make_engine(max_num_seqs=1, heads="none")
        idle = engine.totals()
        assert (idle["num_running"], idle["num_waiting"], idle["num_blocks_in_use"]) == (0, 0, 0)
        for seed in range(2):
            engine.add_request(make_request(random_prompt(seed, 6), max_tokens=4))
        engine.step()
        busy = engine.totals()
        assert (busy["num_running"], busy["num_waiting"], busy["num_blocks_in_use"]) == (1, 1, 2)
        assert busy["num_blocks"] == 64

    def test_every_emitted_token_is_counted_once(self) -> None:
        engine = make_engine()
        requests = [make_request(random_prompt(i, 8), max_tokens=5 + i) for i in range(4)]
        completions = engine.generate(requests)
        totals = engine.totals()
        assert totals["num_generated_tokens"] == sum(len(c.token_ids) for c in completions)
        assert totals["num_prompt_tokens"] == 32
        assert totals["num_draft_tokens"] == sum(c.stats.num_draft_tokens for c in completions)
        assert totals["num_verify_steps"] == sum(c.stats.num_steps for c in completions)
