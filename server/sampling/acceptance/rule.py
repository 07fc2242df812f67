"""What an acceptance rule is."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

from heads.acceptance import AcceptedPaths
from heads.candidates import TreeBatch
from server.sampling.sampler import TargetSampler


class AcceptanceRule(Protocol):
    """Decides which path of each verified tree is kept.

    Attributes:
        parameters: Dataclass of the rule's own parameters, with defaults; it checks itself and
            raises `InvalidRequestError`.
    """

    parameters: type

    def accept(self, trees: TreeBatch, sampler: TargetSampler) -> AcceptedPaths:
        """Verify the trees of the sampler's entries.

        Args:
            trees: Their drafts, in the same order.
            sampler: Draws the target's tokens, and gives its distributions, at nodes of the trees.
        """


def rule_parameters(rule: AcceptanceRule, options: Mapping[str, float]) -> Any:
    """A rule's parameters out of a request's `acceptance_options`.

    Raises:
        InvalidRequestError: If one of them is wrong.
    """
    known = {field.name for field in fields(rule.parameters)}
    return rule.parameters(**{name: value for name, value in options.items() if name in known})
