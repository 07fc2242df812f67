"""Calibration: cells, what is learned from outcomes, and how it fades."""

from random import Random

import pytest

from heads.calibration import (
    AGREED,
    MAX_DEPTH,
    NUM_BINS,
    Calibrator,
    DraftOutcome,
    Estimate,
    RequestCalibration,
    head_cell,
    head_ratios,
    probability_bin,
)
from heads.lookup import MAX_MATCH, lookup_cell, lookup_prior

PROBABILITIES = (0.0, 0.005, 0.015, 0.05, 0.3, 0.55, 0.999, 1.0)


HEADS, LOOKUP = "medusa", "lookup"


def outcome(source: str, cell: int, raw: float, is_accepted: bool) -> DraftOutcome:
    return DraftOutcome(Estimate(raw, raw, raw, source, cell), is_accepted)


class TestCells:
    def test_candidates_that_differ_have_cells_of_their_own(self) -> None:
        bins = len({probability_bin(p) for p in PROBABILITIES})
        heads = {head_cell(d, p) for d in range(1, MAX_DEPTH + 1) for p in PROBABILITIES}
        assert len(heads) == MAX_DEPTH * bins
        lookup = {lookup_cell(n, first) for n in range(1, MAX_MATCH + 1) for first in (True, False)}
        assert len(lookup) == 2 * MAX_MATCH

    def test_deeper_and_longer_than_known_share_the_last(self) -> None:
        assert head_cell(MAX_DEPTH + 5, 0.5) == head_cell(MAX_DEPTH, 0.5)
        assert lookup_cell(MAX_MATCH + 5, True) == lookup_cell(MAX_MATCH, True)

    def test_longer_matches_are_surer_at_first(self) -> None:
        values = [lookup_prior(length, True) for length in range(1, MAX_MATCH + 3)]
        assert values == sorted(values)
        assert lookup_prior(3, False) < lookup_prior(3, True)


class TestCalibrator:
    def test_believes_the_source_at_first(self) -> None:
        assert Calibrator().probability(HEADS, head_cell(1, 0.4), 0.4) == 0.4

    def test_learns_the_rate_of_a_cell_and_of_no_other(self) -> None:
        rng, made = Random(0), Calibrator()
        cell, other = head_cell(1, 0.5), head_cell(2, 0.5)
        made.learn(outcome(HEADS, cell, 0.5, rng.random() < 0.25) for _ in range(4000))
        # 400 expected hits are remembered: the standard error of the rate is about 0.015.
        assert made.probability(HEADS, cell, 0.5) == pytest.approx(0.25, abs=0.06)
        assert made.probability(HEADS, other, 0.5) == 0.5
        assert made.probability("mtp", cell, 0.5) == 0.5, "another source's cell"

    def test_forgets_what_no_longer_holds(self) -> None:
        rng, made, cell = Random(1), Calibrator(), lookup_cell(4, True)
        for rate in (0.9, 0.2):
            made.learn(outcome(LOOKUP, cell, 0.5, rng.random() < rate) for _ in range(6000))
            assert made.probability(LOOKUP, cell, 0.5) == pytest.approx(rate, abs=0.06)

    def test_never_is_quite_sure(self) -> None:
        made, cell = Calibrator(), probability_bin(0.9)
        made.learn(outcome(AGREED, cell, 0.9, is_accepted=True) for _ in range(1000))
        assert made.probability(AGREED, cell, 0.95) == 0.99

    def test_begins_with_given_ratios(self) -> None:
        made = Calibrator({HEADS: {0: 0.5}})
        assert made.probability(HEADS, 0, 0.4) == 0.2
        assert made.ratio(HEADS, 0) == 0.5
        assert made.ratio(LOOKUP, 0) == 1.0
        made.learn([outcome(HEADS, 0, 10.0, is_accepted=True)] * 5)
        assert made.ratio(HEADS, 0) == pytest.approx((10.0 * 0.5 + 5) / (10.0 + 50.0))


class TestRequestCalibration:
    def test_is_neutral_at_first(self) -> None:
        assert {RequestCalibration().factor(source) for source in (HEADS, LOOKUP)} == {1.0}

    def test_a_request_whose_drafts_fail_gets_fewer(self) -> None:
        made = RequestCalibration()
        made.learn([outcome(HEADS, head_cell(1, 0.6), 0.6, is_accepted=False)] * 20)
        assert made.factor(HEADS) < 0.4
        assert made.factor(LOOKUP) == 1.0

    def test_a_request_whose_drafts_hold_gets_more_within_bounds(self) -> None:
        made = RequestCalibration()
        made.learn([outcome(LOOKUP, lookup_cell(1, True), 0.1, is_accepted=True)] * 200)
        assert made.factor(LOOKUP) == 1.5

    def test_recovers_when_its_text_becomes_easy(self) -> None:
        made, cell = RequestCalibration(), head_cell(1, 0.6)
        made.learn([outcome(HEADS, cell, 0.6, is_accepted=False)] * 100)
        for _ in range(60):
            made.learn([outcome(HEADS, cell, 0.6, is_accepted=True)])
        assert made.factor(HEADS) > 1.0


def test_measured_ratios_of_heads_have_the_cells_of_their_candidates() -> None:
    ratios = Calibrator({HEADS: head_ratios([[2.0] * NUM_BINS, [3.0] * NUM_BINS])})
    assert ratios.ratio(HEADS, head_cell(1, 0.5)) == 2.0
    assert ratios.ratio(HEADS, head_cell(2, 0.99)) == 3.0
    assert ratios.ratio(HEADS, head_cell(3, 0.005)) == 1.0
    assert len(head_ratios([[2.0] * NUM_BINS] * 40)) == MAX_DEPTH * NUM_BINS
