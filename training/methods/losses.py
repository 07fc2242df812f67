"""The Medusa-1 loss: every head's loss over the draft vocabulary, backbone frozen.

Source: Medusa, arXiv:2401.10774, 2.2.1; the trainer weighs head k (from 0) by decay ** k.

Hard labels are the tokens that the base model drew. Soft ones are the distributions that it drew
them from, restricted to the draft vocabulary and scaled up to 1, at the same positions. So nothing
outside of the draft vocabulary is ever computed, and the missing mass counts all the same: a
position has a label in the draft vocabulary as often as its distribution has mass there.

Shape suffixes: N examples, D model width, K draft heads, U draft vocabulary, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.medusa import MedusaHeads
from training.loop.objective import ParameterGroup
from training.states.examples import NO_LABEL, Examples


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
    """Hard and soft labels mixed, as `_FrozenCrossEntropy` else."""

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
        rows_UD: Of the base model's unembedding.
        compute_dtype: Of the products.
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
            states_ND: Get the gradient.
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
        kl_weight: As `DraftLoss` takes it.
    """

    def __init__(
        self, heads: MedusaHeads, compute_dtype: torch.dtype, kl_weight: float = 0.0
    ) -> None:
        self._heads = heads
        self._dtype = compute_dtype
        self._loss = DraftLoss(heads.draft_rows_UD, compute_dtype, kl_weight)
        self._index_V = draft_vocab_index(heads.draft_vocab_ids, heads.config.vocab_size)

    def num_labels(self, examples: Examples) -> Tensor:
        """Count each head's labels in the draft vocabulary, int64 K."""
        return (self._labels(examples) >= 0).sum(dim=1)

    def __call__(self, examples: Examples) -> Tensor:
        """Sum each head's loss, K, on the heads' device."""
        device_type = self._index_V.device.type
        is_mixed = self._dtype != torch.float32
        with torch.autocast(device_type, self._dtype, enabled=is_mixed):
            head_hidden_KND = self._heads(examples.hidden_ND, examples.roots_N)
        losses = []
        for head, labels_N in enumerate(self._labels(examples)):
            soft_NU = None
            if self._loss.is_soft:
                soft_NU = self._loss.soft_labels(examples.label_states(head))
            losses.append(self._loss(head_hidden_KND[head], labels_N, soft_NU))
        return torch.stack(losses)

    def _labels(self, examples: Examples) -> Tensor:
        return self._index_V[examples.labels_NK.clamp(min=-1)].T
