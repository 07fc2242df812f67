"""Typical acceptance: Medusa's lossy rule. Source: Medusa, arXiv:2401.10774, 2.3.1.

Shapes: B sequences, N nodes, X rows of logits, C children of their nodes, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from heads.acceptance import AcceptedPaths, accept_typical, typical_log_threshold
from heads.candidates import TreeBatch
from server.config import require
from server.sampling.acceptance.rule import AcceptanceRule, rule_parameters
from server.sampling.sampler import TargetSampler


@dataclass(frozen=True, slots=True)
class TypicalParameters:
    """When a draft token counts as typical: its probability exceeds min(epsilon, delta * exp(-H)).

    Attributes:
        epsilon: Hard probability floor, in [0, 1].
        delta: Factor of the floor that falls with the entropy H of the distribution, in [0, 1].

    Raises:
        InvalidRequestError: If a value is out of range.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            require(0.0 <= value <= 1.0, f"speculation.{item.name}", value, "give 0 to 1")


class TypicalAcceptance(AcceptanceRule):
    """Keeps the longest path of typical tokens; see `heads.acceptance.accept_typical`."""

    parameters = TypicalParameters

    def accept(self, trees: TreeBatch, sampler: TargetSampler) -> AcceptedPaths:
        """Evaluate the rule depth by depth, only below nodes that were accepted."""
        device = trees.token_ids_BN.device
        log_probs_BN = torch.full(trees.token_ids_BN.shape, float("-inf"), device=device)
        threshold_BN = torch.zeros_like(log_probs_BN)
        entries = sampler.entries
        children = [entry.drafts.tree.children() for entry in entries]
        frontier = [(index, 0) for index in range(len(entries)) if children[index][0]]
        while frontier:
            indices = [index for index, _ in frontier]
            log_probs_XV = sampler.target_logits(indices, [n for _, n in frontier]).log_softmax(-1)
            threshold_X = self._thresholds(log_probs_XV, sampler, indices)
            below = [
                (row, index, child)
                for row, (index, node) in enumerate(frontier)
                for child in children[index][node]
            ]
            rows, owners, nodes = (list(column) for column in zip(*below, strict=True))
            tokens = [entries[index].drafts.token_ids[node] for _, index, node in below]
            log_probs_C, threshold_C = log_probs_XV[rows, tokens], threshold_X[rows]
            log_probs_BN[owners, nodes] = log_probs_C
            threshold_BN[owners, nodes] = threshold_C
            is_typical_C = (log_probs_C > threshold_C).tolist()
            frontier = [
                (index, node)
                for (_, index, node), is_typical in zip(below, is_typical_C, strict=True)
                if is_typical and children[index][node]
            ]
        return accept_typical(trees, log_probs_BN, threshold_BN, sampler.draw_next)

    def _thresholds(
        self, log_probs_XV: Tensor, sampler: TargetSampler, indices: list[int]
    ) -> Tensor:
        requests = [sampler.entries[index].sequence.request for index in indices]
        asked = [rule_parameters(self, r.speculation.acceptance_options) for r in requests]
        device = log_probs_XV.device
        return typical_log_threshold(
            log_probs_XV,
            torch.tensor([parameters.epsilon for parameters in asked], device=device),
            torch.tensor([parameters.delta for parameters in asked], device=device),
        )
