"""Decides how many tokens are drafted, and has them drafted after a step.

Shapes: B sequences, D model width.
"""

from collections.abc import Sequence as Seq

from torch import Tensor

from heads.seen_rows import SeenRows
from server.engine.cost_model import CostModel
from server.engine.drafter import Drafter
from server.engine.sequence import Sequence


class Speculator:
    """Chooses the size of trees; without a drafter every tree is its root.

    Args:
        drafter: Draft source.
        node_values: Probability that each node of its largest tree is accepted, falling; the root
            has 1. One value, the root's, makes no drafts.
        fixed_size: Nodes of every tree; None follows `cost_model`.

    Attributes:
        cost_model: Set once it is measured; None takes the largest tree.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        node_values: Seq[float] = (1.0,),
        fixed_size: int | None = None,
    ) -> None:
        self.drafter = drafter
        self.cost_model: CostModel | None = None
        self._node_values = tuple(node_values) if drafter is not None else (1.0,)
        self._fixed_size = fixed_size
        self._size_by_load: dict[int, int] = {}

    def tree_size(self, num_decoding: int) -> int:
        """Nodes of each tree, root included, when so many sequences decode."""
        if len(self._node_values) == 1:
            return 1
        if self._fixed_size is not None:
            return self._fixed_size
        if self.cost_model is None:
            return len(self._node_values)
        size = self._size_by_load.get(num_decoding)
        if size is None:
            size = self.cost_model.best_num_nodes(self._node_values, num_decoding)
            self._size_by_load[num_decoding] = size
        return size

    def seen_rows(self, prompt_token_ids: Seq[int]) -> SeenRows | None:
        """What the drafter needs of a prompt; computed once per request."""
        return None if self.drafter is None else self.drafter.seen_rows(prompt_token_ids)

    def propose(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        num_decoding: int,
    ) -> None:
        """Have the drafter propose if trees of more than a root pay.

        Args:
            rooted: See `Drafter.propose`.
            hidden_BD: Likewise.
            prefilling: Likewise.
            num_decoding: Sequences that decode in the next step, drafted for or not.
        """
        if self.drafter is not None and self.tree_size(max(1, num_decoding)) > 1:
            self.drafter.propose(rooted, hidden_BD, prefilling)
