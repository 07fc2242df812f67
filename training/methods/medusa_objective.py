"""The Medusa-1 loss: every head's loss over the draft vocabulary, backbone frozen.

Source: Medusa, arXiv:2401.10774, 2.2.1; the trainer weighs head k (from 0) by decay ** k.

Shape suffixes: N examples, D model width, K draft heads, U draft vocabulary, V vocabulary.
"""

import torch
from torch import Tensor, nn

from heads.medusa import MedusaHeads
from training.data.dataset import draft_vocab_index
from training.loop.objective import ParameterGroup
from training.methods.draft_loss import DraftLoss
from training.states.examples import Examples


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
        heads: Heads whose draft vocabulary does not change any more; labels outside of it count
            for nothing.
        compute_dtype: Type of the matrix products; the weights keep theirs.
        kl_weight: Share of the divergence in the loss, see `DraftLoss`.
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
