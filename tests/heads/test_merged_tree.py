"""Trees from heads and lookup together, against an enumeration of all paths."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from heads.calibration import (
    AGREED,
    MAX_DEPTH,
    NUM_BINS,
    Calibrator,
    DraftOutcome,
    RequestCalibration,
    head_cell,
    probability_bin,
)
from heads.candidates import DraftTokens
from heads.lookup import (
    MAX_MATCH,
    LookupProposal,
    Match,
    lookup_cell,
    lookup_prior,
)
from heads.merged_tree import TreeLimits, merge_proposals
from heads.proposals import GrownProposal, MedusaProposal, Proposal
from heads.tree import DraftTree

Path = tuple[int, ...]
IDS_KR = [[5, 6, 7], [8, 5, -1]]
PROBABILITIES_KR = [[0.5, 0.3, 0.1], [0.6, 0.2, 0.0]]
WIDE = TreeLimits(num_nodes=64, max_depth=8)


def medusa(ids_KR: Sequence[Sequence[int]] = IDS_KR) -> MedusaProposal:
    return MedusaProposal(ids_KR, PROBABILITIES_KR)


def random_ratios(rng: Random) -> dict[str, dict[int, float]]:
    cells = {"medusa": MAX_DEPTH * NUM_BINS, "lookup": 2 * MAX_MATCH, AGREED: NUM_BINS}
    return {
        source: {cell: rng.uniform(0.3, 1.2) for cell in range(number)}
        for source, number in cells.items()
    }


def grown() -> GrownProposal:
    """Below the root 5 (0.5) and 6 (0.4), below 5 comes 8 (0.9)."""
    drafts = DraftTokens(DraftTree((-1, 0, 1, 0), (-1, 0, 0, 1)), (1, 5, 8, 6))
    return GrownProposal(drafts, (0.5, 0.9, 0.4))


def merged(
    proposal: Proposal | None = None,
    matches: Sequence[Match] = (),
    limits: TreeLimits = WIDE,
    calibrator: Calibrator | None = None,
    calibration: RequestCalibration | None = None,
) -> DraftTokens:
    copied = LookupProposal(matches) if matches else None
    proposals = [one for one in (proposal, copied) if one is not None]
    return merge_proposals(
        1, proposals, calibrator or Calibrator(), calibration or RequestCalibration(), limits
    )


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
            token: self.calibrator.probability("lookup", lookup_cell(*where), lookup_prior(*where))
            for token, where in after.items()
        }

    def with_heads(self, path: Path) -> dict[int, float]:
        """The same with what the heads draft at that depth."""
        probabilities, correct = self.looked_up(path), self.calibrator.probability
        if len(path) < len(IDS_KR):
            for token, raw in zip(IDS_KR[len(path)], PROBABILITIES_KR[len(path)], strict=True):
                own = correct("medusa", head_cell(len(path) + 1, raw), raw)
                if token in probabilities:
                    both = 1.0 - (1.0 - own) * (1.0 - probabilities[token])
                    own = min(0.99, correct(AGREED, probability_bin(both), both))
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
    calibrator = Calibrator(random_ratios(rng))
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
        failing.learn([DraftOutcome(merged(medusa()).estimates[0], is_accepted=False)] * 50)
        factor = failing.factor("medusa")
        assert factor < 0.5
        assert values_by_path(merged(medusa(), calibration=failing))[5,] == pytest.approx(
            0.5 * factor
        )


class TestLookupAlone:
    def test_nodes_know_where_in_the_prediction_they_stand(self) -> None:
        drafts = merged(matches=[Match(5, (4, 5)), Match(4, (4, 7), 30), Match(3, (4, 7, 8), 20)])
        places = dict(zip(drafts.token_ids[1:], drafts.estimates, strict=True))
        found = {token: estimate.prediction_place for token, estimate in places.items()}
        assert found == {4: 30, 5: -1, 7: 31, 8: 22}

    def test_a_continuation_becomes_a_chain_that_grows_surer(self) -> None:
        drafts = merged(matches=[Match(3, (4, 5, 6))])
        assert {estimate.prediction_place for estimate in drafts.estimates} == {-1}
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
        (estimate,) = (e for e in drafts.estimates if e.source == AGREED)
        assert estimate.raw == pytest.approx(1 - (1 - 0.5) * (1 - lookup_prior(4, True)))

    def test_medusa_heads_go_on_behind_a_looked_up_token(self) -> None:
        values = values_by_path(merged(medusa(), [Match(9, (4,))]))
        assert (4, 8) in values

    def test_a_grown_tree_knows_nothing_behind_a_token_that_it_lacks(self) -> None:
        values = values_by_path(merged(grown(), [Match(9, (4, 2))]))
        assert (4, 2) in values
        assert (4, 8) not in values

    def test_siblings_are_never_likelier_than_one_token_can_be(self) -> None:
        sure = Calibrator({"medusa": dict.fromkeys(range(99), 3.0), "lookup": {17: 3.0, 15: 3.0}})
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

    def test_a_forbidden_draft_and_all_behind_it_stay_out(self) -> None:
        asked: list[tuple[Path, int]] = []

        def allows(path: Sequence[int], token_id: int) -> bool:
            asked.append((tuple(path), token_id))
            return (tuple(path), token_id) not in (((), 5), ((6,), 8))

        values = values_by_path(merged(medusa(), limits=TreeLimits(64, 8, allows=allows)))
        assert set(values) == {(6,), (7,), (6, 5), (7, 8), (7, 5)}
        assert ((6,), 8) in asked


class TestThreeSources:
    def test_a_token_that_all_say_is_surer_than_by_any_two(self) -> None:
        copied, other = (
            LookupProposal([Match(4, (5,))]),
            GrownProposal(DraftTokens(DraftTree((-1, 0), (-1, 0)), (1, 5)), (0.5,)),
        )

        def raw(*proposals: Proposal) -> float:
            drafts = merge_proposals(
                1, proposals, Calibrator(), RequestCalibration(), TreeLimits(2, 1)
            )
            return drafts.estimates[0].raw

        prior = lookup_prior(4, True)
        assert raw(medusa(), copied) == pytest.approx(1 - 0.5 * (1 - prior))
        assert raw(medusa(), other, copied) == pytest.approx(1 - 0.5 * 0.5 * (1 - prior))

    def test_each_source_goes_on_where_it_stands(self) -> None:
        copied = LookupProposal([Match(9, (4, 2))])
        drafts = merge_proposals(
            1, (medusa(), grown(), copied), Calibrator(), RequestCalibration(), WIDE
        )
        values = values_by_path(drafts)
        assert {(4, 2), (4, 8), (5, 8), (6, 8)} <= set(values)
        sources = {
            path: estimate.source for path, estimate in zip(values, drafts.estimates, strict=True)
        }
        assert sources[5, 8] == AGREED
        assert sources[6, 8] == "medusa"
        assert sources[4, 2] == "lookup"
