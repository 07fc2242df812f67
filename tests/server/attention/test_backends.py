"""Attention over the paged cache against a dense oracle: one query, one head, one softmax.

The oracle keeps every sequence's keys and values in plain per-position lists and never sees a
block table, so that a wrong slot, mask or head shows as a wrong number.

Shapes: T flat tokens, H attention heads, G key/value heads, C channels per head, S slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.attention.backend import AttentionBackend, AttentionBatch, AttentionSpan
from server.attention.sdpa import SDPABackend
from server.cpu.tree_attention import OwnAttention
from server.kv.kv_cache import KVCache, KVLayout
from tests.support.own_code import own_attention

BLOCK_SIZE = 4
HEAD_DIM = 24
SCALING = 0.37


class Tested:
    """Which backend the tests that run at present are about."""

    make: Callable[[KVCache], AttentionBackend] = SDPABackend


@pytest.fixture(scope="module", params=["sdpa", "own"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> None:
    if request.param == "sdpa":
        Tested.make = SDPABackend
    else:
        library = own_attention()
        Tested.make = lambda cache: OwnAttention(cache, library)


@dataclass(frozen=True)
class Case:
    """One sequence's share of a step, as plain as it gets.

    `parents` is None for a prompt chunk; otherwise node i lies below `parents[i]`.
    """

    context_len: int
    num_queries: int
    parents: tuple[int, ...] | None
    is_scattered: bool = False

    def depth(self, node: int) -> int:
        if self.parents is None:
            return node
        return 0 if node == 0 else 1 + self.depth(self.parents[node])

    def sees(self, node: int) -> list[int]:
        """Indices of this step's tokens that a query may see."""
        if self.parents is None:
            return list(range(node + 1))
        return [node] if node == 0 else [*self.sees(self.parents[node]), node]


def random_tree(rng: Random, num_nodes: int) -> tuple[int, ...]:
    return (-1, *(rng.randrange(node) for node in range(1, num_nodes)))


def block_tables(rng: Random, cases: list[Case]) -> list[list[int]]:
    """Neighbouring blocks or scattered ones, for all sequences; no block twice."""
    sizes = [-(-(case.context_len + case.num_queries) // BLOCK_SIZE) for case in cases]
    tables: list[list[int]] = []
    first = 0
    for case, size in zip(cases, sizes, strict=True):
        table = list(range(first, first + size + 1))
        if case.is_scattered:
            rng.shuffle(table)
        tables.append(table[: size + rng.randint(0, 1)])
        first += size + 1
    return tables


@dataclass
class Step:
    """A whole step: the cache before it, its batch, and its queries, keys and values."""

    cases: list[Case]
    backend: AttentionBackend
    cache: KVCache
    batch: AttentionBatch
    queries_HTC: Tensor
    keys_GTC: Tensor
    values_GTC: Tensor
    past: list[tuple[Tensor, Tensor]]

    def run(self, sliding_window: int | None, layer: int = 0) -> Tensor:
        metadata = self.backend.prepare(self.batch)
        return self.backend.forward(
            self.queries_HTC,
            self.keys_GTC,
            self.values_GTC,
            layer,
            SCALING,
            sliding_window,
            metadata,
        )


def build_step(cases: list[Case], seed: int, num_heads: int = 4, num_kv_heads: int = 2) -> Step:
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    tables = block_tables(rng, cases)
    num_blocks = max(max(table) for table in tables) + 2
    layout = KVLayout(2, num_kv_heads, HEAD_DIM, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    cache = KVCache(layout, num_blocks)
    every_slot = torch.arange(num_blocks * BLOCK_SIZE)
    for layer in range(2):
        noise = torch.randn(2, len(every_slot), num_kv_heads, HEAD_DIM, generator=generator)
        cache.write(layer, every_slot, noise[0] * 100, noise[1] * 100)
    spans: list[AttentionSpan] = []
    slots: list[int] = []
    past = []
    for case, table in zip(cases, tables, strict=True):
        slot_of = [b * BLOCK_SIZE + offset for b in table for offset in range(BLOCK_SIZE)]
        context = torch.tensor(slot_of[: case.context_len], dtype=torch.int64)
        old = torch.randn(2, case.context_len, num_kv_heads, HEAD_DIM, generator=generator)
        for layer in range(2):
            cache.write(layer, context, old[0], old[1])
        past.append((old[0], old[1]))
        nodes = range(case.num_queries)
        mask = torch.tensor([[column in case.sees(row) for column in nodes] for row in nodes])
        spans.append(
            AttentionSpan(
                start=len(slots),
                num_queries=case.num_queries,
                context_len=case.context_len,
                block_table=table,
                ancestor_mask_QS=None if case.parents is None else mask,
                depths_S=(
                    None
                    if case.parents is None
                    else torch.tensor([case.depth(node) for node in nodes])
                ),
            )
        )
        slots += slot_of[case.context_len : case.context_len + case.num_queries]
    total = len(slots)
    return Step(
        cases,
        Tested.make(cache),
        cache,
        AttentionBatch(tuple(spans), torch.tensor(slots)),
        torch.randn(num_heads, total, HEAD_DIM, generator=generator),
        torch.randn(num_kv_heads, total, HEAD_DIM, generator=generator),
        torch.randn(num_kv_heads, total, HEAD_DIM, generator=generator),
        past,
    )


def attend_slowly(step: Step, sliding_window: int | None) -> Tensor:
    """The definition: for each query the softmax over the set of keys that it may see."""
    num_heads, total, _ = step.queries_HTC.shape
    group = num_heads // step.keys_GTC.shape[0]
    output_THC = torch.zeros(total, num_heads, HEAD_DIM, dtype=torch.float64)
    for case, span, (past_keys, past_values) in zip(
        step.cases, step.batch.spans, step.past, strict=True
    ):
        for node in range(case.num_queries):
            position = case.context_len + case.depth(node)
            for head in range(num_heads):
                kv_head = head // group
                keys, values = [], []
                for slot in range(case.context_len):
                    if sliding_window is None or position - slot < sliding_window:
                        keys.append(past_keys[slot, kv_head])
                        values.append(past_values[slot, kv_head])
                for other in case.sees(node):
                    distance = case.depth(node) - case.depth(other)
                    if sliding_window is None or distance < sliding_window:
                        keys.append(step.keys_GTC[kv_head, span.start + other])
                        values.append(step.values_GTC[kv_head, span.start + other])
                query = step.queries_HTC[head, span.start + node].double()
                scores = torch.stack(keys).double() @ query * SCALING
                weights = scores.softmax(0)
                output_THC[span.start + node, head] = weights @ torch.stack(values).double()
    return output_THC.float()


def assert_same(step: Step, sliding_window: int | None) -> None:
    expected = attend_slowly(step, sliding_window)
    torch.testing.assert_close(step.run(sliding_window), expected, rtol=1e-4, atol=1e-5)


@st.composite
def random_cases(draw: st.DrawFn) -> list[Case]:
    rng = Random(draw(st.integers(0, 10**6)))
    cases = []
    for _ in range(draw(st.integers(1, 4))):
        context_len, num_queries = draw(st.integers(0, 14)), draw(st.integers(1, 9))
        is_tree = draw(st.booleans())
        parents = random_tree(rng, num_queries) if is_tree else None
        cases.append(Case(context_len, num_queries, parents, draw(st.booleans())))
    return cases


class TestAgainstTheOracle:
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(
        cases=random_cases(),
        seed=st.integers(0, 1000),
        sliding_window=st.none() | st.integers(1, 12),
        heads=st.sampled_from([(4, 2), (4, 4), (6, 2), (3, 1)]),
    )
    def test_any_mix_of_trees_and_chunks_is_attended_exactly(
        self,
        cases: list[Case],
        seed: int,
        sliding_window: int | None,
        heads: tuple[int, int],
    ) -> None:
        assert_same(build_step(cases, seed, *heads), sliding_window)

    def test_plain_decoding_sees_the_whole_context_and_itself(self) -> None:
        assert_same(build_step([Case(9, 1, None)], seed=1), None)

    def test_the_first_token_of_a_sequence_sees_only_itself(self) -> None:
        step = build_step([Case(0, 1, None)], seed=2)
        expected = step.values_GTC.repeat_interleave(2, dim=0).transpose(0, 1)
        torch.testing.assert_close(step.run(None), expected)

    def test_siblings_do_not_see_each_other(self) -> None:
        step = build_step([Case(5, 3, (-1, 0, 0))], seed=3)
        before = step.run(None)
        step.values_GTC[:, 1] += 100.0
        after = step.run(None)
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])

    def test_sequences_do_not_see_each_other(self) -> None:
        together = build_step([Case(5, 3, None), Case(7, 2, (-1, 0))], seed=4)
        before = together.run(None)
        together.values_GTC[:, :3] += 100.0
        assert torch.equal(before[3:], together.run(None)[3:])

    def test_a_window_counts_positions_not_tree_nodes(self) -> None:
        # Node 4 is at depth 1: its window of 3 covers itself, the root and one context slot.
        star = Case(6, 5, (-1, 0, 0, 0, 0))
        step = build_step([star], seed=5)
        assert_same(step, 3)
        weights_only = step.run(3)
        step.cache.values[0].zero_()
        assert not torch.equal(weights_only, step.run(3))

    def test_a_window_of_one_sees_only_the_token_itself(self) -> None:
        step = build_step([Case(6, 4, (-1, 0, 1, 1))], seed=6)
        expected = step.values_GTC.repeat_interleave(2, dim=0).transpose(0, 1)
        torch.testing.assert_close(step.run(1), expected)

    @pytest.mark.parametrize("is_tree", [False, True])
    @pytest.mark.parametrize("num_queries", [64, 65])
    def test_steps_of_many_queries(self, num_queries: int, is_tree: bool) -> None:
        parents = random_tree(Random(3), num_queries) if is_tree else None
        for window in (None, 5):
            assert_same(build_step([Case(6, num_queries, parents)], seed=14), window)

    @pytest.mark.parametrize("num_kv_heads", [2, 4])
    @pytest.mark.parametrize("is_scattered", [False, True])
    @pytest.mark.parametrize("window", [None, 5, 64, 65, 66])
    def test_a_whole_prompt_sees_what_comes_before(
        self, window: int | None, is_scattered: bool, num_kv_heads: int
    ) -> None:
        cases = [Case(0, 65, None, is_scattered)]
        assert_same(build_step(cases, seed=15, num_kv_heads=num_kv_heads), window)

    @pytest.mark.parametrize("window", [9, 10, 11])
    def test_decoding_at_the_edge_of_the_window(self, window: int) -> None:
        assert_same(build_step([Case(9, 1, None, is_scattered=True)], seed=7), window)


class TestContract:
    def test_the_output_is_contiguous_and_ordered_by_token(self) -> None:
        step = build_step([Case(3, 2, None), Case(0, 3, None)], seed=8, num_heads=6)
        output = step.run(None)
        assert output.shape == (5, 6, HEAD_DIM)
        assert output.is_contiguous()

    @pytest.mark.parametrize("num_kv_heads", [2, 4])
    @pytest.mark.parametrize("num_queries", [1, 2, 9, 65])
    def test_the_output_of_one_sequence_alone_is_contiguous_too(
        self, num_queries: int, num_kv_heads: int
    ) -> None:
        step = build_step([Case(3, num_queries, None)], seed=9, num_kv_heads=num_kv_heads)
        assert step.run(None).is_contiguous()

    def test_the_step_is_written_to_its_slots_of_its_layer_and_nowhere_else(self) -> None:
        step = build_step([Case(3, 2, None, is_scattered=True), Case(2, 3, (-1, 0, 0))], seed=9)
        expected = [[step.cache.keys[i].clone(), step.cache.values[i].clone()] for i in range(2)]
        expected[1][0][step.batch.slots_T] = step.keys_GTC.transpose(0, 1)
        expected[1][1][step.batch.slots_T] = step.values_GTC.transpose(0, 1)
        step.run(None, layer=1)
        for layer in range(2):
            assert torch.equal(step.cache.keys[layer], expected[layer][0])
            assert torch.equal(step.cache.values[layer], expected[layer][1])

    def test_prepare_does_not_touch_the_cache(self) -> None:
        step = build_step([Case(3, 2, None)], seed=10)
        before = step.cache.keys[0].clone()
        step.backend.prepare(step.batch)
        assert torch.equal(step.cache.keys[0], before)

    def test_layers_with_different_windows_share_one_metadata(self) -> None:
        step = build_step([Case(9, 4, (-1, 0, 0, 1))], seed=11)
        metadata = step.backend.prepare(step.batch)
        for window in (None, 4, None, 2, 4):
            output = step.backend.forward(
                step.queries_HTC, step.keys_GTC, step.values_GTC, 0, SCALING, window, metadata
            )
            expected = attend_slowly(step, window)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    def test_neighbouring_and_scattered_blocks_give_the_same(self) -> None:
        case = Case(10, 5, (-1, 0, 1, 0, 3))
        contiguous = build_step([case], seed=12)
        scattered = build_step([Case(10, 5, case.parents, is_scattered=True)], seed=12)
        tables = [step.batch.spans[0].block_table for step in (contiguous, scattered)]
        assert tables[0] == sorted(tables[0])
        assert tables[1] != sorted(tables[1])
        torch.testing.assert_close(contiguous.run(None), scattered.run(None))

    def test_blocks_that_fall_instead_of_rising_are_not_taken_for_neighbours(self) -> None:
        step = build_step([Case(10, 2, None)], seed=13)
        span = step.batch.spans[0]
        reversed_table = span.block_table[::-1]
        cache = step.cache
        for layer in range(2):
            for tensor in (cache.keys[layer], cache.values[layer]):
                blocks = tensor.view(-1, BLOCK_SIZE, *tensor.shape[1:])
                blocks[span.block_table] = blocks[reversed_table].clone()
        slot_of = [b * BLOCK_SIZE + offset for b in reversed_table for offset in range(BLOCK_SIZE)]
        moved = AttentionSpan(0, 2, 10, reversed_table, None, None)
        step.batch = AttentionBatch((moved,), torch.tensor(slot_of[10:12]))
        assert_same(step, None)


class TestSeveralPasses:
    """A tree whose nodes are computed level by level equals one that is computed at once."""

    @pytest.mark.parametrize("sliding_window", [None, 3])
    @pytest.mark.parametrize("seed", range(4))
    def test_later_levels_see_their_ancestors_of_earlier_passes(
        self, seed: int, sliding_window: int | None
    ) -> None:
        parents, levels = (-1, 0, 0, 1, 1, 2, 4), ((0, 1), (1, 3), (3, 6), (6, 7))
        case = Case(context_len=6, num_queries=7, parents=parents)
        whole = build_step([case], seed)
        expected = whole.run(sliding_window, layer=1)
        again = build_step([case], seed)
        (span,) = again.batch.spans
        assert span.ancestor_mask_QS is not None
        assert span.depths_S is not None
        for first, end in levels:
            part = AttentionSpan(
                0,
                end - first,
                span.context_len,
                span.block_table,
                span.ancestor_mask_QS[first:end, :end],
                span.depths_S[:end],
            )
            batch = AttentionBatch((part,), again.batch.slots_T[first:end])
            found = again.backend.forward(
                again.queries_HTC[:, first:end],
                again.keys_GTC[:, first:end],
                again.values_GTC[:, first:end],
                1,
                SCALING,
                sliding_window,
                again.backend.prepare(batch),
            )
            torch.testing.assert_close(found, expected[first:end])
