"""Tokens of a request's own prompt as candidates in addition to the draft vocabulary.

A draft vocabulary holds the tokens that answers use most; what it lacks and the prompt has (names,
numbers, code) is drafted from rows of the base model's unembedding, gathered once per request.

Shape suffixes: B sequences, K drafting states of a sequence, D model width, R top-k ranks,
V vocabulary, U draft vocabulary, E tokens seen in a prompt outside the draft vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.candidates import PAD_TOKEN, Candidates

MAX_SEEN_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SeenRows:
    """Unembedding rows of a prompt's tokens that are outside the draft vocabulary.

    Attributes:
        token_ids_E: Int64, without repetition.
        rows_ED: Unembedding row of each of them.
    """

    token_ids_E: Tensor
    rows_ED: Tensor

    def to(self, dtype: torch.dtype) -> "SeenRows":
        """Return the same with rows of another dtype."""
        return SeenRows(self.token_ids_E, self.rows_ED.to(dtype))


def gather_seen_rows(
    prompt_token_ids: Sequence[int], draft_vocab: Collection[int], unembedding_VD: Tensor
) -> SeenRows | None:
    """Copy the rows of a prompt's tokens that cannot be drafted otherwise.

    Returns:
        At most `MAX_SEEN_ROWS` tokens, the most recent ones of the prompt; None if the whole
        prompt is in the draft vocabulary.
    """
    recent_first = dict.fromkeys(reversed(prompt_token_ids))
    token_ids = [token for token in recent_first if token not in draft_vocab]
    if not token_ids:
        return None
    token_ids_E = torch.tensor(token_ids[:MAX_SEEN_ROWS], device=unembedding_VD.device)
    return SeenRows(token_ids_E, unembedding_VD.index_select(0, token_ids_E))


def top_candidates(
    states_BKD: Tensor,
    logits_BKU: Tensor,
    draft_vocab_ids_U: Tensor,
    num_ranks: int,
    seen: Sequence[SeenRows | None],
) -> Candidates:
    """Rank the draft vocabulary and each sequence's seen tokens together.

    Args:
        states_BKD: States that the logits were computed from.
        logits_BKU: Logits over the draft vocabulary.
        draft_vocab_ids_U: Int64 token of each column.
        num_ranks: Candidates per state; padded where there are fewer tokens to draft.
        seen: For each sequence the rows of its prompt, or None.
    """
    num_seen = max(0 if rows is None else len(rows.token_ids_E) for rows in seen)
    num_extra = max(num_seen, num_ranks - logits_BKU.shape[2])
    if num_extra == 0:
        log_probs_BKR, indices_BKR = logits_BKU.float().log_softmax(dim=2).topk(num_ranks)
        return Candidates(draft_vocab_ids_U[indices_BKR], log_probs_BKR)
    extra = _extra_candidates(states_BKD, seen, num_extra)
    logits_BKX = torch.cat((logits_BKU, extra.logits_BKE), dim=2)
    log_probs_BKR, indices_BKR = logits_BKX.float().log_softmax(dim=2).topk(num_ranks)
    drafted_BU = draft_vocab_ids_U.expand(len(seen), -1)
    token_ids_BX = torch.cat((drafted_BU, extra.token_ids_BE), dim=1)
    token_ids_BKR = token_ids_BX.gather(1, indices_BKR.flatten(1)).view_as(indices_BKR)
    return Candidates(token_ids_BKR, log_probs_BKR)


@dataclass(frozen=True, slots=True, eq=False)
class _ExtraCandidates:
    """The seen tokens of a batch, padded with -1 and logits of -inf."""

    token_ids_BE: Tensor
    logits_BKE: Tensor


def _extra_candidates(
    states_BKD: Tensor, seen: Sequence[SeenRows | None], num_extra: int
) -> _ExtraCandidates:
    shape = states_BKD.shape[:2]
    logits_BKE = states_BKD.new_full((*shape, num_extra), -math.inf)
    token_ids_BE = torch.full(
        (shape[0], num_extra), PAD_TOKEN, dtype=torch.int64, device=states_BKD.device
    )
    for sequence, rows in enumerate(seen):
        if rows is not None:
            num_rows = len(rows.token_ids_E)
            logits_BKE[sequence, :, :num_rows] = F.linear(states_BKD[sequence], rows.rows_ED)
            token_ids_BE[sequence, :num_rows] = rows.token_ids_E
    return _ExtraCandidates(token_ids_BE, logits_BKE)
