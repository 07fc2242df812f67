"""How far the adapted base model is from itself without the adapter: KL over the whole vocabulary.

Shape suffixes: N tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits of so many tokens are in memory together.
_ROWS_AT_ONCE = 256


class _FrozenDivergence(torch.autograd.Function):
    """KL behind an unembedding that gets no gradient; keeps the gradient instead of the logits."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, teacher_hidden_ND: Tensor, rows_VD: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        gradient_ND = torch.zeros_like(hidden_ND)
        for start in range(0, len(hidden_ND), _ROWS_AT_ONCE):
            chunk = slice(start, start + _ROWS_AT_ONCE)
            ours_NV = F.linear(hidden_ND[chunk], rows_VD).float().log_softmax(dim=1)
            theirs_NV = F.linear(teacher_hidden_ND[chunk], rows_VD).float().log_softmax(dim=1)
            total += F.kl_div(ours_NV, theirs_NV, reduction="sum", log_target=True)
            if ctx.needs_input_grad[0]:
                difference_NV = ours_NV.exp_().sub_(theirs_NV.exp_())
                gradient_ND[chunk] = difference_NV.to(rows_VD.dtype) @ rows_VD
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0].to(gradient_ND.dtype), None, None


def frozen_divergence(hidden_ND: Tensor, teacher_hidden_ND: Tensor, rows_VD: Tensor) -> Tensor:
    """Sum KL(teacher || ours) of the next token over all rows, in nats, in float32.

    Args:
        hidden_ND: Last hidden states, which get the gradient.
        teacher_hidden_ND: The teacher's states at the same positions, which get none.
        rows_VD: Frozen unembedding of both, in the dtype of the hidden states.
    """
    total: Tensor = _FrozenDivergence.apply(  # type: ignore[no-untyped-call]
        hidden_ND, teacher_hidden_ND, rows_VD
    )
    return total
