"""MTP drafts in the engine: every tree equals one grown slowly, and no output changes.

The slow way knows no cache, no chunk, no prefix reuse and no batch, so it is the oracle for all.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from random import Random
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from heads.proposals import GrownProposal, Proposal
from server.config import SamplingParams, SpeculationParams
from server.core.request import Request
from server.cpu.accelerate import draft_products
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from server.executor.executor import Drafter, Drafting
from server.executor.host import HostExecutor
from server.model.draft_heads import DraftHeads
from server.speculation.cost_model import CostModel
from server.speculation.sources.mtp import MTPSource
from server.speculation.sources.mtp_drafter import Growth, MTPDrafter
from tests.support.engine_tools import (
    NUM_HEADS,
    SlowModel,
    assert_as_expected,
    make_engine,
    make_request,
    random_prompt,
    tiny_loaded,
    wide_profile,
)
from tests.support.own_code import own_kernel
from tests.support.slow_drafting import SlowDrafter, tiny_mtp, token_paths
from tests.support.slow_sampling import filter_slowly
from tests.support.tiny_models import TinyKind

pytestmark = pytest.mark.slow

# What `make_mtp` makes of the tests' profile and options.
GROWTH = Growth(num_nodes=8, num_depths=NUM_HEADS)
ORACLE = SlowModel()
Proposals = list[tuple[tuple[int, ...], int, list[tuple[int, ...]]]]


def mtp_engine(kind: TinyKind = "llama", costs: CostModel | None = None, **options: Any) -> Engine:
    module, block = tiny_mtp(tiny_loaded(kind))
    draft = DraftHeads(module, block, wide_profile(), "tiny")
    return make_engine(kind, costs=costs, draft=draft, **options)


class Recorder:
    """Stands before a drafter and keeps what it proposes."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.found: Proposals = []

    def draft(
        self,
        rooted: Seq[Drafting],
        hidden_BD: Tensor,
        following: Seq[Drafting],
        min_value: float,
    ) -> list[Proposal | None]:
        proposals = self.drafter.draft(rooted, hidden_BD, following, min_value)
        for drafting, proposal in zip(rooted, proposals, strict=True):
            if proposal is not None:
                assert isinstance(proposal, GrownProposal)
                tree, tokens = proposal.drafts.tree, proposal.drafts.token_ids
                text = tuple(drafting.tokens(0, drafting.num_tokens))
                assert tokens[0] == text[-1]
                paths = token_paths(tree.parents, tokens)
                self.found.append((text, drafting.sequence.num_prompt_tokens, paths))
        return proposals

    def draft_for(self, num_sequences: int, context_len: int) -> None:
        self.drafter.draft_for(num_sequences, context_len)


def drafter_of(engine: Engine) -> MTPDrafter:
    source = engine.speculator.sources["mtp"]
    assert isinstance(source, MTPSource)
    return source.drafter


def recorded(engine: Engine) -> Proposals:
    """What the engine's drafter proposes from now on: text, prompt length, paths."""
    recorder = Recorder(drafter_of(engine))
    executor = engine.executor
    assert isinstance(executor, HostExecutor)
    executor.drafters = {"mtp": recorder}
    return recorder.found


def run(engine: Engine, request: Request) -> None:
    """Finish a request, and others that are in flight already."""
    engine.add_request(request)
    while engine.has_unfinished:
        engine.step()


def next_tokens(sampling: SamplingParams, text: tuple[int, ...]) -> list[tuple[int, float]]:
    """The target's possible next tokens and their probabilities."""
    probabilities = filter_slowly(ORACLE.logits(text), sampling).probabilities
    return [(token, p) for token, p in enumerate(probabilities) if p > 0.0]


def assert_as_slowly(proposals: Proposals, kind: TinyKind = "llama") -> None:
    slow = SlowDrafter(kind, GROWTH)
    assert proposals
    for token_ids, num_prompt_tokens, paths in Random(0).sample(proposals, min(6, len(proposals))):
        assert paths == slow.tree(token_ids, num_prompt_tokens)


class TestTrees:
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
    def test_equal_those_grown_slowly(self, kind: TinyKind) -> None:
        engine = mtp_engine(kind)
        proposals = recorded(engine)
        engine.generate([make_request(random_prompt(1, 9), max_tokens=10, ignore_eos=True)])
        assert len(proposals) >= 9 - NUM_HEADS
        assert_as_slowly(proposals, kind)

    @pytest.mark.parametrize("chunk", [1, 3, 7])
    def test_do_not_depend_on_how_a_prompt_was_cut(self, chunk: int) -> None:
        engine = mtp_engine(max_prefill_tokens=chunk)
        other = make_request(random_prompt(2, 3), max_tokens=25, ignore_eos=True)
        engine.add_request(other)
        engine.step()
        proposals = recorded(engine)
        run(engine, make_request(random_prompt(3, 17), max_tokens=4, ignore_eos=True))
        assert_as_slowly([item for item in proposals if item[1] == 17])

    def test_stop_growing_where_no_path_is_worth_a_pass(self) -> None:
        engine = mtp_engine()
        engine.add_request(make_request(random_prompt(1, 9), max_tokens=10, ignore_eos=True))
        engine.step()
        (sequence,) = engine._scheduler.running
        state = sequence.drafting["mtp"]
        whole = []
        for min_value in (0.0, 1.0):
            state.num_tokens, state.has_room = 0, True
            again = Drafting(sequence, (), sequence.num_computed_tokens)
            (proposal,) = drafter_of(engine).draft([again], torch.zeros(1, 1), [], min_value)
            assert isinstance(proposal, GrownProposal)
            whole.append(proposal.drafts)
        assert whole[0].tree.max_depth > 1
        assert whole[1].tree.max_depth == 1
        assert set(whole[1].token_ids) >= {
            whole[0].token_ids[n] for n in whole[0].tree.children()[0]
        }

    def test_do_not_depend_on_a_shared_beginning_or_its_blocks(self) -> None:
        engine = mtp_engine(block_size=4)
        beginning = random_prompt(4, 12)
        engine.generate([make_request((*beginning, 7, 8), max_tokens=6, ignore_eos=True)])
        proposals = recorded(engine)
        engine.generate([make_request((*beginning, 9), max_tokens=6, ignore_eos=True)])
        assert engine.counters.num_cached_tokens == 12
        assert_as_slowly(proposals)

    def test_catch_up_with_a_beginning_that_was_decoded_without_drafts(self) -> None:
        engine = mtp_engine(block_size=4)
        beginning = random_prompt(5, 12)
        plain = SpeculationParams(method="none")
        engine.generate([make_request((*beginning, 7, 8), plain, max_tokens=6, ignore_eos=True)])
        proposals = recorded(engine)
        engine.generate([make_request((*beginning, 9), max_tokens=6, ignore_eos=True)])
        assert engine.counters.num_cached_tokens == 12
        assert_as_slowly(proposals)

    def test_of_a_batch_equal_those_of_each_sequence_alone(self) -> None:
        engine = mtp_engine(max_tokens_per_step=64)
        proposals = recorded(engine)
        engine.generate(
            [make_request(random_prompt(i, 4 + 3 * i), max_tokens=7) for i in range(6, 10)]
        )
        assert_as_slowly(proposals)

    def test_come_back_after_a_preemption(self) -> None:
        engine = mtp_engine(num_blocks=14, block_size=4)
        proposals = recorded(engine)
        engine.generate(
            [make_request(random_prompt(i, 6), max_tokens=26, ignore_eos=True) for i in range(4)]
        )
        assert engine.counters.num_preemptions >= 2
        assert_as_slowly(proposals)

    def test_come_back_when_drafts_pay_again(self) -> None:
        # Trees pay for one sequence and not for two.
        costs = CostModel((1, 8, 9, 16), (1.0, 1.0, 50.0, 100.0), draft_s=0.0)
        engine = mtp_engine(costs=costs, max_tokens_per_step=64)
        short = make_request(random_prompt(1, 5), max_tokens=4, ignore_eos=True)
        engine.add_request(short)
        proposals = recorded(engine)
        run(engine, make_request(random_prompt(2, 20), max_tokens=20, ignore_eos=True))
        assert any(len(token_ids) > 24 for token_ids, _, _ in proposals)
        assert_as_slowly([item for item in proposals if item[1] == 20])

    def test_are_caught_up_with_over_several_steps(self) -> None:
        engine = mtp_engine(block_size=4, max_tokens_per_step=9)
        beginning = random_prompt(5, 40)
        plain = SpeculationParams(method="none")
        engine.generate([make_request((*beginning, 7), plain, max_tokens=3, ignore_eos=True)])
        proposals = recorded(engine)
        engine.generate([make_request((*beginning, 9), max_tokens=12, ignore_eos=True)])
        assert engine.counters.num_cached_tokens == 40
        assert len(proposals[0][0]) > 43, "no tree while the beginning is caught up with"
        assert_as_slowly(proposals)


class TestOutputs:
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
    @pytest.mark.parametrize("heat", [0.0, 0.9])
    def test_are_the_base_models_own(self, kind: TinyKind, heat: float) -> None:
        def ask() -> list[Request]:
            return [
                make_request(random_prompt(i, 3 * i), max_tokens=15, temperature=heat, seed=i)
                for i in range(1, 5)
            ]

        oracle = SlowModel(kind)
        small: dict[str, Any] = {"num_blocks": 12, "block_size": 4, "max_prefill_tokens": 3}
        for options in ({}, small):
            completions = mtp_engine(kind, **options).generate(ask())
            for completion, request in zip(completions, ask(), strict=True):
                assert_as_expected(completion, oracle.complete(request))

    def test_sampled_continuations_have_the_base_models_distribution(self) -> None:
        """Chi-square over three tokens; a right engine fails with one seed set in a million."""
        prompt = random_prompt(8, 5)
        requests = [
            make_request(prompt, temperature=1.2, top_k=3, max_tokens=3, seed=i, ignore_eos=True)
            for i in range(4096)
        ]
        sampling = requests[0].sampling
        expected = {}
        for first, p in next_tokens(sampling, prompt):
            for second, q in next_tokens(sampling, (*prompt, first)):
                for third, r in next_tokens(sampling, (*prompt, first, second)):
                    expected[first, second, third] = p * q * r * len(requests)
        # A module that can draft nothing else is right now and then.
        ids = sorted({token for tokens in expected for token in tokens})
        module, block = tiny_mtp(tiny_loaded(), ids)
        draft = DraftHeads(module, block, wide_profile(), "tiny")
        engine = make_engine(
            draft=draft, max_nodes=16, max_num_seqs=64, max_tokens_per_step=1100, num_blocks=500
        )
        completions = engine.generate(requests)
        assert sum(completion.stats.num_accepted_tokens for completion in completions) > 200
        counts = Counter(completion.token_ids for completion in completions)
        assert set(counts) <= set(expected)
        likely = [tokens for tokens, number in expected.items() if number >= 5]
        rest = len(requests) - sum(counts[tokens] for tokens in likely)
        observed = [float(counts[tokens]) for tokens in likely] + [float(rest)]
        wanted = [expected[tokens] for tokens in likely]
        wanted.append(len(requests) - sum(wanted))
        assert wanted[-1] > 1, "choose another prompt: the rest must not be empty"
        assert chisquare(observed, wanted, sum_check=False).pvalue > 1e-6

    def test_usage_names_the_method(self) -> None:
        engine = mtp_engine()
        request = make_request(random_prompt(1, 5), max_tokens=12, ignore_eos=True)
        stats = engine.generate([request])[0].stats
        assert stats.method == "mtp"
        assert stats.num_draft_tokens > 0

    def test_the_other_kind_of_heads_is_refused_by_name(self) -> None:
        request = make_request((5, 6), SpeculationParams(method="medusa"), max_tokens=4)
        with pytest.raises(InvalidRequestError, match="this server has auto, mtp, none"):
            mtp_engine().add_request(request)

    def test_all_blocks_are_free_in_the_end(self) -> None:
        engine = mtp_engine(num_blocks=9, block_size=4)
        engine.generate([make_request(random_prompt(i, 6), max_tokens=20) for i in range(3)])
        assert engine.blocks.num_in_use == 0
        engine.blocks.check()


def test_one_imaginary_sequence_can_be_timed() -> None:
    drafter_of(mtp_engine(block_size=4)).draft_for(1, 10)


def test_a_module_with_int8_weights_drafts_nearly_the_same() -> None:
    requests = [make_request(random_prompt(i, 9), max_tokens=30, ignore_eos=True) for i in range(3)]
    found: list[dict[tuple[int, ...], set[tuple[int, ...]]]] = []
    texts = []
    for products in (None, draft_products(own_kernel())):
        engine = mtp_engine(products=products)
        proposals = recorded(engine)
        texts.append([completion.token_ids for completion in engine.generate(requests)])
        found.append({text: {path[:2] for path in paths} for text, _, paths in proposals})
    assert texts[0] == texts[1]
    plain, ours = found
    shared = plain.keys() & ours.keys()
    assert len(shared) > 20
    likeness = [len(plain[text] & ours[text]) / len(plain[text] | ours[text]) for text in shared]
    assert sum(likeness) / len(likeness) > 0.8
