"""Repetition, frequency and presence penalties.

Shapes: V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.config import SamplingParams
from server.core.processor import LogitProcessor
from server.sampling.processors.making import ProcessorContext


class Penalties(LogitProcessor):
    """Lowers the logits of tokens that the text already has.

    The repetition penalty comes first and counts the prompt too; frequency and presence penalties
    count generated tokens alone.
    """

    restricts = False

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._params = params
        self._counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._prompt_seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._prompt_seen_V[torch.tensor(prompt_token_ids, device=device)] = True

    def apply(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        """Penalise the tokens of the text and of the path."""
        params = self._params
        counts_V = self._counts_V
        if path:
            counts_V = counts_V.clone()
            _add(counts_V, path)
        seen_V = counts_V > 0
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(seen_V | self._prompt_seen_V, penalised_V, logits_V)
        logits_V = logits_V - params.frequency_penalty * counts_V
        return logits_V - params.presence_penalty * seen_V.float()

    def allows(self, path: Sequence[int], token_id: int) -> bool:
        """Penalties deny nothing."""
        return True

    def commit(self, token_ids: Sequence[int]) -> None:
        """Count generated tokens."""
        _add(self._counts_V, token_ids)


def make_penalties(context: ProcessorContext) -> Penalties | None:
    """The penalties of a request, if it has any."""
    sampling = context.request.sampling
    if not sampling.has_penalties:
        return None
    prompt = context.request.prompt_token_ids
    return Penalties(sampling, prompt, context.vocab_size, context.device)


def _add(counts_V: Tensor, token_ids: Sequence[int]) -> None:
    if token_ids:
        ids = torch.tensor(token_ids, device=counts_V.device)
        counts_V.index_add_(0, ids, torch.ones(len(ids), device=counts_V.device))
