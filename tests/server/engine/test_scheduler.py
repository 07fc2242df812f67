"""The scheduler alone, on a simulated KV cache that knows what every slot should hold."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.candidates import PAD_TOKEN
from server.core.sequence import Sequence
from server.core.step import root_only
from tests.support.scheduler_simulation import Simulation


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

    def test_beside_streams_a_prompt_may_be_held_to_smaller_chunks(self) -> None:
        simulation = Simulation(num_blocks=32, max_tokens_per_step=16, max_prefill_tokens=5)
        simulation.add((1, 2, 3), max_tokens=4)
        simulation.step()
        simulation.add((1,) * 40)
        chunks = [simulation.step()[-1].num_tokens for _ in range(4)]
        assert chunks == [5, 5, 5, 16], "alone it takes the whole step again"

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
        sequence.proposal = None
        assert simulation.step()[0].drafts == root_only(sequence) or sequence.token_ids


class TestPreemption:
    def test_the_newest_sequence_makes_room_for_the_oldest(self) -> None:
        simulation = Simulation(num_blocks=5, prefix_caching=False)
        old = simulation.add((1,) * 6, max_tokens=10)
        new = simulation.add((2,) * 5, max_tokens=10)
        simulation.run_to_a_preemption()
        assert simulation.scheduler.running == [old]
        assert list(simulation.scheduler.waiting) == [new]
        assert (new.block_table, new.num_computed_tokens, new.proposal) == ([], 0, None)
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
        draw(st.none() | st.integers(1, 6)),
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
