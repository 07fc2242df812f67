"""Commits a verdict's tokens to a sequence: stops, text, counts and what the client sees.

Tokens after the one that ends a request are dropped here, before anything is counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from server.core.request import FinishReason, RequestOutput, TokenLogprob
from server.core.step import StepEntry
from server.sampling.verify import Verdict


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens that a step commits to a sequence.

    Attributes:
        token_ids: Accepted draft tokens, then the bonus token, up to the end of the request.
        depths: Their depths in the draft tree; 0 for the bonus token.
        texts: Each token's own piece of text.
        finish_reason: Why the request ends here, or None.
    """

    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    texts: tuple[str, ...]
    finish_reason: FinishReason | None


def emit(
    item: StepEntry, verdict: Verdict, eos_token_ids: frozenset[int], max_len: int
) -> Emission:
    """Append a verdict's tokens to the sequence and its text until a stop condition holds."""
    sequence, tree = item.sequence, item.drafts.tree
    sampling = sequence.request.sampling
    proposed = [(item.drafts.token_ids[node], tree.depths[node]) for node in verdict.path[1:]]
    proposed.append((verdict.bonus_token, 0))
    tokens: list[int] = []
    depths: list[int] = []
    texts: list[str] = []
    reason: FinishReason | None = None
    for token_id, depth in proposed:
        sequence.token_ids.append(token_id)
        tokens.append(token_id)
        depths.append(depth)
        if token_id in eos_token_ids and not sampling.ignore_eos:
            texts.append("")
            reason = "stop"
            break
        texts.append(sequence.text.add(token_id))
        if sequence.text.is_stopped:
            reason = "stop"
            break
        if sequence.num_output_tokens >= sampling.max_tokens or len(sequence.token_ids) >= max_len:
            reason = "length"
            break
    if sequence.adjuster is not None:
        sequence.adjuster.append(tokens)
    if item.is_decoding:
        sequence.counters.count_step(tree.num_nodes - 1, tuple(depths))
        if sequence.request.prediction_token_ids:
            num_accepted = sum(depth > 0 for depth in depths)
            sequence.counters.count_prediction(item.drafts, verdict.path[1 : 1 + num_accepted])
    if reason is not None:
        sequence.text.finish()
        if sequence.text.is_stopped:
            reason = "stop"
    return Emission(tuple(tokens), tuple(depths), tuple(texts), reason)


def token_logprobs(
    logits_NV: Tensor, verdict: Verdict, emission: Emission, num_top: int
) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the emitted tokens under the model's raw distribution.

    Args:
        logits_NV: Logits at the nodes of the sequence's tree.
        verdict: Its path leads to the emitted tokens.
        emission: Its tokens follow the path's nodes, one by one.
        num_top: Most probable tokens to report at each position.
    """
    nodes = list(verdict.path[: len(emission.token_ids)])
    log_probs_XV = logits_NV[nodes].float().log_softmax(-1)
    token_ids_X1 = torch.tensor(emission.token_ids, device=logits_NV.device)[:, None]
    drawn_X1 = log_probs_XV.gather(1, token_ids_X1)
    top = log_probs_XV.topk(num_top, dim=-1)
    return tuple(
        TokenLogprob(token_id, logprob[0], tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in zip(
            emission.token_ids,
            drawn_X1.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    )


def request_output(
    item: StepEntry, emission: Emission, logprobs: tuple[TokenLogprob, ...] | None
) -> RequestOutput:
    """What the client gets of a step; the last step's has the request's counts."""
    sequence = item.sequence
    return RequestOutput(
        request_id=sequence.request.request_id,
        token_ids=emission.token_ids,
        depths=emission.depths,
        text=sequence.text.take(),
        token_texts=emission.texts,
        logprobs=logprobs,
        is_verify_step=item.is_decoding,
        finish_reason=emission.finish_reason,
        stats=None if emission.finish_reason is None else sequence.stats(),
    )
