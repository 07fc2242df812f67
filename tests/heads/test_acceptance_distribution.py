"""Exact acceptance emits exactly the target distribution, whatever is drafted.

The "model" is a Markov chain over five tokens, so that the probability of every continuation is
known. Seeds are fixed; with a correct implementation, one choice of seeds in a million would fail.

Shape suffixes: B sequences, D depths, V vocabulary, X emitted tokens or continuations.
"""

import math
from collections.abc import Callable
from itertools import pairwise, product
from random import Random

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from heads.acceptance import AcceptedPaths, DrawNext, accept_exact
from heads.candidates import DraftTokens, TreeBatch
from tests.heads.trees import random_drafts

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VOCAB_SIZE = 5
FALSE_ALARM_ODDS = 1e-6

AcceptExact = Callable[[TreeBatch, DrawNext], AcceptedPaths]


def markov_chain(seed: int) -> Tensor:
    """Probabilities [V, V] of the next token, one row per last token."""
    generator = torch.Generator().manual_seed(seed)
    return (0.7 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)).softmax(dim=1)


def with_root(draft: DraftTokens, root: int) -> DraftTokens:
    return DraftTokens(draft.tree, (root, *draft.token_ids[1:]))


def emit(
    chain_VV: Tensor, num_sequences: int, num_tokens: int, max_nodes: int, accept: AcceptExact
) -> Tensor:
    """Continue token 0 in every sequence, through one random tree per sequence and step.

    Returns:
        The emitted tokens [B, num_tokens].
    """
    rng, generator = Random(1), torch.Generator().manual_seed(2)
    drafts_of = {
        root: [
            with_root(random_drafts(rng, rng.randint(1, max_nodes), VOCAB_SIZE), root)
            for _ in range(30)
        ]
        for root in range(VOCAB_SIZE)
    }
    texts = [[0] for _ in range(num_sequences)]
    unfinished = texts
    while unfinished:
        drafts = [rng.choice(drafts_of[text[-1]]) for text in unfinished]
        trees = TreeBatch.from_drafts(drafts, CPU)

        def draw_next(node_B: Tensor, trees: TreeBatch = trees) -> Tensor:
            token_B = trees.token_ids_BN.gather(1, node_B.unsqueeze(1)).squeeze(1)
            return torch.multinomial(chain_VV[token_B], 1, generator=generator).squeeze(1)

        accepted = accept(trees, draw_next)
        num_nodes, bonus = accepted.num_nodes_B.tolist(), accepted.bonus_B.tolist()
        for row, (text, draft) in enumerate(zip(unfinished, drafts, strict=True)):
            path = accepted.node_ids_BD[row, 1 : num_nodes[row]].tolist()
            text += [*(draft.token_ids[node] for node in path), bonus[row]]
        unfinished = [text for text in unfinished if len(text) <= num_tokens]
    return torch.tensor([text[1 : num_tokens + 1] for text in texts])


def p_value(chain_VV: Tensor, emitted_BX: Tensor) -> float:
    """Chance that the chain's own continuations of token 0 are as far from their expectation."""
    num_sequences, num_tokens = emitted_BX.shape
    weights_X = VOCAB_SIZE ** torch.arange(num_tokens)
    observed = (emitted_BX * weights_X).sum(dim=1).bincount(minlength=VOCAB_SIZE**num_tokens)
    expected = torch.zeros(VOCAB_SIZE**num_tokens, dtype=torch.float64)
    for text in product(range(VOCAB_SIZE), repeat=num_tokens):
        steps = pairwise((0, *text))
        probability = math.prod(float(chain_VV[last, token]) for last, token in steps)
        index = sum(token * VOCAB_SIZE**place for place, token in enumerate(text))
        expected[index] = probability * num_sequences
    # Below five expected counts the statistic would not follow its distribution.
    assert float(expected.min()) >= 5.0
    expected *= num_sequences / expected.sum()
    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)


def accept_wrong_sibling(trees: TreeBatch, draw_next: DrawNext) -> AcceptedPaths:
    """Do as `accept_exact`, but end at the last sibling of the first accepted token."""
    accepted = accept_exact(trees, draw_next)
    if trees.max_depth == 0:
        return accepted
    num_nodes = trees.parents_BN.shape[1]
    is_child_BN = trees.parents_BN == 0
    last_child_B = num_nodes - 1 - is_child_BN.flip(1).int().argmax(dim=1)
    is_wrong_B = accepted.num_nodes_B > 1
    node_ids_BD = accepted.node_ids_BD.clone()
    node_ids_BD[is_wrong_B, 1] = last_child_B[is_wrong_B]
    node_ids_BD[is_wrong_B, 2:] = -1
    last_B = node_ids_BD[:, :2].amax(dim=1)
    return AcceptedPaths(node_ids_BD, (node_ids_BD >= 0).sum(dim=1), draw_next(last_B))


class TestExactKeepsTheTargetDistribution:
    @pytest.mark.parametrize("max_nodes", [1, 4, 12])
    @pytest.mark.parametrize("num_tokens", [2, 3])
    def test_of_every_continuation(self, num_tokens: int, max_nodes: int) -> None:
        chain_VV = markov_chain(seed=3)
        emitted_BX = emit(chain_VV, 20_000, num_tokens, max_nodes, accept_exact)
        assert p_value(chain_VV, emitted_BX) > FALSE_ALARM_ODDS

    def test_and_the_test_notices_a_wrong_sibling(self) -> None:
        chain_VV = markov_chain(seed=3)
        emitted_BX = emit(chain_VV, 20_000, 2, 4, accept_wrong_sibling)
        assert p_value(chain_VV, emitted_BX) < FALSE_ALARM_ODDS

    def test_and_the_test_notices_another_chain(self) -> None:
        emitted_BX = emit(markov_chain(seed=4), 20_000, 2, 4, accept_exact)
        assert p_value(markov_chain(seed=3), emitted_BX) < FALSE_ALARM_ODDS
