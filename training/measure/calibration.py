"""Whether heads know how sure they can be: draft probabilities against how often they were right.

Unconditional: a head's candidates count at every position, whether or not a tree would have got
that deep. Only the first `NUM_RANKS` candidates of each head count; the rest are hardly drafted.

Shape suffixes: N examples, U draft vocabulary, C bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 20
NUM_RANKS = 4


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Candidates whose draft probability lay in one interval of width 1 / `NUM_BINS`.

    Attributes:
        num_candidates: How many there were.
        mean_confidence: Mean draft probability; 0.0 without candidates.
        accept_rate: Share of the candidates that were the token drawn.
    """

    num_candidates: int
    mean_confidence: float
    accept_rate: float


class CalibrationCounter:
    """Adds up candidates by depth and bin.

    Args:
        num_heads: Depths that are counted apart.
    """

    def __init__(self, num_heads: int) -> None:
        # Rows: candidates, their probabilities, hits.
        self._sums_KXC = torch.zeros(num_heads, 3, NUM_BINS, dtype=torch.float64)

    def add(self, head: int, logits_NU: Tensor, drawn_N: Tensor, is_labelled_N: Tensor) -> None:
        """Count a head's candidates at N positions.

        Args:
            head: Which head, counted from 0.
            logits_NU: The head's logits of everything that it can draft there.
            drawn_N: Index into U of the token drawn, or -1 if the head cannot draft it.
            is_labelled_N: False where the answer has ended before.
        """
        num_ranks = min(NUM_RANKS, logits_NU.shape[1])
        top = logits_NU[is_labelled_N].float().softmax(dim=1).topk(num_ranks)
        confidence = top.values.double().flatten().cpu()
        is_hit = (top.indices == drawn_N[is_labelled_N].unsqueeze(1)).double().flatten().cpu()
        bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        for row, values in enumerate((torch.ones_like(confidence), confidence, is_hit)):
            self._sums_KXC[head, row].index_add_(0, bins, values)

    def result(self) -> tuple[tuple[CalibrationBin, ...], ...]:
        """Return the bins of every head, by rising confidence."""
        return tuple(
            tuple(
                CalibrationBin(int(num), total / max(1.0, num), hits / max(1.0, num))
                for num, total, hits in zip(*sums_XC.tolist(), strict=True)
            )
            for sums_XC in self._sums_KXC
        )
