"""Imaginary steps over blocks that nobody owns yet, to time them before the first request comes."""

from server.executor.executor import Executor
from server.speculation.cost_model import Probes

_CONTEXT = 256
_LONG_CONTEXT = 1024
_NUM_SEQUENCES = 8


def step_probes(executor: Executor, has_drafters: bool, num_slots: int, max_len: int) -> Probes:
    """Prepare steps with a context of ordinary length.

    Args:
        executor: Runs them.
        has_drafters: Whether it has device draft sources.
        num_slots: Slots of the KV cache.
        max_len: Longest sequence that the model's positions allow.
    """
    longest = min(num_slots, max_len)
    context_len = min(_CONTEXT, longest // 2)
    long_context_len = max(context_len, min(_LONG_CONTEXT, longest - 1))
    return Probes(
        step=lambda num_tokens: executor.time_step(num_tokens, 1, context_len),
        long_step=lambda: executor.time_step(1, 1, long_context_len),
        many_step=lambda: executor.time_step(1, _NUM_SEQUENCES, context_len),
        draft=(
            (lambda num_sequences: executor.time_drafts(num_sequences, context_len))
            if has_drafters
            else None
        ),
        context_len=context_len,
        num_further_tokens=long_context_len - context_len,
        num_sequences=_NUM_SEQUENCES,
        max_tokens=longest - context_len,
    )
