"""Commits what a step brought: tokens, processors, and how far a sequence is computed.

Only what the next step depends on is done here. Text, stop strings and what the client sees wait
until that step is launched (`server.engine.output`).
"""

from server.core.step import Landed, Outcome, StepEntry


def commit(entry: StepEntry, landed: Landed) -> Outcome:
    """Append an entry's new tokens to its sequence; tokens behind the end of the text are dropped.

    All committed tokens but the last one, the next step's root, have KV then.
    """
    sequence = entry.sequence
    sequence.num_computed_tokens += entry.num_committed
    if landed.verdict is None:
        return Outcome(entry, landed)
    tree, path = entry.drafts.tree, landed.verdict.path[1:]
    new_ids = [*(entry.drafts.token_ids[node] for node in path), landed.verdict.bonus_token]
    depths = [*(tree.depths[node] for node in path), 0]
    count, reason = sequence.end_among(new_ids)
    token_ids = tuple(new_ids[:count])
    sequence.token_ids += token_ids
    for processor in sequence.processors:
        processor.commit(token_ids)
    num_computed = sequence.num_computed_tokens + len(path)
    sequence.num_computed_tokens = min(num_computed, len(sequence.token_ids) - 1)
    return Outcome(entry, landed, token_ids, tuple(depths[:count]), reason)
