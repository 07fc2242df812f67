"""Exact acceptance: sample, then match. The output follows the target distribution."""

from dataclasses import dataclass

from heads.acceptance import AcceptedPaths, accept_exact
from heads.candidates import TreeBatch
from server.sampling.acceptance.rule import AcceptanceRule
from server.sampling.sampler import TargetSampler


@dataclass(frozen=True, slots=True)
class ExactParameters:
    """Exact acceptance has no parameters."""


class ExactAcceptance(AcceptanceRule):
    """Follows the target's own tokens down the trees; see `heads.acceptance.accept_exact`."""

    parameters = ExactParameters

    def accept(self, trees: TreeBatch, sampler: TargetSampler) -> AcceptedPaths:
        """Draw the target's token node by node, and go on where a child carries it."""
        return accept_exact(trees, sampler.draw_next)
