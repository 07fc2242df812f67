"""Logit bias: numbers that a request adds to the logits of single tokens.

Shapes: V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.core.processor import LogitProcessor
from server.sampling.processors.making import ProcessorContext


class LogitBias(LogitProcessor):
    """Adds the same numbers at every position."""

    restricts = False

    def __init__(self, bias: Mapping[int, float], device: torch.device) -> None:
        self._ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def apply(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        """Add the bias; the path does not matter."""
        return logits_V.index_add(0, self._ids, self._bias)

    def allows(self, path: Sequence[int], token_id: int) -> bool:
        """A bias denies nothing."""
        return True

    def commit(self, token_ids: Sequence[int]) -> None:
        """A bias has no state."""


def make_bias(context: ProcessorContext) -> LogitBias | None:
    """The bias of a request, if it has any."""
    bias = context.request.sampling.logit_bias
    return LogitBias(bias, context.device) if bias else None
