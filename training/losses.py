"""The Medusa-1 loss: every head's cross-entropy over the draft vocabulary, backbone frozen.

Source: Medusa, arXiv:2401.10774, 2.2.1: head k (from 0) weighs decay ** k.

Shape suffixes: N examples, D model width, K draft heads, U draft vocabulary, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.medusa import MedusaHeads
from training.examples import NO_LABEL, Examples


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


@dataclass(frozen=True, slots=True, eq=False)
class MedusaLoss:
    """Loss of a batch.

    Attributes:
        total: Scalar with gradient: the weighted sum of the heads' losses.
        per_head_K: Float32, detached: mean cross-entropy in nats of each head over its labels;
            0.0 for a head without labels.
    """

    total: Tensor
    per_head_K: Tensor


class MedusaObjective:
    """Computes the loss of heads in a given compute dtype.

    Args:
        heads: Their draft vocabulary must not change any more; labels outside of it count for
            nothing.
        decay: Weight of a head relative to the one before it.
        compute_dtype: Of the matrix products; the weights keep theirs.
    """

    def __init__(self, heads: MedusaHeads, decay: float, compute_dtype: torch.dtype) -> None:
        self._heads = heads
        self._decay = decay
        self._dtype = compute_dtype
        self._rows_UD = heads.draft_rows_UD.to(compute_dtype)
        ids_U = heads.draft_vocab_ids
        # One more entry, so that `NO_LABEL` can be looked up too.
        index_V = ids_U.new_full((heads.config.vocab_size + 1,), NO_LABEL)
        index_V[ids_U] = torch.arange(len(ids_U), device=ids_U.device)
        self._index_V = index_V

    def __call__(self, examples: Examples) -> MedusaLoss:
        """Compute the loss of a batch on the heads' device."""
        device_type = self._index_V.device.type
        is_mixed = self._dtype != torch.float32
        with torch.autocast(device_type, self._dtype, enabled=is_mixed):
            head_hidden_KND = self._heads(examples.hidden_ND, examples.roots_N)
        labels_KN = self._index_V[examples.labels_NK.clamp(min=-1)].T
        losses = [
            frozen_cross_entropy(hidden_ND.to(self._dtype), self._rows_UD, labels_N)
            / (labels_N >= 0).sum().clamp(min=1)
            for hidden_ND, labels_N in zip(head_hidden_KND, labels_KN, strict=True)
        ]
        per_head_K = torch.stack(losses)
        weights_K = self._decay ** torch.arange(len(losses), device=per_head_K.device)
        return MedusaLoss((weights_K * per_head_K).sum(), per_head_K.detach())
