from random import Random

import pytest

from training.data.self_distill import MAX_PERIOD, MIN_REPEATED_TOKENS, ends_in_circle


@pytest.mark.parametrize("period", [1, 2, 7, 12, 13, MAX_PERIOD])
def test_a_circle_is_found_once_it_has_run_long_enough(period: int) -> None:
    lead_in = Random(period).sample(range(1000, 2000), 20)
    circle = list(range(period))
    needed = max(MIN_REPEATED_TOKENS, 4 * period)
    rounds = circle * (needed // period + 1)
    assert ends_in_circle(lead_in + rounds[:needed])
    assert not ends_in_circle(lead_in + rounds[: needed - 1])


def test_a_circle_that_was_left_is_none() -> None:
    assert not ends_in_circle([1, 2] * 40 + [3])


def test_longer_periods_and_ordinary_text_are_no_circles() -> None:
    assert not ends_in_circle(list(range(MAX_PERIOD + 1)) * 6)
    assert not ends_in_circle(Random(0).choices(range(50), k=300))
    assert not ends_in_circle([])
