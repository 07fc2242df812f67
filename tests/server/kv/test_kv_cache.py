"""The KV cache's tensors: layout, writes, and compaction against a slow copy."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kv.kv_cache import KVCache, KVLayout

LAYOUT = KVLayout(
    num_layers=2,
    num_kv_heads=3,
    head_dim=4,
    block_size=4,
    dtype=torch.float32,
    device=torch.device("cpu"),
)


def random_cache(num_blocks: int, seed: int = 0) -> KVCache:
    """A cache in which every slot of every layer is told apart by its content."""
    cache = KVCache(LAYOUT, num_blocks)
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_blocks * LAYOUT.block_size
    slots = torch.randperm(num_slots, generator=generator)
    for layer in range(LAYOUT.num_layers):
        keys = torch.randn(num_slots, 3, 4, generator=generator)
        values = torch.randn(num_slots, 3, 4, generator=generator)
        cache.write(layer, slots, keys, values)
    return cache


def snapshot(cache: KVCache) -> Tensor:
    """A copy `[layers, 2, slots, kv_heads, C]`."""
    pairs = zip(cache.keys, cache.values, strict=True)
    return torch.stack([torch.stack(pair) for pair in pairs]).clone()


class TestLayout:
    def test_block_bytes_are_what_one_more_block_takes(self) -> None:
        assert LAYOUT.block_bytes == 2 * 2 * 4 * 3 * 4 * 4

    def test_block_bytes_follow_the_dtype(self) -> None:
        half = KVLayout(2, 3, 4, 4, torch.bfloat16, torch.device("cpu"))
        assert half.block_bytes * 2 == LAYOUT.block_bytes

    def test_a_new_cache_holds_no_nan(self) -> None:
        assert (snapshot(KVCache(LAYOUT, 5)) == 0).all()


class TestWrite:
    def test_keys_and_values_of_one_layer_change_and_nothing_else(self) -> None:
        cache = random_cache(3)
        expected = snapshot(cache)
        keys, values = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        cache.write(1, torch.tensor([7, 2]), keys, values)
        expected[1, 0, [7, 2]] = keys
        expected[1, 1, [7, 2]] = values
        assert torch.equal(snapshot(cache), expected)

    def test_takes_transposed_views_as_the_model_hands_them_over(self) -> None:
        cache = KVCache(LAYOUT, 1)
        keys_HTC = torch.randn(3, 4, 4)
        cache.write(0, torch.arange(4), keys_HTC.transpose(0, 1), keys_HTC.transpose(0, 1))
        for head in range(3):
            assert torch.equal(cache.keys[0][:, head], keys_HTC[head])


class TestCompact:
    def test_moves_slots_in_all_layers(self) -> None:
        cache = random_cache(3)
        expected = snapshot(cache)
        cache.compact([5, 9], [4, 1])
        expected[:, :, [4, 1]] = expected[:, :, [5, 9]].clone()
        assert torch.equal(snapshot(cache), expected)

    def test_nothing_to_move_moves_nothing(self) -> None:
        cache = random_cache(2)
        before = snapshot(cache)
        cache.compact([], [])
        assert torch.equal(snapshot(cache), before)

    def test_a_target_that_is_also_a_source_is_read_first(self) -> None:
        cache = random_cache(2)
        before = snapshot(cache)
        cache.compact([2, 3], [1, 2])
        after = snapshot(cache)
        assert torch.equal(after[:, :, 1], before[:, :, 2])
        assert torch.equal(after[:, :, 2], before[:, :, 3])

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_accepted_paths_of_several_sequences_match_a_slow_copy(
        self, data: st.DataObject
    ) -> None:
        num_blocks, size = 12, LAYOUT.block_size
        order = data.draw(st.permutations(range(num_blocks)))
        cache = random_cache(num_blocks, seed=data.draw(st.integers(0, 5)))
        expected = snapshot(cache)
        sources: list[int] = []
        targets: list[int] = []
        for table in (order[:6], order[6:]):
            root = data.draw(st.integers(0, 3 * size))
            num_nodes = 6 * size - root
            nodes = st.sets(st.integers(1, num_nodes - 1), max_size=6)
            for index, node in enumerate([0, *sorted(data.draw(nodes))]):
                source, target = root + node, root + index
                slot_of = [block * size + offset for block in table for offset in range(size)]
                # Node ids rise along a path, so copying one by one in order is the slow truth.
                expected[:, :, slot_of[target]] = expected[:, :, slot_of[source]]
                sources.append(slot_of[source])
                targets.append(slot_of[target])
        cache.compact(sources, targets)
        assert torch.equal(snapshot(cache), expected)


@pytest.mark.gpu
class TestOnCuda:
    def test_compaction_is_the_same_as_on_the_cpu(self) -> None:
        layout = KVLayout(2, 3, 4, 4, torch.float32, torch.device("cuda"))
        slow, fast = random_cache(3), KVCache(layout, 3)
        for layer in range(2):
            slots = torch.arange(12, device="cuda")
            fast.write(layer, slots, slow.keys[layer].cuda(), slow.values[layer].cuda())
        slow.compact([5, 6, 9], [4, 5, 6])
        fast.compact([5, 6, 9], [4, 5, 6])
        assert torch.equal(snapshot(fast).cpu(), snapshot(slow))


class TestHidden:
    LAYOUT = replace(LAYOUT, hidden_size=5)

    def test_is_counted_in_a_block(self) -> None:
        assert self.LAYOUT.block_bytes == LAYOUT.block_bytes + 5 * 4 * 4

    def test_takes_no_place_where_none_is_asked_for(self) -> None:
        assert KVCache(LAYOUT, 3).hidden_SD.shape == (12, 0)

    def test_is_written_and_compacted_by_slot(self) -> None:
        cache = KVCache(self.LAYOUT, 3)
        states = torch.randn(4, 5)
        cache.write_hidden(torch.tensor([3, 4, 6, 9]), states)
        cache.compact([6, 9], [5, 6])
        assert torch.equal(cache.hidden_SD[[3, 4, 5, 6]], states)
        assert (cache.hidden_SD[[0, 1, 2, 7, 8, 10, 11]] == 0).all()
