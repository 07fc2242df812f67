from dataclasses import replace
from random import Random

import pytest
import torch

from heads.calibration import probability_bin
from heads.tree import DraftTree
from heads.tree_search import AcceptanceProfile, best_tree, expected_tokens_per_step
from tests.support.trees import chain, rank_paths, tree_of_paths
from training.errors import DataError
from training.measure.evaluate import (
    PROFILE_TREE_SIZE,
    TREE_SIZES,
    Walk,
    evaluate,
    measure_calibration,
    measure_profile,
    walk,
)
from training.measure.ranking import UNRANKED, RankedAnswer

K, R = 3, 4


def random_answers(num_answers: int, seed: int = 0, max_tokens: int = 40) -> list[RankedAnswer]:
    """Answers whose ranks fall off quickly, as those of real heads do."""
    rng = Random(seed)
    population, shares = [*range(R), UNRANKED], [8, 4, 2, 1, 6]
    answers = []
    for index in range(num_answers):
        num_tokens = rng.randint(0, max_tokens)
        ranks = [rng.choices(population, shares, k=K) for _ in range(max(0, num_tokens - 1))]
        for k in range(K):
            for row in ranks[len(ranks) - k :]:
                row[k] = UNRANKED
        answers.append(RankedAnswer("even" if index % 2 == 0 else "odd", ranks, num_tokens))
    return answers


def decode_slowly(answer: RankedAnswer, tree: DraftTree) -> list[int]:
    """Tokens that each step emits: try every path of the tree, longest first."""
    paths = sorted(rank_paths(tree), key=len, reverse=True)
    emitted, position = [], 0
    while position < answer.num_tokens - 1:
        ranks = tuple(answer.ranks[position])
        longest = next(path for path in paths if ranks[: len(path)] == path)
        step = min(len(longest) + 1, answer.num_tokens - 1 - position)
        emitted.append(step)
        position += len(longest) + 1
    return emitted


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 12])
def test_a_walk_emits_what_decoding_with_the_tree_would(num_nodes: int) -> None:
    rates = AcceptanceProfile(((0.5, 0.3, 0.2, 0.1),) * K)
    tree = best_tree(rates, num_nodes)
    answers = random_answers(60)
    expected = [step for answer in answers for step in decode_slowly(answer, tree)]
    assert walk(answers, tree) == Walk(len(expected), sum(expected))


def test_plain_decoding_emits_one_token_a_step() -> None:
    assert walk(random_answers(20), DraftTree.root_only()).mean_acceptance_length == 1.0


def test_a_walk_without_steps_has_no_mean() -> None:
    assert walk([RankedAnswer("x", [], 1)], DraftTree.root_only()) == Walk(0, 0)
    assert Walk(0, 0).mean_acceptance_length == 0.0


def test_a_rank_that_no_node_has_is_not_accepted() -> None:
    answer = RankedAnswer("x", [[0, 1, 0], [3, 0, 0], [UNRANKED, 0, 0]], 4)
    tree = tree_of_paths([(0,), (1,), (0, 1)])
    assert walk([answer], tree) == Walk(1, 3)
    assert walk([answer], tree_of_paths([(0,), (1,)])) == Walk(2, 3)


def test_the_profile_of_independent_ranks_is_their_distribution() -> None:
    # 20,000 positions a depth and more: the standard error of a rate is below 0.004, so that the
    # bound of 0.02 is missed by chance less than once in a million runs.
    profile = measure_profile(random_answers(1500, max_tokens=80), R, 8)
    first = [8 / 21, 4 / 21, 2 / 21, 1 / 21]
    for rates_R in profile.accept_rates_KR[:1]:
        assert list(rates_R) == pytest.approx(first, abs=0.02)
    for rates_R in profile.accept_rates_KR[1:]:
        assert list(rates_R) == pytest.approx(first, abs=0.04)


def test_rates_are_conditional_on_an_accepted_parent() -> None:
    # The second head is right exactly when the first one is.
    ranks = [[0, 0] if i % 4 else [UNRANKED, UNRANKED] for i in range(400)]
    profile = measure_profile([RankedAnswer("x", ranks, 401)], 2, 3)
    assert profile.accept_rates_KR[1][0] == 1.0


def test_the_profile_foretells_the_walk() -> None:
    # Long answers, because the last step of each may emit less than it could.
    answers = random_answers(60, max_tokens=800)
    profile = measure_profile(answers, R, 12)
    tree = best_tree(profile, 12)
    expected = expected_tokens_per_step(profile, tree)
    assert expected == pytest.approx(walk(answers, tree).mean_acceptance_length, rel=0.03)


def with_confidences(answer: RankedAnswer, confidences_R: list[float]) -> RankedAnswer:
    row_KR = [confidences_R] * len(answer.ranks[0])
    return replace(answer, confidences_NKR=torch.tensor([row_KR] * len(answer.ranks)))


def test_the_calibration_is_hits_over_what_the_heads_expect() -> None:
    # Rank 0 claims 0.85 and is right every other time, rank 1 claims 0.05 and always is otherwise.
    ranks = [[index % 2] for index in range(4000)]
    answer = with_confidences(RankedAnswer("x", ranks, 4001), [0.85, 0.05])
    [ratios] = measure_calibration([answer], DraftTree.root_only())
    assert ratios[probability_bin(0.85)] == pytest.approx(0.5 / 0.85, rel=0.01)
    assert ratios[probability_bin(0.05)] == pytest.approx(0.5 / 0.05, rel=0.1)
    assert ratios[probability_bin(0.5)] == 1.0, "nothing was seen of it"


def test_candidates_below_a_rejected_parent_do_not_count() -> None:
    # The second head is right exactly when the first one is; steps begin at every position.
    ranks = [[0, 0] if i % 3 == 0 else [UNRANKED, UNRANKED] for i in range(6000)]
    answer = with_confidences(RankedAnswer("x", ranks, 6001), [0.5])
    first, second = measure_calibration([answer], chain(2))
    assert first[probability_bin(0.5)] == pytest.approx(2.0, rel=0.02), (
        "after a whole step comes a hit"
    )
    assert second[probability_bin(0.5)] == pytest.approx(2.0, rel=0.02)


def test_an_evaluation_with_confidences_calibrates() -> None:
    answers = [with_confidences(a, [0.4, 0.2, 0.1, 0.05]) for a in random_answers(100) if a.ranks]
    profile = evaluate(answers, R).profile
    assert len(profile.calibration_KC) == K
    assert evaluate(random_answers(100), R).profile.calibration_KC == ()


def test_answers_without_a_token_to_draft_are_an_error() -> None:
    with pytest.raises(DataError, match="no token to draft"):
        measure_profile([RankedAnswer("x", [], 1)], R, 4)


def test_an_evaluation_has_all_sizes_and_categories() -> None:
    answers = random_answers(100)
    result = evaluate(answers, R)
    assert [tree.num_nodes for tree in result.trees] == list(TREE_SIZES)
    lengths = [tree.mean_acceptance_length for tree in result.trees]
    assert lengths[0] == 1.0
    assert lengths == sorted(lengths)
    assert set(result.by_category) == {"even", "odd"}
    low, high = sorted(result.by_category.values())
    assert low <= lengths[TREE_SIZES.index(PROFILE_TREE_SIZE)] <= high
    assert result.tree.num_nodes <= PROFILE_TREE_SIZE
    assert result.num_answers == 100
    assert result.num_answer_tokens == sum(answer.num_tokens for answer in answers)
