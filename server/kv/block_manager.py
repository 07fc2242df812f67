"""Who owns which KV block: ids, hashes and reference counts, no tensors.

A block holds `block_size` consecutive tokens of one or several sequences. A block is in exactly one
of three states:

    free      no owner, no known content           -> taken first, lowest id first
    cached    no owner, content known by its digest -> found by prefix lookup, evicted when free
                                                       blocks run out, least recently used first
    in use    one or more owners; several only for full blocks with known content

A digest names a block's tokens *and* all tokens before them, so equal digests mean equal prefixes.
Only full blocks whose tokens are computed are registered, and nobody writes to them again.
"""

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from server.errors import EuryaleError


class OutOfBlocksError(EuryaleError):
    """Fewer blocks are available than were asked for. Nothing was allocated."""


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name a full block by its tokens and by its parent block's digest (b'' for the first)."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    """Hands out block ids, counts their owners and finds blocks of known prefixes."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._free = set(range(num_blocks))
        # The heap may name blocks that are no longer free; `_free` decides.
        self._free_heap = list(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_owners: dict[int, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._drafted: set[int] = set()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_in_use(self) -> int:
        """Blocks with at least one owner."""
        return len(self._num_owners)

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        """Take blocks for one owner, next to `after` where possible.

        Neighbouring ids let the attention read a sequence's KV without a copy.

        Raises:
            OutOfBlocksError: If fewer than `num_blocks` are available.
        """
        if num_blocks > self.num_available:
            raise OutOfBlocksError(
                f"{num_blocks} KV blocks asked for, {self.num_available} available"
            )
        block_ids = []
        for _ in range(num_blocks):
            after = self._take(after)
            self._num_owners[after] = 1
            self._drafted.discard(after)
            block_ids.append(after)
        return block_ids

    def extend(self, block_table: list[int], num_slots: int) -> bool:
        """Lengthen an owner's table to `num_slots` slots; False, and no change, if that fails."""
        num_missing = -(-num_slots // self.block_size) - len(block_table)
        if num_missing > 0:
            try:
                block_table += self.allocate(num_missing, block_table[-1] if block_table else None)
            except OutOfBlocksError:
                return False
        return True

    def mark_drafted(self, block_ids: Sequence[int]) -> None:
        """Note that a draft module's KV of these blocks is computed as well.

        It is forgotten when a block is handed out again.
        """
        self._drafted.update(block_ids)

    def num_drafted(self, block_ids: Sequence[int]) -> int:
        """Count the blocks at the head of a table whose draft module's KV is computed."""
        return next(
            (i for i, block_id in enumerate(block_ids) if block_id not in self._drafted),
            len(block_ids),
        )

    def _take(self, after: int | None) -> int:
        if after is not None and after + 1 in self._free:
            self._free.remove(after + 1)
            return after + 1
        if not self._free:
            block_id, _ = self._cached.popitem(last=False)
            del self._block_of[self._digest_of.pop(block_id)]
            return block_id
        while True:
            block_id = heapq.heappop(self._free_heap)
            if block_id in self._free:
                self._free.remove(block_id)
                return block_id

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one ownership of each block; known content stays findable until evicted."""
        # The tail goes first, so that eviction shortens a cached prefix from its end.
        for block_id in reversed(block_ids):
            num_owners = self._num_owners[block_id] - 1
            if num_owners:
                self._num_owners[block_id] = num_owners
                continue
            del self._num_owners[block_id]
            if block_id in self._digest_of:
                self._cached[block_id] = None
            else:
                self._free.add(block_id)
                heapq.heappush(self._free_heap, block_id)
        if len(self._free_heap) > 2 * self.num_blocks:
            self._free_heap = sorted(self._free)

    def register(self, block_id: int, digest: bytes) -> None:
        """Make a full, computed block findable; a second block of the same content stays anonymous.

        Does nothing if prefix caching is off.
        """
        if self._prefix_caching and digest not in self._block_of:
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def acquire_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Become an owner of the blocks that hold the longest known prefix of full blocks.

        At least the last token stays uncovered, since its logits have to be computed.

        Returns:
            Block ids and their digests, both in order.
        """
        block_ids: list[int] = []
        digests: list[bytes] = []
        if not self._prefix_caching:
            return block_ids, digests
        parent = b""
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            parent = block_digest(parent, token_ids[start : start + self.block_size])
            block_id = self._block_of.get(parent)
            if block_id is None:
                break
            self._cached.pop(block_id, None)
            self._num_owners[block_id] = self._num_owners.get(block_id, 0) + 1
            block_ids.append(block_id)
            digests.append(parent)
        return block_ids, digests

    def check(self) -> None:
        """Verify that every block is in exactly one state.

        Raises:
            AssertionError: If the books do not balance; this is a bug in the engine.
        """
        in_use = self._num_owners.keys()
        states = [self._free, set(self._cached), set(in_use)]
        assert sum(map(len, states)) == self.num_blocks, "a block was lost or is in two states"
        assert set().union(*states) == set(range(self.num_blocks)), "an unknown block id"
        assert self._free <= set(self._free_heap), "a free block cannot be found"
        assert len(self._free_heap) <= 2 * self.num_blocks, "the heap of free blocks grows"
        assert all(n > 0 for n in self._num_owners.values()), "a block in use has no owner"
        assert not self._free & self._digest_of.keys(), "a free block has known content"
        assert set(self._cached) <= self._digest_of.keys(), "a cached block has no digest"
        assert {b: d for d, b in self._block_of.items()} == self._digest_of, "digests diverge"
