import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.measure.ties import first_difference, greedy_gap, sampled_gap
from server.config import SamplingParams
from server.sampling.logits import draw_tokens, filter_logits

WARM = SamplingParams(temperature=0.8, seed=1)


def draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> int:
    return int(draw_tokens(filter_logits(logits_V[None], [params]), [uniform])[0])


def test_equal_outputs_have_no_difference() -> None:
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((), ()) is None


def test_the_first_of_several_differences_is_found() -> None:
    assert first_difference((1, 2, 3, 4), (1, 9, 3, 8)) == 1


def test_an_early_end_is_a_difference_at_the_end() -> None:
    assert first_difference((1, 2), (1, 2, 3)) == 2
    assert first_difference((1, 2, 3), (1, 2)) == 2
    assert first_difference((), (5,)) == 0


def test_the_gap_of_the_best_two_tokens_is_their_distance() -> None:
    logits_V = torch.tensor([1.0, 4.0, 3.5, 0.0])
    assert greedy_gap(logits_V, (1, 2)) == pytest.approx(0.5)
    assert greedy_gap(logits_V, (2, 1)) == pytest.approx(0.5)


def test_two_equally_bad_tokens_are_no_tie() -> None:
    logits_V = torch.tensor([9.0, 2.0, 2.0])
    assert greedy_gap(logits_V, (1, 2)) == pytest.approx(7.0)


def test_a_number_at_the_boundary_of_both_tokens_has_no_gap() -> None:
    logits_V = torch.log(torch.tensor([0.25, 0.25, 0.5]))
    found = sampled_gap(logits_V, SamplingParams(temperature=1.0, seed=1), 0.5, (1, 2))
    assert found.gap == pytest.approx(0.0, abs=1e-6)
    assert found.margin == pytest.approx(0.0, abs=1e-6)


def test_the_gap_is_the_distance_in_log_odds_times_the_temperature() -> None:
    params = SamplingParams(temperature=0.5, seed=1)
    logits_V = 0.5 * torch.log(torch.tensor([0.25, 0.25, 0.5]))
    found = sampled_gap(logits_V, params, 0.6, (1, 2))
    assert found.gap == pytest.approx(0.5 * math.log(0.6 / 0.4), rel=1e-5)
    assert found.margin == pytest.approx(0.1, rel=1e-5)


def test_the_farther_of_the_two_tokens_counts() -> None:
    params = SamplingParams(temperature=1.0, seed=1)
    logits_V = torch.log(torch.tensor([0.1, 0.3, 0.2, 0.4]))
    near, far = (sampled_gap(logits_V, params, 0.62, (3, token)) for token in (2, 0))
    assert near.margin == pytest.approx(0.02, rel=1e-4)
    assert far.margin == pytest.approx(0.52, rel=1e-4)
    assert far.gap > near.gap


def test_a_token_that_is_filtered_out_cannot_be_a_tie() -> None:
    params = SamplingParams(temperature=1.0, top_k=1, seed=1)
    found = sampled_gap(torch.tensor([2.0, 1.0]), params, 0.5, (0, 1))
    assert found.gap == math.inf


def test_the_lowest_number_cannot_be_moved_to_a_later_token() -> None:
    logits_V = torch.zeros(2)
    assert sampled_gap(logits_V, WARM, 0.0, (0, 1)).gap == math.inf


@given(
    seed=st.integers(0, 2**31),
    uniform=st.floats(0.001, 0.999),
    token=st.integers(0, 7),
    temperature=st.floats(0.3, 2.0),
)
def test_the_gap_is_just_what_moves_the_draw(
    seed: int, uniform: float, token: int, temperature: float
) -> None:
    logits_V = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
    params = SamplingParams(temperature=temperature, seed=1)
    drawn = draw(logits_V, params, uniform)
    gap = sampled_gap(logits_V, params, uniform, (drawn, token)).gap
    if token == drawn:
        assert gap == 0.0
        return
    # Raise the logits on the far side of the boundary that must move, and lower the others.
    boundary = token if token < drawn else token - 1
    sign_V = torch.where(torch.arange(8) <= boundary, 1.0, -1.0).double()
    toward = 1.0 if token < drawn else -1.0

    def draw_after(factor: float) -> int:
        return draw(logits_V + toward * sign_V * gap / 2 * factor, params, uniform)

    if token < drawn:
        assert draw_after(1.0001) <= token < draw_after(0.9999)
    else:
        assert draw_after(1.0001) >= token > draw_after(0.9999)
