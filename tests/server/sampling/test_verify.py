"""Acceptance on top of logits, against a walk of one sequence and one node at a time.

Shapes: N nodes, S rows of logits of the step, V vocabulary.
"""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads.candidates import DraftTokens
from heads.tree import DraftTree
from server.config import SamplingParams, SpeculationParams
from server.core.step import StepEntry, Verdict
from server.sampling.acceptance.typical import TypicalParameters
from server.sampling.uniform import uniform
from tests.support.logits_table import (
    likely_drafts,
    make_item,
    node_logits,
    random_table,
    random_tree,
    verify_all,
)
from tests.support.slow_sampling import Filtered, adjust_slowly, draw_slowly, filter_slowly
from tests.support.trees import chain


def path_tokens(item: StepEntry, node: int) -> list[int]:
    drafts = item.drafts
    if node == 0:
        return []
    return [*path_tokens(item, drafts.tree.parents[node]), drafts.token_ids[node]]


def target_slowly(item: StepEntry, logits_NV: Tensor, node: int) -> Filtered:
    """Probabilities of the token after a node, with the penalties of exactly that text."""
    sequence, sampling = item.sequence, item.sequence.request.sampling
    generated = sequence.token_ids[sequence.num_prompt_tokens :] + path_tokens(item, node)
    prompt = sequence.request.prompt_token_ids
    adjusted = adjust_slowly(sampling, logits_NV[node].tolist(), prompt, generated)
    return filter_slowly(adjusted, sampling)


def draw_at(item: StepEntry, logits_NV: Tensor, node: int) -> int:
    target = target_slowly(item, logits_NV, node)
    if item.sequence.request.sampling.is_greedy:
        return target.probabilities.index(max(target.probabilities))
    position = len(item.sequence.token_ids) + item.drafts.tree.depths[node]
    return draw_slowly(target, uniform(item.sequence.seed, position)).token_id


def verify_slowly(item: StepEntry, logits_NV: Tensor) -> Verdict:
    """Sample, then match: one sequence, one node at a time."""
    drafts, path = item.drafts, [0]
    while True:
        token = draw_at(item, logits_NV, path[-1])
        children = drafts.tree.children()[path[-1]]
        matching = [child for child in children if drafts.token_ids[child] == token]
        if not matching:
            return Verdict(tuple(path), token)
        path += matching


ANY_SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    logit_bias=st.sampled_from([{}, {2: 2.0}]),
    seed=st.integers(0, 100),
)


class TestExactAcceptance:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 10_000),
        params=st.lists(ANY_SAMPLING, min_size=1, max_size=4),
    )
    def test_any_batch_of_trees_is_walked_as_one_by_one(
        self, seed: int, params: list[SamplingParams]
    ) -> None:
        rng, table = Random(seed), random_table(seed, 8, scale=2.0)
        items = [
            make_item(
                random_tree(rng, rng.randint(1, 12), 8, root=rng.randrange(8)),
                sampling,
                SpeculationParams(acceptance="exact"),
                prompt=tuple(rng.choices(range(8), k=rng.randint(1, 4))),
                generated=tuple(rng.choices(range(8), k=rng.randint(0, 4))),
            )
            for sampling in params
        ]
        verdicts = verify_all(node_logits(table, items), items)
        expected = [verify_slowly(item, node_logits(table, [item])) for item in items]
        assert verdicts == expected

    def test_drafts_that_are_always_right_are_all_accepted(self) -> None:
        table = random_table(1, 8)
        tokens = [3]
        for _ in range(4):
            tokens.append(int(table[tokens[-1]].argmax()))
        item = make_item(DraftTokens(chain(3), tuple(tokens[:4])), SamplingParams(temperature=0.0))
        verdict = verify_all(node_logits(table, [item]), [item])[0]
        assert verdict == Verdict((0, 1, 2, 3), tokens[4])

    def test_drafts_that_are_always_wrong_leave_the_plain_step(self) -> None:
        table = random_table(1, 8)
        wrong = int(table[3].argmin())
        drafts = DraftTokens(chain(2), (3, wrong, int(table[wrong].argmax())))
        item = make_item(drafts, SamplingParams(temperature=0.0))
        assert verify_all(node_logits(table, [item]), [item]) == [
            Verdict((0,), int(table[3].argmax()))
        ]

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_the_token_after_the_root_is_the_same_with_and_without_drafts(
        self, temperature: float
    ) -> None:
        table = random_table(5, 8)
        sampling = SamplingParams(temperature=temperature, seed=9)
        rng = Random(1)
        for root in range(8):
            plain = make_item(DraftTokens(DraftTree.root_only(), (root,)), sampling)
            expected = verify_all(node_logits(table, [plain]), [plain])[0].bonus_token
            tree = make_item(random_tree(rng, 10, 8, root), sampling)
            verdict = verify_all(node_logits(table, [tree]), [tree])[0]
            tokens = [tree.drafts.token_ids[node] for node in verdict.path[1:]]
            assert [*tokens, verdict.bonus_token][0] == expected

    def test_penalties_count_the_draft_tokens_of_the_path(self) -> None:
        # The table repeats token 1 for ever; a presence penalty allows it just once more.
        table = torch.zeros(4, 4)
        table[:, 1], table[:, 2] = 1.0, 0.9
        sampling = SamplingParams(temperature=0.0, presence_penalty=0.5)
        item = make_item(DraftTokens(chain(3), (0, 1, 1, 1)), sampling, vocab_size=4)
        assert verify_all(node_logits(table, [item]), [item]) == [Verdict((0, 1), 2)]

    def test_an_engine_that_forgot_the_path_would_be_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = torch.zeros(4, 4)
        table[:, 1], table[:, 2] = 1.0, 0.9
        sampling = SamplingParams(temperature=0.0, presence_penalty=0.5)
        item = make_item(DraftTokens(chain(3), (0, 1, 1, 1)), sampling, vocab_size=4)
        monkeypatch.setattr(StepEntry, "path_tokens", lambda entry, node: [])
        logits_NV = node_logits(table, [item])
        assert verify_all(logits_NV, [item])[0] != verify_slowly(item, logits_NV)

    def test_half_precision_logits_are_compared_as_the_model_gave_them(self) -> None:
        table = random_table(2, 8).bfloat16()
        item = make_item(random_tree(Random(3), 6, 8, 0), SamplingParams(temperature=0.0))
        logits_NV = node_logits(table, [item])
        assert verify_all(logits_NV, [item]) == [verify_slowly(item, logits_NV.float())]


def passes_the_rule(item: StepEntry, logits_NV: Tensor, node: int) -> bool:
    """Medusa's rule by its formula: p(x) > min(epsilon, delta * exp(-H(p)))."""
    speculation = item.sequence.request.speculation
    parent = item.drafts.tree.parents[node]
    target = target_slowly(item, logits_NV, parent).probabilities
    entropy = -sum(p * math.log(p) for p in target if p > 0.0)
    parameters = TypicalParameters(**speculation.acceptance_options)
    threshold = min(parameters.epsilon, parameters.delta * math.exp(-entropy))
    return target[item.drafts.token_ids[node]] > threshold


class TestTypicalAcceptance:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 10_000),
        sampling=ANY_SAMPLING.filter(lambda params: not params.is_greedy),
        epsilon=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
        delta=st.sampled_from([0.0, 0.3, 1.0]),
    )
    def test_every_accepted_token_passes_the_rule_and_no_deeper_path_does(
        self, seed: int, sampling: SamplingParams, epsilon: float, delta: float
    ) -> None:
        rng, table = Random(seed), random_table(seed, 8, scale=2.0)
        speculation = SpeculationParams(
            acceptance="typical", acceptance_options={"epsilon": epsilon, "delta": delta}
        )
        items = [
            make_item(random_tree(rng, rng.randint(1, 12), 8, 0), sampling, speculation, (1, 2))
            for _ in range(3)
        ]
        verdicts = verify_all(node_logits(table, items), items)
        for item, verdict in zip(items, verdicts, strict=True):
            logits_NV = node_logits(table, [item])
            parents, depths = item.drafts.tree.parents, item.drafts.tree.depths
            accepted = {0}
            for node in range(1, len(parents)):
                if parents[node] in accepted and passes_the_rule(item, logits_NV, node):
                    accepted.add(node)
            assert set(verdict.path) <= accepted
            assert [parents[node] for node in verdict.path[1:]] == list(verdict.path[:-1])
            assert depths[verdict.path[-1]] == max(depths[node] for node in accepted)
            assert verdict.bonus_token == draw_at(item, logits_NV, verdict.path[-1])

    def test_more_is_accepted_than_by_the_exact_rule(self) -> None:
        table = random_table(11, 8)
        lengths = {}
        for acceptance in ("exact", "typical"):
            items = [
                make_item(
                    likely_drafts(table, 0),
                    SamplingParams(temperature=0.8, seed=seed),
                    SpeculationParams(acceptance="typical" if acceptance == "typical" else "exact"),
                )
                for seed in range(300)
            ]
            verdicts = verify_all(node_logits(table, items), items)
            lengths[acceptance] = sum(len(verdict.path) for verdict in verdicts)
        assert lengths["typical"] > lengths["exact"]

    def test_both_rules_in_one_batch_give_what_each_gives_alone(self) -> None:
        rng, table = Random(8), random_table(8, 8)
        items = [
            make_item(
                random_tree(rng, rng.randint(1, 10), 8, 0),
                SamplingParams(temperature=0.9, seed=index),
                SpeculationParams(acceptance="exact" if index % 2 else "typical"),
            )
            for index in range(8)
        ]
        together = verify_all(node_logits(table, items), items)
        assert together == [verify_all(node_logits(table, [item]), [item])[0] for item in items]
