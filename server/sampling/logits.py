"""From processed logits to the target distribution a request asked for, and to drawn tokens.

Order: logit processors (`server.sampling.processors`), temperature, top-k, top-p, min-p. Every row
is computed on its own, so a row's distribution does not depend on its neighbours.

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
