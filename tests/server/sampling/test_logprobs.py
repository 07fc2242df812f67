"""Log-probabilities of the tokens that a step brought."""

import pytest
import torch

from heads.candidates import DraftTokens
from heads.tree import DraftTree
from server.config import SamplingParams
from server.core.step import StepEntry, Verdict
from server.sampling.verify import token_logprobs
from tests.support.engine_tools import make_sequence

A, B, C, D, ROOT = 10, 11, 12, 13, 5
TREE = DraftTree((-1, 0, 0, 1), (-1, 0, 1, 0))


def entry(num_top: int | None) -> StepEntry:
    sampling = SamplingParams(logprobs=num_top, temperature=0.1)
    sequence = make_sequence((4,), (ROOT,), sampling)
    return StepEntry(sequence, 1, DraftTokens(TREE, (ROOT, A, B, C)), True, True)


def random_rows(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, 320, generator=torch.Generator().manual_seed(seed))


def test_are_those_of_the_raw_distribution_at_each_node_of_the_path() -> None:
    logits_SV = random_rows(9, seed=0)
    entries = token_logprobs(logits_SV, entry(3), 5, Verdict((0, 1, 3), D))
    assert entries is not None
    expected = logits_SV.double().log_softmax(-1)
    for row, token_id, found in zip((5, 6, 8), (A, C, D), entries, strict=True):
        assert found.token_id == token_id
        assert found.logprob == pytest.approx(expected[row, token_id].item(), abs=1e-5)
        best = expected[row].topk(3)
        assert [top for top, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_no_other_tokens_are_reported_unless_they_are_asked_for() -> None:
    entries = token_logprobs(random_rows(4, seed=1), entry(0), 0, Verdict((0, 2), D))
    assert entries is not None
    assert [(found.token_id, found.top) for found in entries] == [(B, ()), (D, ())]


def test_there_are_none_for_a_request_that_asks_for_none() -> None:
    assert token_logprobs(random_rows(4, seed=1), entry(None), 0, Verdict((0,), D)) is None


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits_SV = random_rows(4, seed=2).bfloat16()
    entries = token_logprobs(logits_SV, entry(0), 0, Verdict((0,), D))
    assert entries is not None
    expected = logits_SV.double().log_softmax(-1)[0, D].item()
    assert entries[0].logprob == pytest.approx(expected, abs=1e-5)
