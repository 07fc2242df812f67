"""How likely drafts are right, learned from which of them were accepted.

A draft source gives every candidate a raw probability. Candidates are sorted into *cells* by where
they come from and how probable they claim to be; in each cell the raw probability is multiplied by
hits / expected hits. That is learned over all traffic (`Calibrator`) and, by source alone, for
every request (`RequestCalibration`): a request whose drafts fail gets few.

    cells    heads:  depth x bin of the raw probability
             lookup: length of the match x whether it is the longest one
             both:   bin of the combined probability

Plain Python, since a step asks for a few dozen candidates.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

_BIN_EDGES = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
NUM_BINS = len(_BIN_EDGES) + 1
MAX_DEPTH = 16
MAX_MATCH = 16
# Probability that the token after a match of 1, 2, ... tokens comes again, before any traffic: what
# 75,000 places in the built-in model's answers to prompts of many kinds gave, a little lower.
_LOOKUP_PRIOR = (0.2, 0.5, 0.6, 0.68, 0.72, 0.76, 0.79, 0.81, 0.83, 0.84, 0.85, 0.86, 0.87, 0.88)
_LONGEST_PRIOR = 0.95
# Where a further match goes on differently; there the length hardly matters.
_FURTHER_PRIOR = 0.12
MAX_PROBABILITY = 0.99
# Expected hits that the prior of a cell, or of a request, counts as.
CELL_PRIOR = 10.0
_REQUEST_PRIOR = 4.0
# Expected hits after which older ones begin to fade.
_CELL_MEMORY = 400.0
_REQUEST_MEMORY = 12.0
_REQUEST_RANGE = (0.2, 1.5)


class DraftSource(IntEnum):
    """Where a candidate comes from."""

    HEADS = 0
    LOOKUP = 1
    BOTH = 2


_LOOKUP_START = MAX_DEPTH * NUM_BINS
_BOTH_START = _LOOKUP_START + 2 * MAX_MATCH
NUM_CELLS = _BOTH_START + NUM_BINS


def head_bin(probability: float) -> int:
    """Bin of a candidate's raw probability, below `NUM_BINS`."""
    return bisect_right(_BIN_EDGES, probability)


def head_cell(depth: int, probability: float) -> int:
    """Cell of a draft head's candidate; depth from 1."""
    return (min(depth, MAX_DEPTH) - 1) * NUM_BINS + head_bin(probability)


def lookup_cell(length: int, is_longest: bool) -> int:
    """Cell of the token after a match of `length` tokens, from 1."""
    return _LOOKUP_START + 2 * (min(length, MAX_MATCH) - 1) + is_longest


def both_cell(probability: float) -> int:
    """Cell of a token that heads and lookup agree on."""
    return _BOTH_START + bisect_right(_BIN_EDGES, probability)


def source_of(cell: int) -> DraftSource:
    """Source of a cell's candidates."""
    if cell < _LOOKUP_START:
        return DraftSource.HEADS
    return DraftSource.LOOKUP if cell < _BOTH_START else DraftSource.BOTH


def ratios_from_heads(ratios_KC: Sequence[Sequence[float]]) -> list[float]:
    """Ratios of all cells where those of head cells are known; the others are neutral.

    Args:
        ratios_KC: One row a depth, from 1, of `NUM_BINS` ratios; rows beyond `MAX_DEPTH` are left
            out.
    """
    known = [ratio for ratios_C in ratios_KC[:MAX_DEPTH] for ratio in ratios_C]
    return known + [1.0] * (NUM_CELLS - len(known))


def lookup_prior(length: int, is_longest: bool) -> float:
    """Raw probability of the token after a match."""
    if not is_longest:
        return _FURTHER_PRIOR
    return _LOOKUP_PRIOR[length - 1] if length <= len(_LOOKUP_PRIOR) else _LONGEST_PRIOR


class Estimate(NamedTuple):
    """What is believed about a draft on a tree's node.

    Attributes:
        value: Probability that the node's whole path is accepted.
        probability: That it is if its parent is; calibrated.
        raw: The same as its source claims.
        cell: Of the calibration.
        reference_place: Of the token in the reference that it was copied from, as in `Match`.
    """

    value: float
    probability: float
    raw: float
    cell: int
    reference_place: int = -1


class Outcome(NamedTuple):
    """What became of a draft whose parent was accepted."""

    estimate: Estimate
    is_accepted: bool


class Calibrator:
    """Ratios of all cells, over all traffic.

    Attributes:
        ratios: For every cell what raw probabilities are multiplied by.
    """

    def __init__(self, ratios: Sequence[float] | None = None) -> None:
        self.ratios = [1.0] * NUM_CELLS if ratios is None else list(ratios)
        if len(self.ratios) != NUM_CELLS:
            raise ValueError(f"{len(self.ratios)} ratios; give {NUM_CELLS}, one a cell")
        self._expected = [CELL_PRIOR] * NUM_CELLS
        self._hits = [CELL_PRIOR * ratio for ratio in self.ratios]

    def probability(self, cell: int, raw: float) -> float:
        """Correct a raw probability."""
        return min(MAX_PROBABILITY, raw * self.ratios[cell])

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        """Count drafts whose parents were accepted."""
        for estimate, is_accepted in outcomes:
            cell = estimate.cell
            expected, hits = self._expected[cell] + estimate.raw, self._hits[cell] + is_accepted
            if expected > _CELL_MEMORY:
                fading = _CELL_MEMORY / expected
                expected, hits = expected * fading, hits * fading
            self._expected[cell], self._hits[cell] = expected, hits
            self.ratios[cell] = hits / expected


@dataclass(slots=True)
class RequestCalibration:
    """How much better or worse one request's drafts are than those of all traffic, by source."""

    _expected: list[float] = field(default_factory=lambda: [_REQUEST_PRIOR] * len(DraftSource))
    _hits: list[float] = field(default_factory=lambda: [_REQUEST_PRIOR] * len(DraftSource))

    def factor(self, source: DraftSource) -> float:
        """What a probability is multiplied by."""
        low, high = _REQUEST_RANGE
        return min(high, max(low, self._hits[source] / self._expected[source]))

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        """Count the drafts of a step whose parents were accepted."""
        for estimate, is_accepted in outcomes:
            source = source_of(estimate.cell)
            self._expected[source] += estimate.probability
            self._hits[source] += is_accepted
        for source in DraftSource:
            if self._expected[source] > _REQUEST_MEMORY:
                fading = _REQUEST_MEMORY / self._expected[source]
                self._expected[source] *= fading
                self._hits[source] *= fading
