"""The keyed uniform numbers: range, determinism, and that nothing about the key shows in them.

The statistical tests use fixed keys, so they either always pass or always fail. Each threshold
would be crossed by truly random numbers once in a million runs.
"""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.sampling.uniform import uniform

FALSE_ALARM = 1e-6
SEEDS = st.integers(-(2**63), 2**64 - 1)
POSITIONS = st.integers(0, 2**31)
PINNED = [0.6524484863740322, 0.36818951565166946, 0.7012121095215252, 0.7238582745899125]


class TestContract:
    @given(seed=SEEDS, position=POSITIONS)
    def test_numbers_lie_in_the_half_open_unit_interval(self, seed: int, position: int) -> None:
        assert 0.0 <= uniform(seed, position) < 1.0

    @given(seed=SEEDS, position=POSITIONS)
    def test_the_same_key_gives_the_same_number(self, seed: int, position: int) -> None:
        assert uniform(seed, position) == uniform(seed, position)

    def test_the_numbers_never_change_between_releases(self) -> None:
        # A seed that a client noted down must give the same text next year.
        assert [uniform(0, 0), uniform(1, 0), uniform(0, 1), uniform(-1, 7)] == PINNED

    def test_only_the_lowest_64_bits_of_a_seed_count(self) -> None:
        assert uniform(-1, 3) == uniform(2**64 - 1, 3)

    def test_seed_and_position_are_not_interchangeable(self) -> None:
        assert all(uniform(a, b) != uniform(b, a) for a in range(50) for b in range(a))

    def test_a_seed_that_equals_the_position_is_no_special_case(self) -> None:
        assert len({uniform(key, key) for key in range(100)}) == 100


class TestDistribution:
    def test_positions_of_one_seed_are_uniform(self) -> None:
        bins = Counter(int(uniform(42, position) * 100) for position in range(100_000))
        assert chisquare([bins[i] for i in range(100)]).pvalue > FALSE_ALARM

    def test_small_seeds_at_one_position_are_uniform(self) -> None:
        bins = Counter(int(uniform(seed, 17) * 100) for seed in range(100_000))
        assert chisquare([bins[i] for i in range(100)]).pvalue > FALSE_ALARM

    def test_neighbouring_positions_are_independent(self) -> None:
        pairs = Counter(
            (int(uniform(7, position) * 16), int(uniform(7, position + 1) * 16))
            for position in range(60_000)
        )
        observed = [pairs[i, j] for i in range(16) for j in range(16)]
        assert chisquare(observed).pvalue > FALSE_ALARM

    def test_neighbouring_seeds_are_independent(self) -> None:
        pairs = Counter(
            (int(uniform(seed, 5) * 16), int(uniform(seed + 1, 5) * 16)) for seed in range(60_000)
        )
        observed = [pairs[i, j] for i in range(16) for j in range(16)]
        assert chisquare(observed).pvalue > FALSE_ALARM

    def test_the_lowest_bits_vary_too(self) -> None:
        bins = Counter(int(uniform(3, position) * 2**53) % 64 for position in range(64_000))
        assert chisquare([bins[i] for i in range(64)]).pvalue > FALSE_ALARM
