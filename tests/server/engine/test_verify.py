"""Acceptance on top of logits: against a one-sequence walk, and by the distribution of the output.

The "model" is a table of logits, one row per last token, so that the exact distribution of any
continuation is a product of softmax values. The statistical tests use fixed seeds; a correct
engine would cross their threshold with one choice of seeds in a million.

Shapes: N nodes, S rows of logits of the step, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from heads.candidates import DraftTokens
from heads.tree import DraftTree
from server.config import SamplingParams, SpeculationParams
from server.engine import verify as verify_module
from server.engine.scheduler import ScheduledSequence
from server.engine.uniform import uniform
from server.engine.verify import TargetSampler, Verdict, verify
from tests.engine_tools import make_sequence
from tests.slow_sampling import Filtered, adjust_slowly, draw_slowly, filter_slowly

FALSE_ALARM = 1e-6
NUM_SAMPLES = 20_480
Verify = Callable[[Tensor, Sequence[ScheduledSequence]], list[Verdict]]


def random_table(seed: int, vocab_size: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, vocab_size, generator=generator) * scale


def random_tree(rng: Random, num_nodes: int, vocab_size: int, root: int) -> DraftTokens:
    """Any shape; siblings carry different tokens, as a head's candidates do."""
    parents, ranks, token_ids = [-1], [-1], [root]
    taken: dict[int, list[int]] = {0: []}
    for node in range(1, num_nodes):
        parent = rng.choice([p for p in range(node) if len(taken[p]) < vocab_size])
        token = rng.choice([t for t in range(vocab_size) if t not in taken[parent]])
        parents.append(parent)
        ranks.append(len(taken[parent]))
        token_ids.append(token)
        taken[parent].append(token)
        taken[node] = []
    return DraftTokens(DraftTree(tuple(parents), tuple(ranks)), tuple(token_ids))


def make_item(
    drafts: DraftTokens,
    sampling: SamplingParams,
    speculation: SpeculationParams | None = None,
    prompt: tuple[int, ...] = (0,),
    generated: tuple[int, ...] = (),
    vocab_size: int = 8,
) -> ScheduledSequence:
    """A decoding sequence whose last token is the root of `drafts`."""
    sequence = make_sequence(
        prompt, (*generated, drafts.token_ids[0]), sampling, speculation, vocab_size
    )
    return ScheduledSequence(sequence, 1, drafts, is_verified=True, is_decoding=True)


def node_logits(table: Tensor, items: Sequence[ScheduledSequence]) -> Tensor:
    """The table's rows at all nodes of all trees."""
    return table[[token for item in items for token in item.drafts.token_ids]]


def path_tokens(item: ScheduledSequence, node: int) -> list[int]:
    drafts = item.drafts
    if node == 0:
        return []
    return [*path_tokens(item, drafts.tree.parents[node]), drafts.token_ids[node]]


def target_slowly(item: ScheduledSequence, logits_NV: Tensor, node: int) -> Filtered:
    """Probabilities of the token after a node, with the penalties of exactly that text."""
    sequence, sampling = item.sequence, item.sequence.request.sampling
    generated = sequence.token_ids[sequence.num_prompt_tokens :] + path_tokens(item, node)
    prompt = sequence.request.prompt_token_ids
    adjusted = adjust_slowly(sampling, logits_NV[node].tolist(), prompt, generated)
    return filter_slowly(adjusted, sampling)


def draw_at(item: ScheduledSequence, logits_NV: Tensor, node: int) -> int:
    target = target_slowly(item, logits_NV, node)
    if item.sequence.request.sampling.is_greedy:
        return target.probabilities.index(max(target.probabilities))
    position = len(item.sequence.token_ids) + item.drafts.tree.depths[node]
    return draw_slowly(target, uniform(item.sequence.seed, position)).token_id


def verify_slowly(item: ScheduledSequence, logits_NV: Tensor) -> Verdict:
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
        verdicts = verify(node_logits(table, items), items)
        expected = [verify_slowly(item, node_logits(table, [item])) for item in items]
        assert verdicts == expected

    def test_drafts_that_are_always_right_are_all_accepted(self) -> None:
        table = random_table(1, 8)
        tokens = [3]
        for _ in range(4):
            tokens.append(int(table[tokens[-1]].argmax()))
        item = make_item(
            DraftTokens(DraftTree.chain(3), tuple(tokens[:4])), SamplingParams(temperature=0.0)
        )
        verdict = verify(node_logits(table, [item]), [item])[0]
        assert verdict == Verdict((0, 1, 2, 3), tokens[4])

    def test_drafts_that_are_always_wrong_leave_the_plain_step(self) -> None:
        table = random_table(1, 8)
        wrong = int(table[3].argmin())
        drafts = DraftTokens(DraftTree.chain(2), (3, wrong, int(table[wrong].argmax())))
        item = make_item(drafts, SamplingParams(temperature=0.0))
        assert verify(node_logits(table, [item]), [item]) == [Verdict((0,), int(table[3].argmax()))]

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_the_token_after_the_root_is_the_same_with_and_without_drafts(
        self, temperature: float
    ) -> None:
        table = random_table(5, 8)
        sampling = SamplingParams(temperature=temperature, seed=9)
        rng = Random(1)
        for root in range(8):
            plain = make_item(DraftTokens(DraftTree.root_only(), (root,)), sampling)
            expected = verify(node_logits(table, [plain]), [plain])[0].bonus_token
            tree = make_item(random_tree(rng, 10, 8, root), sampling)
            verdict = verify(node_logits(table, [tree]), [tree])[0]
            tokens = [tree.drafts.token_ids[node] for node in verdict.path[1:]]
            assert [*tokens, verdict.bonus_token][0] == expected

    def test_penalties_count_the_draft_tokens_of_the_path(self) -> None:
        # The table repeats token 1 for ever; a presence penalty allows it just once more.
        table = torch.zeros(4, 4)
        table[:, 1], table[:, 2] = 1.0, 0.9
        sampling = SamplingParams(temperature=0.0, presence_penalty=0.5)
        item = make_item(DraftTokens(DraftTree.chain(3), (0, 1, 1, 1)), sampling, vocab_size=4)
        assert verify(node_logits(table, [item]), [item]) == [Verdict((0, 1), 2)]

    def test_an_engine_that_forgot_the_path_would_be_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = torch.zeros(4, 4)
        table[:, 1], table[:, 2] = 1.0, 0.9
        sampling = SamplingParams(temperature=0.0, presence_penalty=0.5)
        item = make_item(DraftTokens(DraftTree.chain(3), (0, 1, 1, 1)), sampling, vocab_size=4)
        monkeypatch.setattr(verify_module, "_path_tokens", lambda item, node: [])
        logits_NV = node_logits(table, [item])
        assert verify(logits_NV, [item])[0] != verify_slowly(item, logits_NV)

    def test_half_precision_logits_are_compared_as_the_model_gave_them(self) -> None:
        table = random_table(2, 8).bfloat16()
        item = make_item(random_tree(Random(3), 6, 8, 0), SamplingParams(temperature=0.0))
        logits_NV = node_logits(table, [item])
        assert verify(logits_NV, [item]) == [verify_slowly(item, logits_NV.float())]


TREE = DraftTree.from_rank_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def likely_drafts(table: Tensor, root: int) -> DraftTokens:
    """Candidates as heads make them: per depth the same few likely tokens for all parents."""
    second = table[root].topk(2).indices.tolist()
    third = table[second[0]].topk(2).indices.tolist()
    fourth = table[third[0]].topk(1).indices.tolist()
    ranks = [second, third, fourth]
    pairs = zip(TREE.depths[1:], TREE.ranks[1:], strict=True)
    return DraftTokens(TREE, (root, *(ranks[depth - 1][rank] for depth, rank in pairs)))


def sample_continuations(
    table: Tensor, sampling: SamplingParams, num_tokens: int, verify_step: Verify
) -> Counter[tuple[int, ...]]:
    """Continue token 0 by trees, step after step, 20,480 times with different seeds."""
    counts: Counter[tuple[int, ...]] = Counter()
    drafts_of = [likely_drafts(table, root) for root in range(len(table))]
    for first in range(0, NUM_SAMPLES, 1024):
        running = []
        for seed in range(first, first + 1024):
            seeded = SamplingParams(
                temperature=sampling.temperature, top_k=sampling.top_k, seed=seed
            )
            running.append(make_item(drafts_of[0], seeded))
        while running:
            verdicts = verify_step(node_logits(table, running), running)
            unfinished = []
            for item, verdict in zip(running, verdicts, strict=True):
                sequence = item.sequence
                sequence.token_ids += [item.drafts.token_ids[node] for node in verdict.path[1:]]
                sequence.token_ids.append(verdict.bonus_token)
                if sequence.num_output_tokens > num_tokens:
                    start = sequence.num_prompt_tokens + 1
                    counts[tuple(sequence.token_ids[start : start + num_tokens])] += 1
                else:
                    drafts = drafts_of[sequence.token_ids[-1]]
                    unfinished.append(
                        ScheduledSequence(sequence, 1, drafts, is_verified=True, is_decoding=True)
                    )
            running = unfinished
    return counts


def p_value(
    counts: Counter[tuple[int, ...]], table: Tensor, sampling: SamplingParams, num_tokens: int
) -> float:
    """Of a chi-square test against the product of the target's probabilities."""
    rows = [filter_slowly(row.tolist(), sampling).probabilities for row in table]
    observed, expected, rare = [], [], [0.0, 0.0]
    for tokens in product(range(len(table)), repeat=num_tokens):
        previous = (0, *tokens[:-1])
        mass = math.prod(rows[a][b] for a, b in zip(previous, tokens, strict=True))
        if mass == 0.0:
            assert counts[tokens] == 0, "an impossible continuation was sampled"
        elif mass * NUM_SAMPLES < 5:
            rare = [rare[0] + counts[tokens], rare[1] + mass * NUM_SAMPLES]
        else:
            observed.append(float(counts[tokens]))
            expected.append(mass * NUM_SAMPLES)
    if rare[1] > 0:
        observed.append(rare[0])
        expected.append(rare[1])
    assert sum(observed) == NUM_SAMPLES
    return float(chisquare(observed, expected, sum_check=False).pvalue)


def accept_a_wrong_sibling(logits_SV: Tensor, items: Sequence[ScheduledSequence]) -> list[Verdict]:
    """A planted bug: where the first child is accepted, its sibling is taken instead."""
    return [
        Verdict((0, 2), verdict.bonus_token) if verdict.path[1:2] == (1,) else verdict
        for verdict in verify(logits_SV, items)
    ]


class TestOutputDistribution:
    @pytest.mark.parametrize(
        "sampling", [SamplingParams(temperature=0.8), SamplingParams(temperature=1.3, top_k=3)]
    )
    def test_trees_leave_the_distribution_of_three_tokens_as_it_is(
        self, sampling: SamplingParams
    ) -> None:
        table = random_table(11, 4)
        counts = sample_continuations(table, sampling, 3, verify)
        assert sum(counts.values()) == NUM_SAMPLES
        assert p_value(counts, table, sampling, 3) > FALSE_ALARM

    def test_accepting_a_wrong_sibling_is_noticed(self) -> None:
        table, sampling = random_table(11, 4), SamplingParams(temperature=0.8)
        counts = sample_continuations(table, sampling, 3, accept_a_wrong_sibling)
        assert p_value(counts, table, sampling, 3) < FALSE_ALARM

    def test_drawing_all_depths_with_one_number_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forget_depth(self: TargetSampler, index: int, node: int) -> float:
            sequence = self._items[index].sequence
            return uniform(sequence.seed, len(sequence.token_ids))

        monkeypatch.setattr(TargetSampler, "_uniform", forget_depth)
        table, sampling = random_table(11, 4), SamplingParams(temperature=0.8)
        counts = sample_continuations(table, sampling, 3, verify)
        assert p_value(counts, table, sampling, 3) < FALSE_ALARM

    def test_the_drafts_of_these_tests_are_sometimes_accepted_and_sometimes_not(self) -> None:
        table = random_table(11, 4)
        items = [
            make_item(likely_drafts(table, 0), SamplingParams(temperature=0.8, seed=seed))
            for seed in range(500)
        ]
        lengths = Counter(len(v.path) for v in verify(node_logits(table, items), items))
        assert set(lengths) == {1, 2, 3, 4}
        assert all(count >= 10 for count in lengths.values())


def passes_the_rule(item: ScheduledSequence, logits_NV: Tensor, node: int) -> bool:
    """Medusa's rule by its formula: p(x) > min(epsilon, delta * exp(-H(p)))."""
    speculation = item.sequence.request.speculation
    parent = item.drafts.tree.parents[node]
    target = target_slowly(item, logits_NV, parent).probabilities
    entropy = -sum(p * math.log(p) for p in target if p > 0.0)
    threshold = min(speculation.epsilon, speculation.delta * math.exp(-entropy))
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
        speculation = SpeculationParams(acceptance="typical", epsilon=epsilon, delta=delta)
        items = [
            make_item(random_tree(rng, rng.randint(1, 12), 8, 0), sampling, speculation, (1, 2))
            for _ in range(3)
        ]
        verdicts = verify(node_logits(table, items), items)
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
            verdicts = verify(node_logits(table, items), items)
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
        together = verify(node_logits(table, items), items)
        assert together == [verify(node_logits(table, [item]), [item])[0] for item in items]
