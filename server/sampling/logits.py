"""From the model's logits to the target distribution a request asked for.

Order: repetition penalty, frequency and presence penalty, logit bias, temperature, top-k, top-p,
min-p. Every row is computed on its own, so a row's distribution does not depend on its neighbours.

Shapes: X rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.config import SamplingParams

# A nucleus mostly lies within this many tokens; only other rows are sorted in full.
_NUCLEUS_GUESS = 256
# Division by less could overflow float32; long before, only the most probable token is left.
_MIN_TEMPERATURE = 1e-30


class LogitAdjuster:
    """Penalties and bias of one sequence, which depend on the tokens before the position."""

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
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(
            list(params.logit_bias.values()), dtype=torch.float32, device=device
        )

    def append(self, token_ids: Sequence[int]) -> None:
        """Count generated tokens."""
        self._add(self._counts_V, token_ids)

    def apply(self, logits_V: Tensor, path_token_ids: Sequence[int]) -> Tensor:
        """Adjust one row.

        Args:
            logits_V: Float32; not modified.
            path_token_ids: Draft tokens on the way to the position, beyond those counted.
        """
        params = self._params
        if params.has_penalties:
            counts_V = self._counts_V.clone() if path_token_ids else self._counts_V
            self._add(counts_V, path_token_ids)
            seen_V = counts_V > 0
            if params.repetition_penalty != 1.0:
                penalty = params.repetition_penalty
                penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
                logits_V = torch.where(seen_V | self._prompt_seen_V, penalised_V, logits_V)
            logits_V = logits_V - params.frequency_penalty * counts_V
            logits_V = logits_V - params.presence_penalty * seen_V.float()
        if params.logit_bias:
            logits_V = logits_V.index_add(0, self._bias_ids, self._bias)
        return logits_V

    @staticmethod
    def _add(counts_V: Tensor, token_ids: Sequence[int]) -> None:
        if token_ids:
            ids = torch.tensor(token_ids, device=counts_V.device)
            counts_V.index_add_(0, ids, torch.ones(len(ids), device=counts_V.device))


def make_adjuster(
    params: SamplingParams, prompt_token_ids: Sequence[int], vocab_size: int, device: torch.device
) -> LogitAdjuster | None:
    """The adjuster of a sequence, or None where the request asks for no adjustment."""
    if params.has_penalties or params.logit_bias:
        return LogitAdjuster(params, prompt_token_ids, vocab_size, device)
    return None


def filter_logits(logits_XV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply temperature, top-k, top-p and min-p, each row with its own parameters.

    Args:
        logits_XV: Float32; not modified.
        params: One entry per row. A greedy row keeps its logits as they are.

    Returns:
        Logits whose softmax is the target distribution; removed tokens have -inf.
    """
    temperatures = [1.0 if p.is_greedy else max(p.temperature, _MIN_TEMPERATURE) for p in params]
    scaled_XV = logits_XV / torch.tensor(temperatures, device=logits_XV.device)[:, None]
    for row, row_params in enumerate(params):
        if not row_params.is_greedy:
            scaled_XV[row] = _filter_row(scaled_XV[row], row_params)
    return scaled_XV


def _filter_row(logits_V: Tensor, params: SamplingParams) -> Tensor:
    floor: Tensor | None = None
    if 0 < params.top_k < logits_V.shape[0]:
        floor = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, float("-inf"))
    if params.top_p < 1.0:
        logits_V = logits_V.masked_fill(
            logits_V < _nucleus_floor(logits_V, params.top_p), float("-inf")
        )
    if params.min_p > 0.0:
        floor = logits_V.max() + torch.tensor(params.min_p).log().to(logits_V.device)
        logits_V = logits_V.masked_fill(logits_V < floor, float("-inf"))
    return logits_V


def _nucleus_floor(logits_V: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the smallest set of most probable tokens with mass >= top_p."""
    log_total = logits_V.double().logsumexp(0)
    for size in (min(_NUCLEUS_GUESS, logits_V.shape[0]), logits_V.shape[0]):
        top = logits_V.topk(size).values
        mass = (top.double() - log_total).exp().cumsum(0)
        inside = int((mass < top_p).sum())
        if inside < size:
            return top[inside]
    return top[-1]


def draw_tokens(logits_XV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draw one token a row by inverse CDF over token ids.

    Args:
        logits_XV: What `filter_logits` returned.
        uniforms: One number in [0, 1) per row.

    Returns:
        Int64 token ids [X]; never one of probability zero.
    """
    cdf_XV = logits_XV.double().softmax(-1).cumsum(-1)
    total_X1 = cdf_XV[:, -1:].contiguous()
    uniforms_X1 = torch.tensor(uniforms, dtype=torch.float64, device=cdf_XV.device)[:, None]
    drawn_X1 = torch.searchsorted(cdf_XV, uniforms_X1 * total_X1, right=True)
    # Rounding may carry the product up to the total: then take the last possible token.
    last_X1 = torch.searchsorted(cdf_XV, total_X1)
    drawn_X = torch.minimum(drawn_X1, last_X1).squeeze(1)
    # NOTE: a row of NaN sorts nothing; an id beyond the vocabulary would stop the whole engine.
    return drawn_X.clamp(max=logits_XV.shape[1] - 1)
