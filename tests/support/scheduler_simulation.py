"""The scheduler without a model: a dictionary stands in for the KV cache's tensors.

The simulated cache holds under each slot the whole text up to its token, so a sequence that would
read a stale, foreign or overwritten slot is caught on the step that does it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from random import Random

from heads.tree_search import best_tree
from server.config import EngineConfig, SamplingParams
from server.core.sequence import Sequence
from server.core.step import StepEntry
from server.engine.scheduler import Scheduler
from server.kv.block_manager import BlockManager
from server.speculation.planner import StepRequest
from server.speculation.tree_sizes import FixedSizes
from tests.support.engine_tools import make_sequence, wide_profile
from tests.support.trees import draft_tokens

VOCAB = 16
NUM_HEADS = 3
NUM_RANKS = 2


@dataclass(frozen=True)
class FixedPlanner:
    """A planner that knows no draft source."""

    sizes: FixedSizes

    def plan(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        return self.sizes.choose(decoding, request)


@dataclass
class Simulation:
    """A scheduler whose model accepts drafts at random and continues with random tokens."""

    num_blocks: int
    block_size: int = 4
    max_num_seqs: int = 4
    max_tokens_per_step: int = 16
    max_nodes: int = 1
    max_prefill_tokens: int | None = None
    prefix_caching: bool = True
    seed: int = 0
    kv: dict[int, tuple[int, ...]] = field(default_factory=dict)
    num_steps: int = 0

    def __post_init__(self) -> None:
        config = EngineConfig(
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_num_seqs=self.max_num_seqs,
            max_tokens_per_step=self.max_tokens_per_step,
            max_nodes=self.max_nodes,
            max_prefill_tokens=self.max_prefill_tokens,
            tree_size=self.max_nodes,
        )
        self.rng = Random(self.seed)
        self.blocks = BlockManager(self.num_blocks, self.block_size, self.prefix_caching)
        self.tree = best_tree(wide_profile(NUM_HEADS, NUM_RANKS), self.max_nodes)
        self.scheduler = Scheduler(config, self.blocks, FixedPlanner(FixedSizes(self.max_nodes)))

    def add(
        self, prompt: tuple[int, ...], max_tokens: int = 8, drafts_allowed: int | None = None
    ) -> Sequence:
        sequence = make_sequence(prompt, (), SamplingParams(max_tokens=max_tokens), None, VOCAB)
        sequence.drafts_allowed = drafts_allowed or self.max_nodes
        self.scheduler.add(sequence)
        return sequence

    @property
    def has_unfinished(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def slot(self, sequence: Sequence, index: int) -> int:
        size = self.block_size
        return sequence.block_table[index // size] * size + index % size

    def step(self) -> list[StepEntry]:
        """Schedule, check the plan, run it on the simulated cache and commit random tokens."""
        plan = self.scheduler.schedule()
        self.num_steps += 1
        self.blocks.check()
        self.check(plan)
        for item in plan:
            self.run(item)
        for item in plan:
            if item.sequence.num_output_tokens >= item.sequence.request.sampling.max_tokens:
                self.scheduler.finish(item.sequence)
        self.blocks.check()
        return plan

    def check(self, plan: list[StepEntry]) -> None:
        assert plan or not self.has_unfinished, "there is work, but nothing was scheduled"
        assert sum(item.num_tokens for item in plan) <= self.max_tokens_per_step
        if self.max_prefill_tokens is not None and any(item.is_decoding for item in plan):
            prompts = [item.num_tokens for item in plan if not item.is_decoding]
            assert sum(prompts) <= self.max_prefill_tokens
        assert len(self.scheduler.running) <= self.max_num_seqs
        sequences = [item.sequence for item in plan]
        assert len(set(map(id, sequences))) == len(sequences), "a sequence is planned twice"
        assert all(sequence in self.scheduler.running for sequence in sequences)
        written: set[int] = set()
        for item in plan:
            first = item.sequence.num_computed_tokens
            slots = [self.slot(item.sequence, first + i) for i in range(item.num_tokens)]
            assert not written & set(slots), "two tokens of a step share a slot"
            written |= set(slots)
        for sequence in self.scheduler.running:
            for index in range(sequence.num_computed_tokens):
                slot = self.slot(sequence, index)
                assert slot not in written, "a step overwrites computed tokens"
                assert self.kv[slot] == tuple(sequence.token_ids[: index + 1])

    def run(self, item: StepEntry) -> None:
        sequence = item.sequence
        first, tree = sequence.num_computed_tokens, item.drafts.tree
        for index in range(first, first + item.num_tokens):
            self.kv[self.slot(sequence, index)] = (-1,)  # a tree node's slot is scratch
        committed = item.num_committed
        if item.is_verified:
            node = 0
            while tree.children()[node] and self.rng.random() < 0.7:
                node = self.rng.choice(tree.children()[node])
                sequence.token_ids.append(item.drafts.token_ids[node])
                committed += 1
            sequence.token_ids.append(self.rng.randrange(4))
            limit = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
            assert len(sequence.token_ids) <= limit, "a draft deeper than the request may grow"
            candidates = [self.rng.sample(range(VOCAB), NUM_RANKS) for _ in range(NUM_HEADS)]
            sequence.proposal = draft_tokens(self.tree, sequence.token_ids[-1], candidates)
        for index in range(first, first + committed):
            self.kv[self.slot(sequence, index)] = tuple(sequence.token_ids[: index + 1])
        sequence.num_computed_tokens += committed
        self.scheduler.note_computed(sequence)

    def run_to_the_end(self, max_steps: int = 3000) -> None:
        while self.has_unfinished:
            self.step()
            assert self.num_steps < max_steps, "the scheduler makes no progress"
        assert self.blocks.num_in_use == 0

    def run_to_a_preemption(self) -> None:
        while not self.scheduler.num_preemptions:
            assert self.has_unfinished, "nothing was preempted"
            self.step()
