import json
from dataclasses import replace
from itertools import combinations
from math import inf, nan, prod
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.calibration import NUM_BINS
from heads.tree import DraftTree
from heads.tree_search import AcceptanceProfile, best_tree, expected_tokens_per_step, node_values
from tests.heads.trees import random_tree
from tests.support.trees import chain, rank_paths, tree_of_paths

PROFILE = AcceptanceProfile(((0.5, 0.2, 0.1), (0.4, 0.1), (0.3,)))


def random_profile(rng: Random, num_heads: int, num_ranks: int) -> AcceptanceProfile:
    """Rates in no particular order, as a measurement may bring them."""
    rates = [[rng.uniform(0.01, 1.0) for _ in range(num_ranks)] for _ in range(num_heads)]
    return AcceptanceProfile(tuple(map(tuple, rates)))


def value_slowly(profile: AcceptanceProfile, path: tuple[int, ...]) -> float:
    return prod(profile.accept_rates_KR[depth][rank] for depth, rank in enumerate(path))


def best_value_slowly(profile: AcceptanceProfile, num_nodes: int) -> float:
    """Try every set of paths that holds the parents of its members."""
    paths: list[tuple[int, ...]] = [()]
    for rates_R in profile.accept_rates_KR:
        parents = [path for path in paths if len(path) == max(map(len, paths))]
        paths += [(*path, rank) for path in parents for rank in range(len(rates_R))]
    return max(
        1.0 + sum(value_slowly(profile, path) for path in chosen)
        for chosen in combinations(paths[1:], num_nodes - 1)
        if all(path[:-1] in {(), *chosen} for path in chosen)
    )


class TestProfile:
    def test_it_survives_json(self) -> None:
        for profile in (PROFILE, replace(PROFILE, calibration_KC=((0.5,) * NUM_BINS,) * 3)):
            data = json.loads(json.dumps(profile.to_json()))
            assert AcceptanceProfile.from_json(data) == profile

    @pytest.mark.parametrize(
        ("ratios", "says"),
        [
            ((1.0,), "1 ratios at depth 1; give"),
            ((1.0,) * (NUM_BINS - 1) + (0.0,), "is 0.0; give more than 0"),
            ((1.0,) * (NUM_BINS - 1) + (nan,), "is nan"),
            ((1.0,) * (NUM_BINS - 1) + (inf,), "is inf"),
        ],
    )
    def test_a_calibration_is_positive_and_whole(
        self, ratios: tuple[float, ...], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            replace(PROFILE, calibration_KC=(ratios,))

    def test_its_depth_is_its_number_of_heads(self) -> None:
        assert PROFILE.max_depth == 3

    @pytest.mark.parametrize("rate", [-0.1, 1.1, nan])
    def test_a_rate_that_is_no_probability_is_refused(self, rate: float) -> None:
        with pytest.raises(ValueError, match=f"a rate at depth 2 is {rate}; give 0 to 1"):
            AcceptanceProfile(((0.5,), (rate,)))

    @pytest.mark.parametrize("rates", [(), ((),), ((0.5,), ())])
    def test_every_head_has_a_rate(self, rates: tuple[tuple[float, ...], ...]) -> None:
        with pytest.raises(ValueError, match="at least one rate per head"):
            AcceptanceProfile(rates)

    @pytest.mark.parametrize("data", [{}, {"accept_rates": [[0.5]], "bins": 3}])
    def test_missing_and_unknown_keys_are_refused(self, data: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="give accept_rates, and calibration if known"):
            AcceptanceProfile.from_json(data)

    def test_a_malformed_calibration_is_refused(self) -> None:
        data = {"accept_rates": [[0.5]], "calibration": [["much"]]}
        with pytest.raises(ValueError, match=r"calibration is .* lists of numbers"):
            AcceptanceProfile.from_json(data)

    @pytest.mark.parametrize("rates", [0.5, [0.5], [["much"]], [[None]]])
    def test_malformed_rates_are_refused(self, rates: object) -> None:
        with pytest.raises(ValueError, match="give a list of lists of numbers"):
            AcceptanceProfile.from_json({"accept_rates": rates})


class TestBestTree:
    def test_the_most_valuable_nodes_come_first(self) -> None:
        # Values: (0,) 0.5, then 0.2 for both (1,) and (0, 0), 0.1 for (2,), 0.08 for (1, 0).
        tree = best_tree(PROFILE, 6)
        assert rank_paths(tree) == ((), (0,), (1,), (0, 0), (2,), (1, 0))

    @settings(max_examples=40)
    @given(
        st.randoms(use_true_random=False),
        st.sampled_from([(1, 4), (2, 2), (2, 3), (3, 2)]),
        st.integers(1, 5),
    )
    def test_no_other_tree_of_that_size_is_worth_more(
        self, rng: Random, shape: tuple[int, int], num_nodes: int
    ) -> None:
        profile = random_profile(rng, *shape)
        best = expected_tokens_per_step(profile, best_tree(profile, num_nodes))
        assert best == pytest.approx(best_value_slowly(profile, num_nodes))

    @given(st.randoms(use_true_random=False), st.integers(1, 30))
    def test_a_prefix_is_the_best_tree_of_its_size(self, rng: Random, num_nodes: int) -> None:
        profile = random_profile(rng, 4, 4)
        assert best_tree(profile, 30).prefix(num_nodes) == best_tree(profile, num_nodes)

    @given(st.randoms(use_true_random=False))
    def test_values_fall_in_the_order_of_the_nodes(self, rng: Random) -> None:
        profile = random_profile(rng, 4, 4)
        values = node_values(profile, best_tree(profile, 40))
        assert list(values) == sorted(values, reverse=True)

    def test_one_node_is_plain_decoding(self) -> None:
        assert best_tree(PROFILE, 1) == DraftTree.root_only()

    def test_candidates_that_are_never_accepted_are_left_out(self) -> None:
        profile = AcceptanceProfile(((0.5, 0.0), (0.0, 0.25)))
        assert rank_paths(best_tree(profile, 99)) == ((), (0,), (0, 1))

    def test_a_profile_without_hope_gives_the_root(self) -> None:
        assert best_tree(AcceptanceProfile(((0.0, 0.0),)), 8) == DraftTree.root_only()

    def test_it_never_has_more_nodes_than_there_are_candidates(self) -> None:
        # 3 at depth 1, 2 below each, 1 below each of these.
        assert best_tree(PROFILE, 1000).num_nodes == 1 + 3 + 6 + 6

    @pytest.mark.parametrize("num_nodes", [0, -3])
    def test_a_tree_has_a_root(self, num_nodes: int) -> None:
        with pytest.raises(ValueError, match=f"num_nodes is {num_nodes}; give at least 1"):
            best_tree(PROFILE, num_nodes)


class TestNodeValues:
    def test_a_node_is_worth_the_product_along_its_path(self) -> None:
        tree = tree_of_paths([(0,), (2,), (0, 1), (0, 1, 0)])
        assert node_values(PROFILE, tree) == pytest.approx((1.0, 0.5, 0.1, 0.05, 0.015))

    @given(st.randoms(use_true_random=False), st.integers(1, 12))
    def test_any_tree_is_valued_by_its_paths(self, rng: Random, num_nodes: int) -> None:
        profile = random_profile(rng, num_heads=12, num_ranks=2)
        tree = random_tree(rng, num_nodes, num_ranks=2)
        slowly = [value_slowly(profile, path) for path in rank_paths(tree)]
        assert node_values(profile, tree) == pytest.approx(slowly)
        assert expected_tokens_per_step(profile, tree) == pytest.approx(sum(slowly))

    def test_plain_decoding_emits_one_token_per_step(self) -> None:
        assert expected_tokens_per_step(PROFILE, DraftTree.root_only()) == 1.0

    def test_perfect_heads_emit_one_token_more_than_they_draft(self) -> None:
        profile = AcceptanceProfile(((1.0,),) * 5)
        assert expected_tokens_per_step(profile, chain(5)) == 6.0

    @pytest.mark.parametrize("paths", [[(3,)], [(0,), (0, 2)], [(0,), (0, 0), (0, 0, 0)]])
    def test_a_tree_outside_the_profile_is_refused(self, paths: list[tuple[int, ...]]) -> None:
        profile = AcceptanceProfile(PROFILE.accept_rates_KR[:2])
        with pytest.raises(ValueError, match="outside the acceptance profile"):
            node_values(profile, tree_of_paths(paths))

    def test_simulated_acceptance_agrees_with_the_expectation(self) -> None:
        # 4,000 steps of at most 4 tokens: six standard deviations are below 0.14.
        rng = Random(0)
        tree = best_tree(PROFILE, 8)
        emitted = sum(simulated_step(rng, PROFILE, tree) for _ in range(4000))
        assert emitted / 4000 == pytest.approx(expected_tokens_per_step(PROFILE, tree), abs=0.14)


def simulated_step(rng: Random, profile: AcceptanceProfile, tree: DraftTree) -> int:
    """Tokens of a step whose target token has rank r with the profile's rate."""
    paths = set(rank_paths(tree))
    path: tuple[int, ...] = ()
    while len(path) < profile.max_depth:
        rates_R = profile.accept_rates_KR[len(path)]
        ranks = [*range(len(rates_R)), -1]
        rank = rng.choices(ranks, [*rates_R, 1.0 - sum(rates_R)])[0]
        if (*path, rank) not in paths:
            break
        path = (*path, rank)
    return len(path) + 1
