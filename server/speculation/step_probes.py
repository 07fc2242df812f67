"""Steps over blocks that nobody owns yet, to time them before the first request comes."""

from collections.abc import Callable

import torch

from server.attention.backend import AttentionBatch, AttentionSpan
from server.device.create import create_device
from server.executor.batch import StepBatch
from server.executor.model_runner import ModelRunner
from server.kv.kv_cache import KVLayout
from server.model.loading import LoadedModel
from server.speculation.cost_model import Probes
from server.speculation.drafter import Drafter

_CONTEXT = 256
_LONG_CONTEXT = 1024
_NUM_SEQUENCES = 8


def step_probes(
    runner: ModelRunner,
    loaded: LoadedModel,
    drafter: Drafter | None,
    layout: KVLayout,
    num_blocks: int,
) -> Probes:
    """Prepare steps with a context of ordinary length.

    All sequences of a step read and write the same blocks: what lies in them is of no concern.
    """
    device = create_device(loaded.device)
    num_slots = num_blocks * layout.block_size
    longest = min(num_slots, loaded.max_model_len)
    context_len = min(_CONTEXT, longest // 2)
    long_context_len = max(context_len, min(_LONG_CONTEXT, longest - 1))
    table = list(range(num_blocks))

    def run(num_tokens: int, num_sequences: int, context_len: int) -> None:
        positions = torch.arange(context_len, context_len + num_tokens, device=loaded.device)
        positions = positions.repeat(num_sequences)
        spans = tuple(
            AttentionSpan(index * num_tokens, num_tokens, context_len, table, None, None)
            for index in range(num_sequences)
        )
        runner.run(
            StepBatch(
                input_ids_T=torch.zeros_like(positions),
                positions_T=positions,
                logits_rows_S=torch.arange(len(positions), device=loaded.device),
                attention=AttentionBatch(spans, positions),
            )
        )
        device.synchronize()

    def run_draft(num_sequences: int) -> None:
        if drafter is not None:
            drafter.propose_for(num_sequences, context_len)
        device.synchronize()

    draft: Callable[[int], None] | None = None if drafter is None else run_draft
    return Probes(
        step=lambda num_tokens: run(num_tokens, 1, context_len),
        long_step=lambda: run(1, 1, long_context_len),
        many_step=lambda: run(1, _NUM_SEQUENCES, context_len),
        draft=draft,
        context_len=context_len,
        num_further_tokens=long_context_len - context_len,
        num_sequences=_NUM_SEQUENCES,
        max_tokens=longest - context_len,
    )
