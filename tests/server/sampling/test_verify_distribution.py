"""The distribution of what trees let through: that of the base model, by chi-square.

Seeds are fixed, so a test always passes or always fails; a correct engine would cross the
threshold with one choice of seeds in a million.

Shapes: S rows of logits of the step, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import pytest
from scipy.stats import chisquare
from torch import Tensor

from server.config import SamplingParams
from server.core.step import StepEntry, Verdict
from server.sampling.sampler import TargetSampler
from server.sampling.uniform import uniform
from tests.support.logits_table import (
    likely_drafts,
    make_item,
    node_logits,
    random_table,
    verify_all,
)
from tests.support.slow_sampling import filter_slowly

pytestmark = pytest.mark.slow

FALSE_ALARM = 1e-6
NUM_SAMPLES = 20_480
Verify = Callable[[Tensor, Sequence[StepEntry]], list[Verdict]]


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
                        StepEntry(sequence, 1, drafts, is_verified=True, is_decoding=True)
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


def accept_a_wrong_sibling(logits_SV: Tensor, items: Sequence[StepEntry]) -> list[Verdict]:
    """A planted bug: where the first child is accepted, its sibling is taken instead."""
    return [
        Verdict((0, 2), verdict.bonus_token) if verdict.path[1:2] == (1,) else verdict
        for verdict in verify_all(logits_SV, items)
    ]


class TestOutputDistribution:
    @pytest.mark.parametrize(
        "sampling", [SamplingParams(temperature=0.8), SamplingParams(temperature=1.3, top_k=3)]
    )
    def test_trees_leave_the_distribution_of_three_tokens_as_it_is(
        self, sampling: SamplingParams
    ) -> None:
        table = random_table(11, 4)
        counts = sample_continuations(table, sampling, 3, verify_all)
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
            sequence = self.entries[index].sequence
            return uniform(sequence.seed, len(sequence.token_ids))

        monkeypatch.setattr(TargetSampler, "_uniform", forget_depth)
        table, sampling = random_table(11, 4), SamplingParams(temperature=0.8)
        counts = sample_continuations(table, sampling, 3, verify_all)
        assert p_value(counts, table, sampling, 3) < FALSE_ALARM

    def test_the_drafts_of_these_tests_are_sometimes_accepted_and_sometimes_not(self) -> None:
        table = random_table(11, 4)
        items = [
            make_item(likely_drafts(table, 0), SamplingParams(temperature=0.8, seed=seed))
            for seed in range(500)
        ]
        lengths = Counter(len(v.path) for v in verify_all(node_logits(table, items), items))
        assert set(lengths) == {1, 2, 3, 4}
        assert all(count >= 10 for count in lengths.values())
