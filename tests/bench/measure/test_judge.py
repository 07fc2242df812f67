import math

import pytest
import torch

from bench.measure.judge import Judge, Pair
from bench.measure.reference import ReferenceModel
from bench.measure.ties import TIE_GAP
from server.config import SamplingParams
from server.engine.engine import Engine
from server.sampling.uniform import uniform
from tests.bench.traces import make_turn

PROMPT = (5, 6, 7)
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def reference(engine: Engine) -> ReferenceModel:
    return ReferenceModel(engine.loaded)


def greedy_pair(left: tuple[int, ...], right: tuple[int, ...]) -> Pair:
    return Pair("greedy_on_vs_off", make_turn(PROMPT, line=9, index=1), (left, right), GREEDY)


def test_equal_outputs_are_no_mismatch(reference: ReferenceModel) -> None:
    assert Judge(reference).compare(greedy_pair((1, 2), (1, 2))) is None


def test_a_greedy_mismatch_is_judged_after_the_common_tokens(reference: ReferenceModel) -> None:
    logits_V = reference.next_logits((*PROMPT, 8))
    best, second = logits_V.topk(2).indices.tolist()
    mismatch = Judge(reference).compare(greedy_pair((8, best, 1), (8, second, 2)))
    assert mismatch is not None
    assert (mismatch.line, mismatch.turn, mismatch.position) == (9, 2, 1)
    assert mismatch.tokens == (best, second)
    assert mismatch.gap == pytest.approx(float(logits_V[best] - logits_V[second]))
    assert mismatch.margin is None
    assert not mismatch.is_tie


def test_a_wrong_token_on_both_sides_is_no_tie(reference: ReferenceModel) -> None:
    worst = reference.next_logits(PROMPT).argsort()[:2].tolist()
    mismatch = Judge(reference).compare(greedy_pair((worst[0],), (worst[1],)))
    assert mismatch is not None
    assert mismatch.gap is not None
    assert mismatch.gap > 1.0
    assert not mismatch.is_tie


def test_an_output_that_ends_early_is_never_explained(reference: ReferenceModel) -> None:
    mismatch = Judge(reference).compare(greedy_pair((1,), (1, 2)))
    assert mismatch is not None
    assert mismatch.tokens == (None, 2)
    assert (mismatch.gap, mismatch.is_tie) == (None, False)


class EqualLogits(ReferenceModel):
    """Gives two tokens the same logit up to a small difference."""

    def __init__(self, difference: float) -> None:
        self._difference = difference

    def next_logits(self, token_ids: object) -> torch.Tensor:
        return torch.tensor([-9.0, 2.0, 2.0 - self._difference])


@pytest.mark.parametrize(("difference", "is_tie"), [(0.9 * TIE_GAP, True), (1.1 * TIE_GAP, False)])
def test_the_tie_limit_is_a_thousandth_of_a_logit(difference: float, is_tie: bool) -> None:
    mismatch = Judge(EqualLogits(difference)).compare(greedy_pair((1,), (2,)))
    assert mismatch is not None
    assert mismatch.is_tie == is_tie


def test_a_sampled_mismatch_is_judged_by_the_number_that_was_drawn(
    reference: ReferenceModel,
) -> None:
    turn = make_turn(PROMPT)
    pair = Pair("sampled_on_vs_off", turn, ((8, 1), (8, 2)), SAMPLED)
    mismatch = Judge(reference).compare(pair)
    assert mismatch is not None
    probs_V = (reference.next_logits((*PROMPT, 8)).double() / 0.8).softmax(-1)
    ends = probs_V.cumsum(0).tolist()
    drawn = uniform(3, 4)
    distances = [max(drawn - ends[token], ends[token - 1] - drawn, 0.0) for token in (1, 2)]
    assert mismatch.margin == pytest.approx(max(distances), rel=1e-4)
    assert mismatch.gap is not None
    assert mismatch.gap > TIE_GAP
    assert not math.isinf(mismatch.gap)
