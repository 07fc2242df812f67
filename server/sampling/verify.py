"""Accepts draft tokens: ties a step's logits to the acceptance rules.

Shapes: S rows of logits of the step, X accepted rows of one entry, V vocabulary.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from heads.acceptance import AcceptedPaths
from heads.candidates import TreeBatch
from server.core.request import TokenLogprob
from server.core.step import StepEntry, Verdict
from server.sampling.acceptance import RULES
from server.sampling.sampler import TargetSampler


def verify(logits_SV: Tensor, entries: Seq[StepEntry], first_rows: Seq[int]) -> list[Verdict]:
    """Verify the drafts of every entry by its own rule.

    Args:
        logits_SV: Logits at all nodes of all entries.
        entries: The verified entries of a step.
        first_rows: Row of each entry's root.
    """
    verdicts: dict[int, Verdict] = {}
    for name, rule in RULES.items():
        group = [i for i, entry in enumerate(entries) if entry.sequence.acceptance == name]
        if not group:
            continue
        members = [entries[i] for i in group]
        sampler = TargetSampler(logits_SV, members, [first_rows[i] for i in group])
        trees = TreeBatch.from_drafts([entry.drafts for entry in members], logits_SV.device)
        accepted = rule.accept(trees, sampler)
        verdicts.update(zip(group, _verdicts(accepted), strict=True))
    return [verdicts[i] for i in range(len(entries))]


def _verdicts(accepted: AcceptedPaths) -> list[Verdict]:
    return [
        Verdict(tuple(path[:length]), bonus)
        for path, length, bonus in zip(
            accepted.node_ids_BD.tolist(),
            accepted.num_nodes_B.tolist(),
            accepted.bonus_B.tolist(),
            strict=True,
        )
    ]


def token_logprobs(
    logits_SV: Tensor, entry: StepEntry, first_row: int, verdict: Verdict
) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities of an entry's new tokens under the model's raw distribution.

    Args:
        logits_SV: Logits at all nodes of all entries.
        entry: Its request says how many of the most probable tokens are reported.
        first_row: Row of the entry's root.
        verdict: What was accepted.

    Returns:
        One entry for each accepted draft token and the bonus token; None if the request asks for
        none.
    """
    num_top = entry.sequence.request.sampling.logprobs
    if num_top is None:
        return None
    token_ids = [*(entry.drafts.token_ids[node] for node in verdict.path[1:]), verdict.bonus_token]
    rows = [first_row + node for node in verdict.path]
    log_probs_XV = logits_SV[rows].float().log_softmax(-1)
    drawn_X1 = log_probs_XV.gather(1, torch.tensor(token_ids, device=logits_SV.device)[:, None])
    top = log_probs_XV.topk(num_top, dim=-1)
    return tuple(
        TokenLogprob(token_id, logprob[0], tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in zip(
            token_ids, drawn_X1.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    )
