"""Trees from heads and lookup together, against an enumeration of all paths."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from heads.calibration import (
    NUM_CELLS,
    Calibrator,
    DraftSource,
    Outcome,
    RequestCalibration,
    both_cell,
    head_cell,
    lookup_cell,
    lookup_prior,
    source_of,
)
from heads.candidates import DraftTokens
from heads.lookup import Match
from heads.merged_tree import TreeLimits, TreeMerger
from heads.proposals import GrownProposal, HeadProposal, MedusaProposal
from heads.tree import DraftTree

Path = tuple[int, ...]
IDS_KR = [[5, 6, 7], [8, 5, -1]]
PROBABILITIES_KR = [[0.5, 0.3, 0.1], [0.6, 0.2, 0.0]]
WIDE = TreeLimits(num_nodes=64, max_depth=8)


def medusa(ids_KR: Sequence[Sequence[int]] = IDS_KR) -> MedusaProposal:
    return MedusaProposal(DraftTree.chain(2), 1, ids_KR, PROBABILITIES_KR)


def grown() -> GrownProposal:
    """Below the root 5 (0.5) and 6 (0.4), below 5 comes 8 (0.9)."""
    drafts = DraftTokens(DraftTree((-1, 0, 1, 0), (-1, 0, 0, 1)), (1, 5, 8, 6))
    return GrownProposal(drafts, (0.5, 0.9, 0.4))


def merged(
    proposal: HeadProposal | None = None,
    matches: Sequence[Match] = (),
    limits: TreeLimits = WIDE,
    calibrator: Calibrator | None = None,
    calibration: RequestCalibration | None = None,
) -> DraftTokens:
    merger = TreeMerger(calibrator or Calibrator())
    return merger.merge(1, proposal, matches, calibration or RequestCalibration(), limits)


def values_by_path(drafts: DraftTokens) -> dict[Path, float]:
    paths: list[Path] = [()]
    for node in range(1, drafts.tree.num_nodes):
        paths.append((*paths[drafts.tree.parents[node]], drafts.token_ids[node]))
    values = [estimate.value for estimate in drafts.estimates]
    return dict(zip(paths[1:], values, strict=True))


class SlowPaths:
    """Values of all paths below a root, from the definition."""

    def __init__(self, matches: Sequence[Match], calibrator: Calibrator, max_depth: int) -> None:
        self.matches, self.calibrator, self.max_depth = matches, calibrator, max_depth
        self.values: dict[Path, float] = {}
        self.go_on((), 1.0)

    def lengths(self, path: Path) -> dict[int, int]:
        """Tokens that were looked up behind a path, with their matches' lengths."""
        after: dict[int, int] = {}
        for match in self.matches:
            if match.continuation[: len(path)] == path and len(match.continuation) > len(path):
                after.setdefault(match.continuation[len(path)], match.length + len(path))
        return after

    def is_longest(self, path: Path) -> bool:
        """Whether every token of the path is the one of the longest match there."""
        return all(
            path[depth] == next(iter(self.lengths(path[:depth])), None)
            for depth in range(len(path))
        )

    def looked_up(self, path: Path) -> dict[int, float]:
        """Probability of each token that was looked up behind a path."""
        after = {
            token: (length, self.is_longest((*path, token)))
            for token, length in self.lengths(path).items()
        }
        return {
            token: self.calibrator.probability(lookup_cell(*where), lookup_prior(*where))
            for token, where in after.items()
        }

    def with_heads(self, path: Path) -> dict[int, float]:
        """The same with what the heads draft at that depth."""
        probabilities, correct = self.looked_up(path), self.calibrator.probability
        if len(path) < len(IDS_KR):
            for token, raw in zip(IDS_KR[len(path)], PROBABILITIES_KR[len(path)], strict=True):
                own = correct(head_cell(len(path) + 1, raw), raw)
                if token in probabilities:
                    both = 1.0 - (1.0 - own) * (1.0 - probabilities[token])
                    own = min(0.99, correct(both_cell(both), both))
                if token != -1:
                    probabilities[token] = own
        return probabilities

    def go_on(self, path: Path, value: float) -> None:
        if len(path) == self.max_depth:
            return
        probabilities = self.with_heads(path)
        total = max(1.0, sum(probabilities.values()))
        for token, probability in probabilities.items():
            self.values[(*path, token)] = value * probability / total
            self.go_on((*path, token), self.values[(*path, token)])


@pytest.mark.parametrize("seed", range(25))
def test_holds_the_most_valuable_of_all_paths(seed: int) -> None:
    rng = Random(seed)
    lengths = sorted((rng.randint(1, 9) for _ in range(rng.randint(0, 3))), reverse=True)
    matches = [
        Match(length, tuple(rng.choices((5, 6, 8, 9), k=rng.randint(0, 4)))) for length in lengths
    ]
    calibrator = Calibrator([rng.uniform(0.3, 1.2) for _ in range(NUM_CELLS)])
    expected = SlowPaths(matches, calibrator, max_depth=5).values
    ranked = sorted(expected.values(), reverse=True)
    for num_nodes in (1, 2, 5, 12):
        limits = TreeLimits(num_nodes, max_depth=5)
        found = values_by_path(merged(medusa(), matches, limits, calibrator))
        assert list(found.values()) == pytest.approx(ranked[: num_nodes - 1])
        for path, value in found.items():
            assert value == pytest.approx(expected[path])


class TestHeadsAlone:
    def test_medusa_heads_look_at_the_depth_alone(self) -> None:
        values = values_by_path(merged(medusa()))
        assert values[5,] == pytest.approx(0.5)
        assert values[5, 8] == pytest.approx(0.3)
        assert values[6, 8] == pytest.approx(0.18)
        assert len(values) == 3 + 3 * 2, "padding is no candidate"

    def test_a_grown_tree_is_kept_as_it_is(self) -> None:
        values = values_by_path(merged(grown()))
        assert values == pytest.approx({(5,): 0.5, (5, 8): 0.45, (6,): 0.4})

    def test_a_request_whose_heads_fail_has_lower_values(self) -> None:
        failing = RequestCalibration()
        failing.learn([Outcome(merged(medusa()).estimates[0], is_accepted=False)] * 50)
        factor = failing.factor(DraftSource.HEADS)
        assert factor < 0.5
        assert values_by_path(merged(medusa(), calibration=failing))[5,] == pytest.approx(
            0.5 * factor
        )


class TestLookupAlone:
    def test_nodes_know_where_in_the_reference_they_stand(self) -> None:
        drafts = merged(matches=[Match(5, (4, 5)), Match(4, (4, 7), 30), Match(3, (4, 7, 8), 20)])
        places = dict(zip(drafts.token_ids[1:], drafts.estimates, strict=True))
        found = {token: estimate.reference_place for token, estimate in places.items()}
        assert found == {4: 30, 5: -1, 7: 31, 8: 22}

    def test_a_continuation_becomes_a_chain_that_grows_surer(self) -> None:
        drafts = merged(matches=[Match(3, (4, 5, 6))])
        assert {estimate.reference_place for estimate in drafts.estimates} == {-1}
        assert drafts.token_ids == (1, 4, 5, 6)
        assert drafts.tree.parents == (-1, 0, 1, 2)
        expected = [lookup_prior(length, True) for length in (3, 4, 5)]
        assert [estimate.probability for estimate in drafts.estimates] == pytest.approx(expected)

    def test_continuations_that_begin_alike_share_nodes(self) -> None:
        values = values_by_path(merged(matches=[Match(5, (4, 5)), Match(2, (4, 7))]))
        assert set(values) == {(4,), (4, 5), (4, 7)}

    def test_nothing_found_is_plain_decoding(self) -> None:
        drafts = merged()
        assert drafts.tree == DraftTree.root_only()
        assert drafts.token_ids == (1,)


class TestBoth:
    def test_a_token_that_both_draft_is_surer_than_by_either(self) -> None:
        drafts = merged(medusa(), [Match(4, (5,))])
        (estimate,) = (e for e in drafts.estimates if source_of(e.cell) is DraftSource.BOTH)
        assert estimate.raw == pytest.approx(1 - (1 - 0.5) * (1 - lookup_prior(4, True)))

    def test_medusa_heads_go_on_behind_a_looked_up_token(self) -> None:
        values = values_by_path(merged(medusa(), [Match(9, (4,))]))
        assert (4, 8) in values

    def test_a_grown_tree_knows_nothing_behind_a_token_that_it_lacks(self) -> None:
        values = values_by_path(merged(grown(), [Match(9, (4, 2))]))
        assert (4, 2) in values
        assert (4, 8) not in values

    def test_siblings_are_never_likelier_than_one_token_can_be(self) -> None:
        sure = Calibrator([3.0] * NUM_CELLS)
        drafts = merged(medusa(), [Match(9, (4,)), Match(8, (3,))], calibrator=sure)
        siblings = [
            estimate.probability
            for node, estimate in enumerate(drafts.estimates, start=1)
            if drafts.tree.parents[node] == 0
        ]
        assert sum(siblings) == pytest.approx(1.0)


class TestLimits:
    @pytest.mark.parametrize("num_nodes", [1, 2, 5, 8])
    def test_smaller_trees_are_beginnings_of_larger_ones(self, num_nodes: int) -> None:
        matches = [Match(3, (5, 4, 6))]
        whole = merged(medusa(), matches)
        part = merged(medusa(), matches, TreeLimits(num_nodes, 8))
        assert part == whole.limited(num_nodes, 8)

    def test_values_never_rise(self) -> None:
        values = [e.value for e in merged(medusa(), [Match(8, (5, 4, 6))]).estimates]
        assert all(a >= b for a, b in pairwise(values))

    def test_depth_is_limited(self) -> None:
        drafts = merged(medusa(), [Match(8, (5, 4, 6))], TreeLimits(64, max_depth=1))
        assert drafts.tree.max_depth == 1
        assert merged(medusa(), limits=TreeLimits(64, max_depth=0)).token_ids == (1,)

    def test_worthless_nodes_are_left_out(self) -> None:
        values = values_by_path(merged(medusa(), limits=TreeLimits(64, 8, min_value=0.25)))
        assert set(values) == {(5,), (5, 8), (6,)}
