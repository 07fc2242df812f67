import pytest

from server.api.generation import check_num_choices, choice_seed
from server.errors import InvalidRequestError


def test_without_a_seed_no_choice_has_one() -> None:
    assert [choice_seed(None, choice) for choice in range(3)] == [None] * 3


@pytest.mark.parametrize("seed", [0, 7, -(2**63), 2**63 - 1])
def test_choices_have_distinct_seeds_of_64_bits_and_the_first_has_the_requests(seed: int) -> None:
    seeds = [choice_seed(seed, choice) for choice in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(derived is not None and -(2**63) <= derived < 2**63 for derived in seeds)


def test_derived_seeds_stay_the_same_from_release_to_release() -> None:
    assert choice_seed(7, 1) == 2174948161648732372


def test_neighbouring_seeds_do_not_share_choices() -> None:
    seeds = {choice_seed(seed, choice) for seed in range(50) for choice in range(50)}
    assert len(seeds) == 2500


@pytest.mark.parametrize(("num_prompts", "n"), [(129, 1), (2, 65), (43, 3)])
def test_too_many_choices_are_refused_with_their_number(num_prompts: int, n: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"make {num_prompts * n} choices"):
        check_num_choices(num_prompts, n)


def test_as_many_choices_as_allowed_are_counted() -> None:
    assert check_num_choices(64, 2) == 128
