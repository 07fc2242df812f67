"""Packing a plan into flat tensors, checked by what each token must know about itself."""

import torch

from heads.candidates import DraftTokens
from server.config import SamplingParams
from server.core.step import StepEntry, root_only
from server.executor.batch import build_batch
from server.kv.kv_cache import KVLayout
from tests.support.engine_tools import make_sequence
from tests.support.trees import tree_of_paths

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
TREE = tree_of_paths([(0,), (1,), (0, 0), (1, 0)])


def layout(block_size: int) -> KVLayout:
    return KVLayout(1, 1, 8, block_size, torch.float32, CPU)


def chunk(prompt: tuple[int, ...], table: list[int], computed: int, num_tokens: int) -> StepEntry:
    sequence = make_sequence(prompt, (), GREEDY)
    sequence.block_table, sequence.num_computed_tokens = table, computed
    is_last = computed + num_tokens == len(prompt)
    return StepEntry(sequence, num_tokens, root_only(sequence), is_last, False)


def decode(
    prompt: tuple[int, ...], root: int, table: list[int], drafts: tuple[int, ...] = ()
) -> StepEntry:
    sequence = make_sequence(prompt, (root,), GREEDY)
    sequence.block_table, sequence.num_computed_tokens = table, len(prompt)
    if not drafts:
        return StepEntry(sequence, 1, root_only(sequence), True, True)
    return StepEntry(sequence, 1, DraftTokens(TREE, (root, *drafts)), True, True)


class TestBuildBatch:
    def test_a_whole_prompt_asks_for_the_logits_of_its_last_token(self) -> None:
        batch = build_batch([chunk((5, 6, 7), [3], 0, 3)], layout(4))
        assert batch.input_ids_T.tolist() == [5, 6, 7]
        assert batch.positions_T.tolist() == [0, 1, 2]
        assert batch.attention.slots_T.tolist() == [12, 13, 14]
        assert batch.logits_rows_S.tolist() == [2]
        (span,) = batch.attention.spans
        assert (span.start, span.num_queries, span.context_len) == (0, 3, 0)
        assert span.ancestor_mask_QS is None
        assert span.depths_S is None

    def test_a_chunk_continues_at_its_position_and_across_blocks(self) -> None:
        batch = build_batch([chunk(tuple(range(10)), [7, 2, 5], 3, 4)], layout(4))
        assert batch.input_ids_T.tolist() == [3, 4, 5, 6]
        assert batch.positions_T.tolist() == [3, 4, 5, 6]
        assert batch.attention.slots_T.tolist() == [31, 8, 9, 10]
        assert batch.attention.spans[0].context_len == 3

    def test_a_step_of_unfinished_prompts_still_asks_for_some_row(self) -> None:
        batch = build_batch([chunk(tuple(range(10)), [7, 2, 5], 0, 4)], layout(4))
        assert batch.logits_rows_S.tolist() == [0]

    def test_siblings_share_a_position_but_no_slot(self) -> None:
        batch = build_batch([decode((1, 2, 3), 9, [4, 1], (10, 11, 12, 13))], layout(4))
        assert batch.input_ids_T.tolist() == [9, 10, 11, 12, 13]
        assert batch.positions_T.tolist() == [3, 4, 4, 5, 5]
        assert batch.attention.slots_T.tolist() == [19, 4, 5, 6, 7]
        assert batch.logits_rows_S.tolist() == [0, 1, 2, 3, 4]
        (span,) = batch.attention.spans
        assert span.ancestor_mask_QS is not None
        assert torch.equal(span.ancestor_mask_QS, TREE.ancestor_mask())
        assert span.depths_S is not None
        assert span.depths_S.tolist() == [0, 1, 1, 2, 2]

    def test_plain_decoding_needs_no_mask(self) -> None:
        (span,) = build_batch([decode((1, 2, 3), 9, [4])], layout(4)).attention.spans
        assert (span.num_queries, span.context_len, span.ancestor_mask_QS) == (1, 3, None)

    def test_sequences_follow_each_other_and_rows_come_in_their_order(self) -> None:
        plan = [
            decode((1,), 8, [0], (10, 11, 12, 13)),
            chunk((5, 6, 7, 8, 9), [1, 2], 0, 3),
            decode((2, 3), 9, [3]),
            chunk((4, 4), [5], 0, 2),
        ]
        batch = build_batch(plan, layout(8))
        assert [span.start for span in batch.attention.spans] == [0, 5, 8, 9]
        assert [span.num_queries for span in batch.attention.spans] == [5, 3, 1, 2]
        assert batch.input_ids_T.tolist() == [8, 10, 11, 12, 13, 5, 6, 7, 9, 4, 4]
        assert batch.logits_rows_S.tolist() == [0, 1, 2, 3, 4, 8, 10]
        assert batch.first_rows == (0, -1, 5, 6)
        assert len(set(batch.attention.slots_T.tolist())) == 11
