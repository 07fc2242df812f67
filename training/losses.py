"""The Medusa-1 loss: every head's cross-entropy over the draft vocabulary, backbone frozen.

Source: Medusa, arXiv:2401.10774, 2.2.1; the trainer weighs head k (from 0) by decay ** k.

Shape suffixes: N examples, D model width, K draft heads, U draft vocabulary, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.medusa import MedusaHeads
from training.examples import NO_LABEL, Examples
from training.objective import ParameterGroup


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


def draft_vocab_index(draft_vocab_ids: Tensor, vocab_size: int) -> Tensor:
    """Return for each token its place in the draft vocabulary, int64 [V + 1].

    `NO_LABEL` for tokens outside of it. The last entry too, so that -1 can be looked up.
    """
    index_V = draft_vocab_ids.new_full((vocab_size + 1,), NO_LABEL)
    index_V[draft_vocab_ids] = torch.arange(len(draft_vocab_ids), device=draft_vocab_ids.device)
    return index_V


def medusa_groups(heads: MedusaHeads, root_rate_factor: float) -> tuple[ParameterGroup, ...]:
    """Split the heads' parameters: the maps of the root embedding have a factor of their own."""
    others: list[nn.Parameter] = []
    roots: list[nn.Parameter] = []
    for name, parameter in heads.named_parameters():
        (roots if name == "root_weights" else others).append(parameter)
    groups = (ParameterGroup(tuple(others)), ParameterGroup(tuple(roots), root_rate_factor))
    return tuple(group for group in groups if group.parameters)


class MedusaObjective:
    """Computes the losses of heads in a given compute dtype.

    Args:
        heads: Their draft vocabulary must not change any more; labels outside of it count for
            nothing.
        compute_dtype: Of the matrix products; the weights keep theirs.
    """

    def __init__(self, heads: MedusaHeads, compute_dtype: torch.dtype) -> None:
        self._heads = heads
        self._dtype = compute_dtype
        self._rows_UD = heads.draft_rows_UD.to(compute_dtype)
        self._index_V = draft_vocab_index(heads.draft_vocab_ids, heads.config.vocab_size)

    def num_labels(self, examples: Examples) -> Tensor:
        """Count each head's labels in the draft vocabulary, int64 K."""
        return (self._labels(examples) >= 0).sum(dim=1)

    def __call__(self, examples: Examples) -> Tensor:
        """Sum each head's cross-entropy, K, on the heads' device."""
        device_type = self._index_V.device.type
        is_mixed = self._dtype != torch.float32
        with torch.autocast(device_type, self._dtype, enabled=is_mixed):
            head_hidden_KND = self._heads(examples.hidden_ND, examples.roots_N)
        losses = [
            frozen_cross_entropy(hidden_ND.to(self._dtype), self._rows_UD, labels_N)
            for hidden_ND, labels_N in zip(head_hidden_KND, self._labels(examples), strict=True)
        ]
        return torch.stack(losses)

    def _labels(self, examples: Examples) -> Tensor:
        return self._index_V[examples.labels_NK.clamp(min=-1)].T
