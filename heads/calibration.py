"""How likely drafts are right, learned from which of them were accepted.

A draft source gives every candidate a raw probability and sorts it into one of its *cells*, by how
probable it claims to be and where it stands. In each cell the raw probability is multiplied by
hits / expected hits. That is learned over all traffic (`Calibrator`) and, by source alone, for
every request (`RequestCalibration`): a request whose drafts fail gets few.

    source     cells
    medusa     depth x bin of the raw probability
    mtp        depth x bin of the raw probability
    lookup     length of the match x whether it is the longest one
    agreed     bin of the combined probability; tokens that several sources propose

Plain Python, since a step asks for a few dozen candidates.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_BIN_EDGES = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
NUM_BINS = len(_BIN_EDGES) + 1
MAX_DEPTH = 16
# The source of tokens that several sources propose.
AGREED = "agreed"
MAX_PROBABILITY = 0.99
# Expected hits that the prior of a cell, or of a request, counts as.
CELL_PRIOR = 10.0
_REQUEST_PRIOR = 4.0
# Expected hits after which older ones begin to fade.
_CELL_MEMORY = 400.0
_REQUEST_MEMORY = 12.0
_REQUEST_RANGE = (0.2, 1.5)


def probability_bin(probability: float) -> int:
    """Bin of a candidate's raw probability, below `NUM_BINS`."""
    return bisect_right(_BIN_EDGES, probability)


def head_cell(depth: int, probability: float) -> int:
    """Cell of a draft head's candidate; depth from 1."""
    return (min(depth, MAX_DEPTH) - 1) * NUM_BINS + probability_bin(probability)


def head_ratios(ratios_KC: Sequence[Sequence[float]]) -> dict[int, float]:
    """Ratios by cell of draft heads that were measured before.

    Args:
        ratios_KC: One row per depth, from 1, of `NUM_BINS` ratios; rows beyond `MAX_DEPTH` are left
            out.
    """
    return {
        depth * NUM_BINS + index: ratio
        for depth, ratios_C in enumerate(ratios_KC[:MAX_DEPTH])
        for index, ratio in enumerate(ratios_C)
    }


class Estimate(NamedTuple):
    """What is believed about the draft on a tree's node.

    Attributes:
        value: Probability that the node's whole path is accepted.
        probability: Probability that the node is accepted if its parent is; calibrated.
        raw: The same probability as its source claims it.
        source: Name of the source that proposed it, or `AGREED`.
        cell: Its cell among the source's cells.
        prediction_place: Index in the request's predicted output of the token that it was copied
            from; -1 if it comes from elsewhere.
    """

    value: float
    probability: float
    raw: float
    source: str
    cell: int
    prediction_place: int = -1


class DraftOutcome(NamedTuple):
    """What became of a draft whose parent was accepted."""

    estimate: Estimate
    is_accepted: bool


class Calibrator:
    """Ratios of all cells, over all traffic.

    Args:
        ratios: By source and cell, where they are known from before; other cells are neutral.
    """

    def __init__(self, ratios: Mapping[str, Mapping[int, float]] | None = None) -> None:
        self._ratios: dict[tuple[str, int], float] = {}
        self._expected: dict[tuple[str, int], float] = {}
        self._hits: dict[tuple[str, int], float] = {}
        for source, known in (ratios or {}).items():
            for cell, ratio in known.items():
                self._ratios[source, cell] = ratio
                self._hits[source, cell] = CELL_PRIOR * ratio

    def ratio(self, source: str, cell: int) -> float:
        """What the raw probabilities of a cell are multiplied by."""
        return self._ratios.get((source, cell), 1.0)

    def probability(self, source: str, cell: int, raw: float) -> float:
        """Correct a raw probability."""
        return min(MAX_PROBABILITY, raw * self._ratios.get((source, cell), 1.0))

    def learn(self, outcomes: Iterable[DraftOutcome]) -> None:
        """Count drafts whose parents were accepted."""
        for estimate, is_accepted in outcomes:
            key = estimate.source, estimate.cell
            expected = self._expected.get(key, CELL_PRIOR) + estimate.raw
            hits = self._hits.get(key, CELL_PRIOR) + is_accepted
            if expected > _CELL_MEMORY:
                fading = _CELL_MEMORY / expected
                expected, hits = expected * fading, hits * fading
            self._expected[key], self._hits[key] = expected, hits
            self._ratios[key] = hits / expected


@dataclass(slots=True)
class RequestCalibration:
    """How much better or worse one request's drafts are than those of all traffic, by source."""

    _expected: dict[str, float] = field(default_factory=dict)
    _hits: dict[str, float] = field(default_factory=dict)

    def factor(self, source: str) -> float:
        """What a probability of that source is multiplied by."""
        if source not in self._expected:
            return 1.0
        low, high = _REQUEST_RANGE
        return min(high, max(low, self._hits[source] / self._expected[source]))

    def learn(self, outcomes: Iterable[DraftOutcome]) -> None:
        """Count the drafts of a step whose parents were accepted."""
        for estimate, is_accepted in outcomes:
            source = estimate.source
            expected = self._expected.get(source, _REQUEST_PRIOR) + estimate.probability
            self._expected[source] = expected
            self._hits[source] = self._hits.get(source, _REQUEST_PRIOR) + is_accepted
        for source, expected in self._expected.items():
            if expected > _REQUEST_MEMORY:
                fading = _REQUEST_MEMORY / expected
                self._expected[source] = expected * fading
                self._hits[source] *= fading
