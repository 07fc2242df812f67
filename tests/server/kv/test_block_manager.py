"""Block ids, owners and digests, against a naive model that remembers everything in plain lists."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.kv.block_manager import BlockManager, OutOfBlocksError, block_digest

NUM_BLOCKS = 7
BLOCK_SIZE = 2


def digests_of(token_ids: list[int], block_size: int) -> list[bytes]:
    """Digests of all full blocks of a text."""
    digests: list[bytes] = []
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = digests[-1] if digests else b""
        digests.append(block_digest(parent, token_ids[end - block_size : end]))
    return digests


def fill(manager: BlockManager, token_ids: list[int]) -> list[int]:
    """Allocate and register the blocks of a whole text, as a finished prefill would."""
    digests = digests_of(token_ids, manager.block_size)
    num_blocks = -(-len(token_ids) // manager.block_size)
    table = manager.allocate(num_blocks)
    for block_id, digest in zip(table, digests, strict=False):
        manager.register(block_id, digest)
    return table


class TestAllocate:
    def test_blocks_come_in_rising_order_from_a_fresh_cache(self) -> None:
        assert BlockManager(4, 16).allocate(3) == [0, 1, 2]

    def test_too_many_blocks_are_refused_with_both_numbers_and_nothing_is_taken(self) -> None:
        manager = BlockManager(4, 16)
        manager.allocate(3)
        with pytest.raises(OutOfBlocksError, match="2 KV blocks asked for, 1 available"):
            manager.allocate(2)
        assert manager.num_available == 1
        manager.check()

    def test_the_neighbour_of_the_last_block_is_preferred(self) -> None:
        manager = BlockManager(6, 16)
        first = manager.allocate(1)
        second = manager.allocate(1)
        manager.free(first)
        assert manager.allocate(2, after=second[-1]) == [2, 3]

    def test_without_a_free_neighbour_the_lowest_free_block_is_taken(self) -> None:
        manager = BlockManager(6, 16)
        first, second, third = manager.allocate(1), manager.allocate(1), manager.allocate(1)
        manager.free(first)
        assert manager.allocate(2, after=second[-1]) == [0, 3]
        assert third == [2]

    def test_the_last_block_has_no_neighbour(self) -> None:
        manager = BlockManager(3, 16)
        table = manager.allocate(3)
        manager.free(table[:2])
        assert manager.allocate(1, after=2) == [0]

    def test_zero_blocks_are_no_blocks(self) -> None:
        manager = BlockManager(1, 16)
        assert manager.allocate(0) == []
        assert manager.num_in_use == 0

    def test_counts_add_up_to_the_number_of_blocks(self) -> None:
        manager = BlockManager(5, 4)
        manager.free(fill(manager, [1, 2, 3, 4, 5]))
        manager.allocate(1)
        assert manager.num_in_use == 1
        assert manager.num_available == 4

    def test_books_do_not_grow_with_the_number_of_requests(self) -> None:
        manager = BlockManager(8, 4, prefix_caching=False)
        for _ in range(1000):
            manager.free(manager.allocate(8))
            manager.check()


class TestPrefixReuse:
    def test_full_blocks_of_a_known_beginning_are_shared(self) -> None:
        manager = BlockManager(8, 2)
        table = fill(manager, [1, 2, 3, 4, 5])
        shared, digests = manager.acquire_prefix([1, 2, 3, 4, 9, 9])
        assert shared == table[:2]
        assert digests == digests_of([1, 2, 3, 4], 2)
        manager.check()

    def test_the_last_token_is_never_covered_because_its_logits_are_needed(self) -> None:
        manager = BlockManager(8, 2)
        table = fill(manager, [1, 2, 3, 4])
        assert manager.acquire_prefix([1, 2, 3, 4])[0] == table[:1]
        assert manager.acquire_prefix([1, 2])[0] == []
        assert manager.acquire_prefix([1])[0] == []

    def test_the_same_tokens_after_another_beginning_are_another_block(self) -> None:
        manager = BlockManager(8, 2)
        fill(manager, [1, 2, 3, 4])
        assert manager.acquire_prefix([9, 9, 3, 4, 5])[0] == []

    def test_a_shared_block_stays_in_use_until_its_last_owner_gives_it_up(self) -> None:
        manager = BlockManager(2, 2)
        table = fill(manager, [1, 2, 3, 4])
        shared, _ = manager.acquire_prefix([1, 2, 9])
        manager.free(table)
        assert manager.num_in_use == 1
        with pytest.raises(OutOfBlocksError):
            manager.allocate(2)
        manager.free(shared)
        assert manager.num_in_use == 0
        manager.check()

    def test_freed_blocks_are_found_until_they_are_evicted(self) -> None:
        manager = BlockManager(2, 2)
        manager.free(fill(manager, [1, 2, 3, 4]))
        assert manager.num_available == 2
        shared, _ = manager.acquire_prefix([1, 2, 3, 4, 5])
        assert len(shared) == 2
        manager.free(shared)
        manager.allocate(2)
        assert manager.acquire_prefix([1, 2, 3, 4, 5])[0] == []
        manager.check()

    def test_a_cached_prefix_is_evicted_from_its_end(self) -> None:
        manager = BlockManager(3, 2)
        table = fill(manager, [1, 2, 3, 4, 5, 6])
        manager.free(table)
        assert manager.allocate(1) == [table[2]]
        assert manager.acquire_prefix([1, 2, 3, 4, 5, 6, 7])[0] == table[:2]

    def test_the_least_recently_used_prefix_is_evicted_first(self) -> None:
        manager = BlockManager(2, 2)
        old, new = fill(manager, [1, 1]), fill(manager, [2, 2])
        manager.free(old)
        manager.free(new)
        manager.free(manager.acquire_prefix([1, 1, 5])[0])
        assert manager.allocate(1) == new
        assert manager.acquire_prefix([1, 1, 5])[0] == old

    def test_blocks_without_known_content_are_taken_before_cached_ones(self) -> None:
        manager = BlockManager(3, 2)
        cached = fill(manager, [1, 2])
        plain = manager.allocate(1)
        manager.free(cached)
        manager.free(plain)
        assert manager.allocate(2) == [1, 2]
        assert manager.acquire_prefix([1, 2, 3])[0] == cached

    def test_a_second_block_of_the_same_content_stays_anonymous(self) -> None:
        manager = BlockManager(4, 2)
        first, second = fill(manager, [1, 2]), fill(manager, [1, 2])
        manager.free(second)
        assert manager.acquire_prefix([1, 2, 3])[0] == first
        assert manager.allocate(1, after=first[0]) == second, "an anonymous block is free at once"
        manager.check()

    def test_without_prefix_caching_nothing_is_found(self) -> None:
        manager = BlockManager(4, 2, prefix_caching=False)
        manager.free(fill(manager, [1, 2, 3, 4]))
        assert manager.acquire_prefix([1, 2, 3, 4, 5]) == ([], [])
        manager.check()


class TestDigest:
    def test_depends_on_the_tokens_their_order_and_the_parent(self) -> None:
        digests = {
            block_digest(b"", [1, 2]),
            block_digest(b"", [2, 1]),
            block_digest(b"", [1, 2, 0]),
            block_digest(block_digest(b"", [1, 2]), [1, 2]),
        }
        assert len(digests) == 4

    def test_is_the_same_for_lists_and_tuples(self) -> None:
        assert block_digest(b"x", [1, 2]) == block_digest(b"x", (1, 2))

    def test_tells_large_ids_apart(self) -> None:
        assert block_digest(b"", [1 << 40]) != block_digest(b"", [0])


class TestCheck:
    def test_notices_a_block_that_is_freed_twice(self) -> None:
        manager = BlockManager(4, 2)
        table = manager.allocate(2)
        manager.free(table)
        with pytest.raises(KeyError):
            manager.free(table)

    def test_notices_known_content_of_a_free_block(self) -> None:
        manager = BlockManager(4, 2)
        manager.register(3, block_digest(b"", [1, 2]))
        with pytest.raises(AssertionError, match="free block has known content"):
            manager.check()


@dataclass
class Owner:
    """A sequence as the naive model sees it: its text and its blocks."""

    token_ids: list[int]
    table: list[int]
    num_registered: int = 0


@dataclass
class NaiveBlocks:
    """States of all blocks in plain lists; content is the whole text up to a block's end."""

    free: set[int] = field(default_factory=lambda: set(range(NUM_BLOCKS)))
    cached: list[int] = field(default_factory=list)
    owners: dict[int, int] = field(default_factory=dict)
    content: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def take(self, after: int | None) -> int:
        if after is not None and after + 1 in self.free:
            block_id = after + 1
        elif self.free:
            block_id = min(self.free)
        else:
            block_id = self.cached.pop(0)
            del self.content[block_id]
        self.free.discard(block_id)
        assert block_id not in self.owners, "a block was handed out twice"
        self.owners[block_id] = 1
        return block_id

    def find(self, token_ids: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(BLOCK_SIZE, len(token_ids), BLOCK_SIZE):
            prefix = tuple(token_ids[:end])
            block_id = next((b for b, text in self.content.items() if text == prefix), None)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def share(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if block_id in self.cached:
                self.cached.remove(block_id)
            self.owners[block_id] = self.owners.get(block_id, 0) + 1

    def release(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            self.owners[block_id] -= 1
            if self.owners[block_id] == 0:
                del self.owners[block_id]
                if block_id in self.content:
                    self.cached.append(block_id)
                else:
                    self.free.add(block_id)


class BlockManagerMachine(RuleBasedStateMachine):
    """Random histories of the real manager and the naive one, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.naive = NaiveBlocks()
        self.sequences: list[Owner] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def start(self, token_ids: list[int]) -> None:
        table, digests = self.manager.acquire_prefix(token_ids)
        assert table == self.naive.find(token_ids)
        assert digests == digests_of(token_ids, BLOCK_SIZE)[: len(table)]
        assert len(table) * BLOCK_SIZE < len(token_ids)
        self.naive.share(table)
        self.sequences.append(Owner(token_ids, table, len(table)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), num_blocks=st.integers(0, 4))
    def grow(self, data: st.DataObject, num_blocks: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        after = sequence.table[-1] if sequence.table else None
        if num_blocks > len(self.naive.free) + len(self.naive.cached):
            with pytest.raises(OutOfBlocksError):
                self.manager.allocate(num_blocks, after=after)
            return
        taken = self.manager.allocate(num_blocks, after=after)
        expected = []
        for _ in range(num_blocks):
            after = self.naive.take(after)
            expected.append(after)
        assert taken == expected
        sequence.table += taken

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compute_a_block(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        end = (sequence.num_registered + 1) * BLOCK_SIZE
        if end > min(len(sequence.token_ids), len(sequence.table) * BLOCK_SIZE):
            return
        block_id = sequence.table[sequence.num_registered]
        text = tuple(sequence.token_ids[:end])
        self.manager.register(block_id, digests_of(list(text), BLOCK_SIZE)[-1])
        sequence.num_registered += 1
        if text not in self.naive.content.values():
            self.naive.content[block_id] = text

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.manager.free(sequence.table)
        self.naive.release(sequence.table)

    @invariant()
    def books_balance(self) -> None:
        self.manager.check()
        assert self.manager.num_in_use == len(self.naive.owners)
        assert self.manager.num_available == len(self.naive.free) + len(self.naive.cached)

    def teardown(self) -> None:
        for sequence in self.sequences:
            self.manager.free(sequence.table)
        self.manager.check()
        assert self.manager.num_in_use == 0
        assert self.manager.num_available == NUM_BLOCKS


TestBlockManagerAgainstANaiveModel = BlockManagerMachine.TestCase
TestBlockManagerAgainstANaiveModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


class TestExtend:
    def test_lengthens_a_table_to_the_slots_asked_for(self) -> None:
        blocks = BlockManager(6, 4)
        table: list[int] = []
        for num_slots, num_blocks in ((1, 1), (4, 1), (5, 2), (3, 2), (17, 5)):
            assert blocks.extend(table, num_slots)
            assert len(table) == num_blocks
        assert blocks.num_in_use == 5

    def test_changes_nothing_where_blocks_are_lacking(self) -> None:
        blocks = BlockManager(3, 4)
        table = blocks.allocate(2)
        assert not blocks.extend(table, 16)
        assert (len(table), blocks.num_in_use) == (2, 2)


class TestDrafted:
    def test_counts_marked_blocks_at_the_head_of_a_table(self) -> None:
        blocks = BlockManager(6, 4)
        table = blocks.allocate(4)
        assert blocks.num_drafted(table) == 0
        blocks.mark_drafted([table[0], table[1], table[3]])
        assert blocks.num_drafted(table) == 2
        blocks.mark_drafted(table)
        assert blocks.num_drafted(table) == 4

    def test_outlives_the_owner_but_not_the_content(self) -> None:
        blocks = BlockManager(1, 2)
        table = blocks.allocate(1)
        blocks.register(table[0], block_digest(b"", (5, 6)))
        blocks.mark_drafted(table)
        blocks.free(table)
        found, _ = blocks.acquire_prefix((5, 6, 7))
        assert blocks.num_drafted(found) == 1
        blocks.free(found)
        assert blocks.num_drafted(blocks.allocate(1)) == 0
