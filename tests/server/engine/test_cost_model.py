"""The step cost: interpolation, the choice of the tree size, and the measurement's protocol."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.cost_model import STEP_SIZES, CostModel, measure

# Two tokens cost what one costs, then every further token has its price: a memory-bound CPU.
COSTS = CostModel((1, 2, 4, 8), (10.0, 10.0, 14.0, 22.0), draft_s=1.0)


def best_slowly(costs: CostModel, node_values: list[float], num_sequences: int) -> float:
    """The most tokens per second that any size reaches."""
    speeds = [1.0 / costs.seconds(num_sequences)]
    for num_nodes in range(2, len(node_values) + 1):
        step_s = costs.seconds(num_nodes * num_sequences) + costs.draft_s
        speeds.append(sum(node_values[:num_nodes]) / step_s)
    return max(speeds)


class TestSeconds:
    @pytest.mark.parametrize(("num_tokens", "step_s"), [(1, 10.0), (2, 10.0), (4, 14.0), (8, 22.0)])
    def test_measured_sizes_are_returned_as_measured(self, num_tokens: int, step_s: float) -> None:
        assert COSTS.seconds(num_tokens) == step_s

    def test_sizes_in_between_are_interpolated(self) -> None:
        assert COSTS.seconds(3) == 12.0
        assert COSTS.seconds(6) == 18.0

    def test_larger_sizes_grow_with_the_last_slope(self) -> None:
        assert COSTS.seconds(12) == 30.0

    @given(a=st.integers(1, 200), b=st.integers(1, 200))
    def test_more_tokens_never_cost_less(self, a: int, b: int) -> None:
        assert COSTS.seconds(min(a, b)) <= COSTS.seconds(max(a, b))


class TestBestNumNodes:
    def test_hopeless_drafts_are_not_worth_the_heads(self) -> None:
        assert COSTS.best_num_nodes([1.0, 0.05, 0.04], 1) == 1

    def test_a_free_second_token_is_taken_when_it_pays_for_the_heads(self) -> None:
        assert COSTS.best_num_nodes([1.0, 0.3, 0.01, 0.01], 1) == 2

    def test_sure_drafts_make_the_largest_tree(self) -> None:
        assert COSTS.best_num_nodes([1.0] * 8, 1) == 8

    def test_load_shrinks_the_tree_to_the_root(self) -> None:
        values = [1.0, 0.4, 0.2, 0.1]
        sizes = [COSTS.best_num_nodes(values, num_sequences) for num_sequences in (1, 2, 4, 32)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 1
        assert sizes[-1] == 1

    @given(
        values=st.lists(st.floats(0.0, 1.0), max_size=12),
        num_sequences=st.integers(1, 16),
        draft_s=st.floats(0.0, 20.0),
    )
    def test_no_other_size_makes_more_tokens_per_second(
        self, values: list[float], num_sequences: int, draft_s: float
    ) -> None:
        node_values = [1.0, *sorted(values, reverse=True)]
        costs = CostModel(COSTS.num_tokens, COSTS.step_s, draft_s)
        size = costs.best_num_nodes(node_values, num_sequences)
        step_s = costs.seconds(size * num_sequences) + (draft_s if size > 1 else 0.0)
        reached = sum(node_values[:size]) / step_s
        assert reached == pytest.approx(best_slowly(costs, node_values, num_sequences))


class TestMeasure:
    def test_times_every_size_up_to_the_limit_several_times(self) -> None:
        asked: list[int] = []
        drafts: list[int] = []
        costs = measure(asked.append, lambda: drafts.append(1), max_tokens=24)
        assert costs.num_tokens == tuple(size for size in STEP_SIZES if size <= 24)
        assert all(asked.count(size) >= 3 for size in costs.num_tokens)
        assert max(asked) == 24
        assert len(drafts) >= 3

    def test_seconds_never_fall_with_the_size(self) -> None:
        costs = measure(lambda size: sum(range((200 - size) * 500)), None, max_tokens=128)
        assert list(costs.step_s) == sorted(costs.step_s)
        assert costs.draft_s == 0.0

    def test_a_single_size_still_gives_a_slope(self) -> None:
        asked: list[int] = []
        costs = measure(asked.append, None, max_tokens=1)
        assert set(asked) == {1}, "a cache of one slot has no room for more"
        assert costs.seconds(2) == 2 * costs.seconds(1)
        assert costs.best_num_nodes([1.0, 0.9], 1) == 1
