"""Which rank draft heads give the tokens that the target model really drew.

Shape suffixes: N examples, K depths, U draft vocabulary, R ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.dataset import NO_LABEL, Corpus, Document, document_labels, draft_vocab_index
from training.measure.calibration import CalibrationCounter
from training.measure.drafts import Drafts

# No candidate of any tree: the token is not drafted at all, or the answer ends before it.
UNRANKED = -1
_DOCUMENTS_AT_ONCE = 64
# As many as the server's dynamic trees choose from.
_NUM_CALIBRATED_RANKS = 8


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    """The ranks that heads give the tokens of one answer.

    Attributes:
        ranks: Entry [i][k] is the rank, from 0, that depth k gives the token k + 1 places after the
            answer's token i, drafted when token i is the root; or `UNRANKED`.
        num_tokens: Tokens of the answer; one more than there are entries.
        confidences_NKR: Draft probabilities of the first ranks, falling; None if not known.
    """

    category: str
    ranks: list[list[int]]
    num_tokens: int
    confidences_NKR: Tensor | None = None


@torch.no_grad()
def rank_answers(
    corpus: Corpus,
    drafts: Drafts,
    calibration: CalibrationCounter,
    on_documents: Callable[[int], None],
) -> list[RankedAnswer]:
    """Rank every token of every answer.

    Args:
        corpus: Answers of the base model that the heads belong to.
        drafts: What the heads draft.
        calibration: Counts the heads' candidates on the way.
        on_documents: Called with the number of documents after each group.
    """
    answers: list[RankedAnswer] = []
    for start in range(0, len(corpus.documents), _DOCUMENTS_AT_ONCE):
        documents = corpus.documents[start : start + _DOCUMENTS_AT_ONCE]
        for document, states_KND in zip(documents, drafts.states(documents), strict=True):
            answers += _rank_document(document, states_KND, drafts, calibration)
        on_documents(len(documents))
    return answers


def _rank_document(
    document: Document, states_KND: Tensor, drafts: Drafts, calibration: CalibrationCounter
) -> list[RankedAnswer]:
    labels_NK = document_labels(document, drafts.num_depths).to(states_KND.device)
    answers, first = [], 0
    for span in document.spans:
        rows = slice(first, first + span.num_examples)
        prompt = document.token_ids_T[: span.start].tolist()
        ranks_NK, confidences_NKR = _ranks(
            states_KND[:, rows], labels_NK[rows], drafts, prompt, calibration
        )
        num_tokens = span.end - span.start
        answers.append(
            RankedAnswer(document.category, ranks_NK.tolist(), num_tokens, confidences_NKR)
        )
        first = rows.stop
    return answers


def _ranks(
    states_KND: Tensor,
    labels_NK: Tensor,
    drafts: Drafts,
    prompt: Sequence[int],
    calibration: CalibrationCounter,
) -> tuple[Tensor, Tensor]:
    """Rank among the draft vocabulary and the prompt's tokens, as the engine orders them.

    Returns:
        Ranks NK, and on the CPU the draft probabilities NKR of the first ranks.
    """
    token_ids_U = drafts.draft_vocab_ids
    seen = drafts.seen_rows(prompt)
    if seen is not None:
        token_ids_U = torch.cat((token_ids_U, seen.token_ids_E))
    index_V = draft_vocab_index(token_ids_U, drafts.vocab_size)
    index_NK = index_V[labels_NK.clamp(min=-1)]
    ranks_NK = torch.full_like(index_NK, UNRANKED)
    confidences: list[Tensor] = []
    for depth, states_ND in enumerate(states_KND):
        logits_NU = F.linear(states_ND, drafts.draft_rows(depth))
        if seen is not None:
            logits_NU = torch.cat((logits_NU, F.linear(states_ND, seen.rows_ED)), dim=1)
        index_N1 = index_NK[:, depth : depth + 1]
        drawn_N1 = logits_NU.gather(1, index_N1.clamp(min=0))
        ranks_N = (logits_NU > drawn_N1).sum(dim=1)
        ranks_NK[:, depth] = torch.where(index_N1[:, 0] >= 0, ranks_N, UNRANKED)
        calibration.add(depth, logits_NU, index_N1[:, 0], labels_NK[:, depth] != NO_LABEL)
        top_NR = logits_NU.topk(min(_NUM_CALIBRATED_RANKS, logits_NU.shape[1])).values.float()
        confidences.append((top_NR - logits_NU.float().logsumexp(dim=1, keepdim=True)).exp().cpu())
    return ranks_NK, torch.stack(confidences, dim=1)
