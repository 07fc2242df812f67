"""The loss of drafts over a draft vocabulary, behind an unembedding that is frozen.

Hard labels are the tokens that the base model drew. Soft ones are the distributions that it drew
them from, restricted to the draft vocabulary and scaled up to 1, at the same positions. So nothing
outside of the draft vocabulary is ever computed, and the missing mass counts all the same: a
position has a label in the draft vocabulary as often as its distribution has mass there.

Shape suffixes: N examples, D model width, U draft vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _FrozenCrossEntropy(torch.autograd.Function):
    """Cross-entropy behind an unembedding that gets no gradient.

    The gradient by the hidden state is known as soon as the loss is, so it is all that is kept:
    no logits wait for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, rows_UD: Tensor, labels_N: Tensor) -> Tensor:
        log_probs_NU = F.linear(hidden_ND, rows_UD).float().log_softmax(dim=1)
        is_labelled_N1 = (labels_N >= 0).unsqueeze(1)
        index_N1 = labels_N.clamp(min=0).unsqueeze(1)
        loss_N1 = -log_probs_NU.gather(1, index_N1)
        if ctx.needs_input_grad[0]:
            gradient_NU = log_probs_NU.exp_()
            gradient_NU.scatter_add_(1, index_N1, gradient_NU.new_full(index_N1.shape, -1.0))
            gradient_NU.mul_(is_labelled_N1)
            ctx.save_for_backward(gradient_NU.to(rows_UD.dtype) @ rows_UD)
        return (loss_N1 * is_labelled_N1).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0].to(gradient_ND.dtype), None, None


def frozen_cross_entropy(hidden_ND: Tensor, rows_UD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum the cross-entropy of `hidden_ND @ rows_UD.T` over the labelled rows, in float32.

    Args:
        hidden_ND: In the dtype of `rows_UD`; gets the gradient.
        rows_UD: Frozen.
        labels_N: Int64 row of `rows_UD`, or a negative number for no label.
    """
    loss: Tensor = _FrozenCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, rows_UD, labels_N
    )
    return loss


class _FrozenMixture(torch.autograd.Function):
    """Hard and soft labels mixed; otherwise the same as `_FrozenCrossEntropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        rows_UD: Tensor,
        labels_N: Tensor,
        soft_NU: Tensor,
        kl_weight: float,
    ) -> Tensor:
        log_probs_NU = F.linear(hidden_ND, rows_UD).float().log_softmax(dim=1)
        is_labelled_N1 = (labels_N >= 0).unsqueeze(1)
        index_N1 = labels_N.clamp(min=0).unsqueeze(1)
        soft_probs_NU = soft_NU.exp()
        divergence_N1 = (soft_probs_NU * (soft_NU - log_probs_NU)).sum(dim=1, keepdim=True)
        hard = 1.0 - kl_weight
        loss_N1 = kl_weight * divergence_N1 - hard * log_probs_NU.gather(1, index_N1)
        if ctx.needs_input_grad[0]:
            gradient_NU = log_probs_NU.exp_().sub_(soft_probs_NU, alpha=kl_weight)
            gradient_NU.scatter_add_(1, index_N1, gradient_NU.new_full(index_N1.shape, -hard))
            gradient_NU.mul_(is_labelled_N1)
            ctx.save_for_backward(gradient_NU.to(rows_UD.dtype) @ rows_UD)
        return (loss_N1 * is_labelled_N1).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0].to(gradient_ND.dtype), None, None, None, None


class DraftLoss:
    """The loss of drafts behind the frozen rows of their draft vocabulary.

    Args:
        rows_UD: Rows of the base model's unembedding, one for each token that can be drafted.
        compute_dtype: Type of the matrix products.
        kl_weight: W in [0, 1]: (1 - W) * cross-entropy with the label + W * KL(base || draft).
    """

    def __init__(self, rows_UD: Tensor, compute_dtype: torch.dtype, kl_weight: float) -> None:
        self._rows_UD = rows_UD.to(compute_dtype)
        self._kl_weight = kl_weight

    @property
    def is_soft(self) -> bool:
        """Whether the base model's distributions count."""
        return self._kl_weight > 0.0

    @torch.no_grad()
    def soft_labels(self, states_ND: Tensor) -> Tensor:
        """Return the base model's log-probs NU, float32, from its own hidden states."""
        logits_NU = F.linear(states_ND.to(self._rows_UD.dtype), self._rows_UD)
        return logits_NU.float().log_softmax(dim=1)

    def __call__(self, states_ND: Tensor, labels_N: Tensor, soft_NU: Tensor | None) -> Tensor:
        """Sum the loss over the labelled rows, in float32.

        Args:
            states_ND: Hidden states of the drafts; they get the gradient.
            labels_N: Int64 row of the draft vocabulary, or a negative number for no label.
            soft_NU: Log-probs of the base model; None if they do not count.
        """
        states_ND = states_ND.to(self._rows_UD.dtype)
        if soft_NU is None:
            return frozen_cross_entropy(states_ND, self._rows_UD, labels_N)
        loss: Tensor = _FrozenMixture.apply(  # type: ignore[no-untyped-call]
            states_ND, self._rows_UD, labels_N, soft_NU, self._kl_weight
        )
        return loss
