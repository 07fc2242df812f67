import math

import pytest
import torch
from torch import Tensor

from heads.seen_rows import MAX_SEEN_ROWS, gather_seen_rows, top_candidates

WIDTH, VOCAB = 4, 30
IDS = torch.tensor([3, 7, 0])


def unembedding() -> Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def test_the_most_recent_tokens_outside_the_vocabulary_come_first() -> None:
    seen = gather_seen_rows([9, 3, 5, 9, 0], {3, 7, 0}, unembedding())
    assert seen is not None
    assert seen.token_ids_E.tolist() == [9, 5]
    assert torch.equal(seen.rows_ED, unembedding()[[9, 5]])
    assert seen.to(torch.bfloat16).rows_ED.dtype == torch.bfloat16


def test_a_prompt_inside_the_vocabulary_has_none() -> None:
    assert gather_seen_rows([3, 7], {3, 7, 0}, unembedding()) is None
    assert gather_seen_rows([], {3}, unembedding()) is None


def test_a_long_prompt_is_cut_to_its_end() -> None:
    rows = torch.zeros(2 * MAX_SEEN_ROWS, 1)
    seen = gather_seen_rows(range(2 * MAX_SEEN_ROWS), set(), rows)
    assert seen is not None
    assert seen.token_ids_E.tolist() == list(range(2 * MAX_SEEN_ROWS - 1, MAX_SEEN_ROWS - 1, -1))


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_both_kinds_compete_by_one_softmax(num_ranks: int) -> None:
    rows = unembedding()
    states_BKD = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    seen = [gather_seen_rows(p, set(IDS.tolist()), rows) for p in ([9, 5, 3], [], [7, 12])]
    found = top_candidates(states_BKD, states_BKD @ rows[IDS].T, IDS, num_ranks, seen)
    for sequence, tokens in enumerate(([3, 7, 0, 9, 5], [3, 7, 0], [3, 7, 0, 12])):
        for state in range(2):
            scores = (states_BKD[sequence, state] @ rows[tokens].T).log_softmax(0).tolist()
            ranked = sorted(zip(scores, tokens, strict=True), reverse=True)[:num_ranks]
            padding = [(-math.inf, -1)] * (num_ranks - len(ranked))
            expected = ranked + padding
            assert found.token_ids_BKR[sequence, state].tolist() == [t for _, t in expected]
            assert found.log_probs_BKR[sequence, state].tolist() == pytest.approx(
                [score for score, _ in expected], abs=1e-5
            )
