"""The scheduler alone: no model runs, and a dictionary stands in for the KV cache's tensors.

The simulated cache holds under each slot the whole text up to its token, so a sequence that would
read a stale, foreign or overwritten slot is caught on the step that does it.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.candidates import PAD_TOKEN
from server.config import EngineConfig, SamplingParams
from server.engine.scheduler import ScheduledSequence, Scheduler, root_only
from server.engine.sequence import Sequence
from server.engine.speculator import Speculator
from server.kv.block_manager import BlockManager
from tests.engine_tools import make_sequence, random_heads, wide_profile

VOCAB = 16
NUM_HEADS = 3
NUM_RANKS = 2


@dataclass
class Simulation:
    """A scheduler whose model accepts drafts at random and continues with random tokens."""

    num_blocks: int
    block_size: int = 4
    max_num_seqs: int = 4
    max_tokens_per_step: int = 16
    max_nodes: int = 1
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
            tree=self.max_nodes,
        )
        self.rng = Random(self.seed)
        self.blocks = BlockManager(self.num_blocks, self.block_size, self.prefix_caching)
        heads = random_heads(VOCAB, NUM_HEADS)
        profile = wide_profile(NUM_HEADS, NUM_RANKS)
        speculator = Speculator(heads, profile, self.max_nodes, fixed_size=self.max_nodes)
        self.scheduler = Scheduler(config, self.blocks, speculator)

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

    def step(self) -> list[ScheduledSequence]:
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

    def check(self, plan: list[ScheduledSequence]) -> None:
        assert plan or not self.has_unfinished, "there is work, but nothing was scheduled"
        assert sum(item.num_tokens for item in plan) <= self.max_tokens_per_step
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

    def run(self, item: ScheduledSequence) -> None:
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
            sequence.candidate_ids = [
                self.rng.sample(range(VOCAB), NUM_RANKS) for _ in range(NUM_HEADS)
            ]
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


class TestPrefill:
    def test_a_prompt_that_fits_is_computed_in_one_step(self) -> None:
        simulation = Simulation(num_blocks=8)
        simulation.add((1,) * 10)
        plan = simulation.step()
        assert [(item.num_tokens, item.is_verified, item.is_decoding) for item in plan] == [
            (10, True, False)
        ]

    def test_a_long_prompt_comes_in_chunks_and_only_the_last_is_verified(self) -> None:
        simulation = Simulation(num_blocks=16, max_tokens_per_step=16)
        simulation.add((1,) * 40)
        plans = [simulation.step()[0] for _ in range(3)]
        assert [item.num_tokens for item in plans] == [16, 16, 8]
        assert [item.is_verified for item in plans] == [False, False, True]

    def test_a_long_prompt_does_not_stall_those_that_decode(self) -> None:
        simulation = Simulation(num_blocks=32, max_tokens_per_step=8)
        streaming = simulation.add((1, 2, 3), max_tokens=20)
        simulation.step()
        simulation.add((1,) * 40)
        for _ in range(5):
            before = streaming.num_output_tokens
            plan = simulation.step()
            assert streaming.num_output_tokens > before
            assert len(plan) == 2, "and the prompt goes on too"

    def test_several_prompts_share_a_step(self) -> None:
        simulation = Simulation(num_blocks=16)
        for length in (5, 6, 9):
            simulation.add((length,) * length)
        assert [item.num_tokens for item in simulation.step()] == [5, 6, 5]

    def test_no_step_is_larger_than_the_budget_even_with_large_blocks(self) -> None:
        simulation = Simulation(num_blocks=4, block_size=32, max_tokens_per_step=8)
        simulation.add((1,) * 40)
        assert [item.num_tokens for item in simulation.step()] == [8]

    def test_the_number_of_running_sequences_is_limited(self) -> None:
        simulation = Simulation(num_blocks=32, max_num_seqs=2, max_tokens_per_step=64)
        for token in range(5):
            simulation.add((token,))
        simulation.step()
        assert len(simulation.scheduler.running) == 2
        assert len(simulation.scheduler.waiting) == 3
        simulation.run_to_the_end()

    def test_requests_are_admitted_in_the_order_of_arrival(self) -> None:
        simulation = Simulation(num_blocks=32, max_num_seqs=1)
        sequences = [simulation.add((token,), max_tokens=2) for token in range(4)]
        order: list[Sequence] = []
        while simulation.has_unfinished:
            order += [item.sequence for item in simulation.step() if not item.is_decoding]
        assert order == sequences


class TestTrees:
    def make(self, **options: Any) -> Simulation:
        return Simulation(
            **{"num_blocks": 64, "max_nodes": 8, "max_tokens_per_step": 64, **options}
        )

    def test_a_decoding_sequence_gets_a_tree_below_its_root(self) -> None:
        simulation = self.make()
        sequence = simulation.add((1, 2), max_tokens=20)
        simulation.step()
        root = sequence.token_ids[-1]
        (item,) = simulation.step()
        assert item.is_decoding
        assert item.num_committed == 1
        assert item.drafts.tree.num_nodes == 8
        assert item.drafts.token_ids[0] == root

    def test_a_request_may_ask_for_a_smaller_tree(self) -> None:
        simulation = self.make()
        simulation.add((1,), max_tokens=20, drafts_allowed=3)
        simulation.step()
        assert simulation.step()[0].drafts.tree.num_nodes == 3

    def test_a_request_without_drafts_decodes_by_the_root_alone(self) -> None:
        simulation = self.make()
        simulation.add((1,), max_tokens=20, drafts_allowed=1)
        simulation.step()
        assert simulation.step()[0].drafts.tree.num_nodes == 1

    def test_drafts_never_reach_beyond_the_last_token_of_the_request(self) -> None:
        # Their positions could lie beyond the model's, and they would be thrown away anyway.
        for max_tokens in range(1, 6):
            simulation = self.make()
            sequence = simulation.add((1, 2, 3), max_tokens=max_tokens)
            while simulation.has_unfinished:
                missing = max_tokens - sequence.num_output_tokens
                for item in simulation.step():
                    assert item.drafts.tree.max_depth <= max(missing - 1, 0)
                    assert PAD_TOKEN not in item.drafts.token_ids

    def test_trees_leave_a_quarter_of_the_step_to_prompts(self) -> None:
        simulation = self.make(max_tokens_per_step=32, max_num_seqs=8)
        for token in range(4):
            simulation.add((token,), max_tokens=50)
        simulation.step()
        simulation.add((7,) * 40)
        plan = simulation.step()
        assert sum(item.num_tokens for item in plan if item.is_decoding) <= 24
        assert plan[-1].num_tokens >= 8

    def test_short_of_blocks_the_tree_shrinks_to_the_root_and_nobody_is_preempted(self) -> None:
        simulation = Simulation(num_blocks=2, max_nodes=8, max_tokens_per_step=16)
        simulation.add((1,) * 4, max_tokens=4)
        simulation.step()
        (item,) = simulation.step()
        assert item.num_tokens <= 4
        simulation.run_to_the_end()
        assert simulation.scheduler.num_preemptions == 0

    def test_a_step_without_candidates_is_plain(self) -> None:
        simulation = self.make()
        sequence = simulation.add((1,), max_tokens=20)
        simulation.step()
        sequence.candidate_ids = None
        assert simulation.step()[0].drafts == root_only(sequence) or sequence.token_ids


class TestPreemption:
    def test_the_newest_sequence_makes_room_for_the_oldest(self) -> None:
        simulation = Simulation(num_blocks=5, prefix_caching=False)
        old = simulation.add((1,) * 6, max_tokens=10)
        new = simulation.add((2,) * 5, max_tokens=10)
        simulation.run_to_a_preemption()
        assert simulation.scheduler.running == [old]
        assert list(simulation.scheduler.waiting) == [new]
        assert (new.block_table, new.num_computed_tokens, new.candidate_ids) == ([], 0, None)
        simulation.run_to_the_end()
        assert new.num_output_tokens == 10

    def test_a_preempted_sequence_comes_before_those_that_never_ran(self) -> None:
        simulation = Simulation(num_blocks=5, prefix_caching=False)
        simulation.add((1,) * 6, max_tokens=10)
        preempted = simulation.add((2,) * 5, max_tokens=10)
        waiting = simulation.add((3,) * 7, max_tokens=2)
        simulation.run_to_a_preemption()
        assert list(simulation.scheduler.waiting) == [preempted, waiting]
        simulation.run_to_the_end()

    def test_recomputing_covers_the_generated_tokens_too(self) -> None:
        simulation = Simulation(num_blocks=5, prefix_caching=False)
        simulation.add((1,) * 6, max_tokens=8)
        new = simulation.add((2,) * 5, max_tokens=8)
        simulation.run_to_a_preemption()
        num_tokens = len(new.token_ids)
        assert num_tokens > 5
        while new not in simulation.scheduler.running:
            plan = simulation.step()
        (item,) = [item for item in plan if item.sequence is new]
        assert (item.num_tokens, item.is_verified, item.is_decoding) == (num_tokens, True, False)

    def test_a_sequence_that_needs_every_block_still_ends(self) -> None:
        simulation = Simulation(num_blocks=5, max_nodes=8)
        for token in range(3):
            simulation.add((token,) * 12, max_tokens=8)
        simulation.run_to_the_end()

    @pytest.mark.parametrize("length", [1, 3, 4, 5])
    def test_a_cache_of_a_single_block_serves_one_request_after_the_other(
        self, length: int
    ) -> None:
        simulation = Simulation(num_blocks=1, block_size=8, max_nodes=8)
        for _ in range(3):
            simulation.add((1,) * length, max_tokens=8 - length)
        simulation.run_to_the_end()


class TestFinish:
    def test_frees_the_blocks_of_a_running_sequence_at_once(self) -> None:
        simulation = Simulation(num_blocks=8)
        sequence = simulation.add((1,) * 10)
        simulation.step()
        assert simulation.blocks.num_in_use == 3
        simulation.scheduler.finish(sequence)
        assert simulation.blocks.num_in_use == 0
        assert simulation.step() == []

    def test_forgets_a_waiting_sequence(self) -> None:
        simulation = Simulation(num_blocks=8, max_num_seqs=1)
        simulation.add((1,))
        waiting = simulation.add((2,))
        simulation.step()
        simulation.scheduler.finish(waiting)
        assert not simulation.scheduler.waiting
        simulation.run_to_the_end()

    def test_frees_the_blocks_of_half_a_prompt(self) -> None:
        simulation = Simulation(num_blocks=16, max_tokens_per_step=8)
        sequence = simulation.add((1,) * 40)
        simulation.step()
        assert simulation.blocks.num_in_use == 2
        simulation.scheduler.finish(sequence)
        assert simulation.blocks.num_in_use == 0


class TestPrefixReuse:
    def test_a_second_request_computes_only_what_differs(self) -> None:
        simulation = Simulation(num_blocks=16)
        simulation.add((1,) * 12, max_tokens=1)
        simulation.run_to_the_end()
        second = simulation.add((1,) * 9 + (5,), max_tokens=1)
        (item,) = simulation.step()
        assert item.num_tokens == 2
        assert second.num_cached_tokens == 8

    def test_generated_tokens_are_reused_by_the_next_turn(self) -> None:
        simulation = Simulation(num_blocks=16)
        first = simulation.add((1,) * 6, max_tokens=7)
        simulation.run_to_the_end()
        second = simulation.add((*first.token_ids, 9), max_tokens=1)
        simulation.step()
        assert second.num_cached_tokens == 12

    def test_requests_that_run_at_once_share_blocks(self) -> None:
        simulation = Simulation(num_blocks=16)
        simulation.add((1,) * 12, max_tokens=8)
        simulation.step()
        simulation.add((1,) * 12, max_tokens=8)
        simulation.step()
        first, second = simulation.scheduler.running
        assert first.block_table[:2] == second.block_table[:2]
        simulation.run_to_the_end()

    def test_a_refused_admission_gives_its_prefix_back(self) -> None:
        simulation = Simulation(num_blocks=5, max_tokens_per_step=32)
        simulation.add((1,) * 13, max_tokens=6)
        simulation.step()
        simulation.add((1,) * 16, max_tokens=2)
        for _ in range(3):
            simulation.step()
            assert len(simulation.scheduler.waiting) == 1
        simulation.run_to_the_end()


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Simulation, list[tuple[int, tuple[int, ...], int]]]:
    """A tiny cache and requests that each fit it alone, by arrival step."""
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    num_blocks = draw(st.integers(1, 12))
    max_num_seqs = draw(st.integers(1, 5))
    max_nodes = draw(st.sampled_from([1, 2, 8]))
    budget = max(max_num_seqs, max_nodes) + draw(st.integers(0, 12))
    capacity = num_blocks * block_size
    simulation = Simulation(
        num_blocks,
        block_size,
        max_num_seqs,
        budget,
        max_nodes,
        prefix_caching=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    requests = []
    for _ in range(draw(st.integers(1, 8))):
        total = draw(st.integers(min(2, capacity), capacity))
        length = draw(st.integers(1, max(total - 1, 1)))
        prompt = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        if total > length:
            requests.append((draw(st.integers(0, 12)), tuple(prompt), total - length))
    return simulation, sorted(requests, key=lambda request: request[0])


class TestAnyWorkload:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(workload=workloads(), aborts=st.lists(st.integers(0, 30), max_size=4))
    def test_every_request_ends_no_block_leaks_and_no_slot_is_misread(
        self,
        workload: tuple[Simulation, list[tuple[int, tuple[int, ...], int]]],
        aborts: list[int],
    ) -> None:
        simulation, requests = workload
        added: list[Sequence] = []
        while requests or simulation.has_unfinished:
            while requests and requests[0][0] <= simulation.num_steps:
                _, prompt, max_tokens = requests.pop(0)
                added.append(simulation.add(prompt, max_tokens))
            if simulation.num_steps in aborts:
                pool = [*simulation.scheduler.running, *simulation.scheduler.waiting]
                if pool:
                    aborted = simulation.rng.choice(pool)
                    simulation.scheduler.finish(aborted)
                    added.remove(aborted)
            simulation.step()
            assert simulation.num_steps < 3000, "the scheduler makes no progress"
        assert simulation.blocks.num_in_use == 0
        for sequence in added:
            assert sequence.num_output_tokens == sequence.request.sampling.max_tokens
