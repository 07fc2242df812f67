"""Which sequences take part in the next step, with how many tokens and which blocks.

Older sequences come first. A sequence whose tree finds no blocks shrinks it to the root; if that
finds none either, the newest sequence is preempted: its blocks are freed and its tokens recomputed
later. The oldest sequence can always take all blocks, and requests that would not fit alone are
refused before they are queued, so every request ends.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

from heads.candidates import DraftTokens
from server.config import EngineConfig
from server.core.sequence import Sequence
from server.core.step import StepEntry, root_only
from server.kv.block_manager import BlockManager, block_digest
from server.speculation.planner import StepRequest


class TreePlanner(Protocol):
    """Says how large trees are; the speculator is one."""

    def plan(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """Nodes of each decoding sequence's tree, root included."""


def _ignore(sequence: Sequence) -> None:
    """Take no note."""


class Scheduler:
    """Owns the queue of waiting and the list of running sequences, both oldest first.

    Args:
        config: Sizes of steps and blocks.
        blocks: Where sequences' KV lies.
        planner: Sizes the trees.
        on_admit: Called for each sequence that got the blocks of its beginning, before its step.

    Attributes:
        prompt_limit: Largest number of prompt tokens of a step; None leaves it to the options.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        planner: TreePlanner,
        on_admit: Callable[[Sequence], None] = _ignore,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._config = config
        self._blocks = blocks
        self._planner = planner
        self._on_admit = on_admit
        self.prompt_limit: int | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its blocks at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[StepEntry]:
        """Choose the next step's tokens and reserve their blocks.

        Returns:
            At most `max_tokens_per_step` tokens; empty only if there is no sequence at all.
        """
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        sizes = self._tree_sizes(decoding)
        plan: list[StepEntry] = []
        # At least one token is left while a sequence prefills: the budget covers all sequences.
        prefill_budget = self._prefill_budget(sum(sizes.values()))
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # preempted in favour of an older one
            item = self._plan_running(sequence, sizes.get(id(sequence), 1), prefill_budget)
            if item is not None:
                plan.append(item)
                if not item.is_decoding:
                    prefill_budget -= item.num_tokens
        self._admit(plan, prefill_budget)
        return plan

    def note_computed(self, sequence: Sequence) -> None:
        """Make blocks that became full of computed tokens available for prefix reuse."""
        size = self._config.block_size
        digests = sequence.block_digests
        while (len(digests) + 1) * size <= sequence.num_computed_tokens:
            start = len(digests) * size
            parent = digests[-1] if digests else b""
            digests.append(block_digest(parent, sequence.token_ids[start : start + size]))
            self._blocks.register(sequence.block_table[len(digests) - 1], digests[-1])

    def _tree_sizes(self, decoding: Seq[Sequence]) -> dict[int, int]:
        """Nodes of each decoding sequence's tree, by the sequence's identity."""
        if not decoding:
            return {}
        # Trees leave a quarter of the step to prompts, lest these starve.
        room = max(0, self._config.max_tokens_per_step * 3 // 4 - len(decoding))
        prompts = [seq for seq in (*self.running, *self.waiting) if not seq.is_decoding]
        num_prompt_tokens = min(
            sum(sequence.num_uncomputed_tokens for sequence in prompts),
            self._prefill_budget(len(decoding)),
        )
        sizes = self._planner.plan(decoding, StepRequest(num_prompt_tokens, room))
        return {id(sequence): size for sequence, size in zip(decoding, sizes, strict=True)}

    def _prefill_budget(self, num_tree_tokens: int) -> int:
        """Prompt tokens of a step with trees of so many nodes in all; 0 if none decodes."""
        limits = [self._config.max_tokens_per_step - num_tree_tokens]
        if num_tree_tokens and self._config.max_prefill_tokens is not None:
            limits.append(self._config.max_prefill_tokens)
        if self.prompt_limit is not None:
            limits.append(self.prompt_limit)
        return min(limits)

    def _plan_running(
        self, sequence: Sequence, num_nodes: int, prefill_budget: int
    ) -> StepEntry | None:
        if sequence.is_decoding:
            drafts = self._drafts(sequence, num_nodes)
            if not self._try_reserve(sequence, drafts.tree.num_nodes):
                drafts = root_only(sequence)
                if not self._reserve_or_preempt(sequence, 1):
                    return None
            return StepEntry(sequence, 1, drafts, is_verified=True, is_decoding=True)
        num_tokens = min(sequence.num_uncomputed_tokens, prefill_budget)
        if num_tokens < 1 or not self._reserve_or_preempt(sequence, num_tokens):
            return None
        return self._prefill(sequence, num_tokens)

    @staticmethod
    def _drafts(sequence: Sequence, num_nodes: int) -> DraftTokens:
        # The bonus token takes one of the lacking places. Deeper drafts would be thrown away, and
        # their positions could lie beyond those that the model knows.
        depth = sequence.num_lacking_tokens - 1
        size = 1 if depth == 0 else min(num_nodes, sequence.drafts_allowed)
        if size == 1 or sequence.proposal is None:
            return root_only(sequence)
        return sequence.proposal.limited(size, depth)

    def _admit(self, plan: list[StepEntry], prefill_budget: int) -> None:
        while self.waiting and prefill_budget > 0 and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            table, digests = self._blocks.acquire_prefix(sequence.token_ids)
            num_needed = self._num_blocks(len(sequence.token_ids)) - len(table)
            # A spare block for each running sequence keeps a newcomer from being preempted soon.
            if num_needed + len(self.running) > self._blocks.num_available and self.running:
                self._blocks.free(table)
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.block_table, sequence.block_digests = table, digests
            sequence.num_computed_tokens = len(table) * self._config.block_size
            if sequence.num_output_tokens == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self._on_admit(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, prefill_budget)
            if not self._try_reserve(sequence, num_tokens):
                raise AssertionError("an admitted sequence has no room for its first chunk")
            plan.append(self._prefill(sequence, num_tokens))
            prefill_budget -= num_tokens

    @staticmethod
    def _prefill(sequence: Sequence, num_tokens: int) -> StepEntry:
        return StepEntry(
            sequence,
            num_tokens,
            root_only(sequence),
            is_verified=num_tokens == sequence.num_uncomputed_tokens,
            is_decoding=False,
        )

    def _reserve_or_preempt(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve slots, preempting the newest sequences; False if that was `sequence` itself."""
        while not self._try_reserve(sequence, num_tokens):
            victim = self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _try_reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        num_slots = sequence.num_computed_tokens + num_tokens
        return self._blocks.extend(sequence.block_table, num_slots)

    def _release(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.block_digests = []
        sequence.proposal, sequence.has_device_drafts = None, False
        sequence.num_computed_tokens = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)
