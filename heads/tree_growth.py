"""Draft trees that grow level by level, a batch of them at once.

A sequential drafter knows the candidates below a node only after it ran on that node. So at each
level the most probable candidates of the level before are run, whole paths counted, and in the end
the most probable nodes of all levels make the tree. A path's probability never rises on its way
down, so these nodes are closed under parents.

    level 1   candidates below the root; nothing to run, the root has run already
    level d   `frontier` picks candidates of level d - 1 to run, `add` takes their candidates

Source: EAGLE-2, arXiv:2406.16858, 4. Everything stays on the device until `best`.

Shape suffixes: B sequences, W nodes that a level runs, R top-k ranks, E nodes run so far (of all
levels, this one's last), P candidates of all levels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.candidates import Candidates, DraftTokens
from heads.proposals import GrownProposal
from heads.tree import NO_PARENT, DraftTree


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """The nodes that a level runs.

    Attributes:
        token_ids_BW: Int64; 0 where a sequence has fewer candidates than there are places.
        parents_BW: Int64 place in the frontier before, or 0 below the root.
        visible_BWE: Boolean: the node itself and its ancestors among all nodes that were run.
    """

    token_ids_BW: Tensor
    parents_BW: Tensor
    visible_BWE: Tensor


class GrowingTrees:
    """One growing tree per sequence.

    Args:
        candidates: Candidates that may follow each root: one state per sequence, [B, 1, R].
    """

    def __init__(self, candidates: Candidates) -> None:
        self._token_ids_BP = candidates.token_ids_BKR.flatten(1)
        self._log_probs_BP = candidates.log_probs_BKR.flatten(1)
        self._parents_BP = torch.full_like(self._token_ids_BP, NO_PARENT)
        self._num_ranks = candidates.token_ids_BKR.shape[2]
        # Where the newest level's candidates begin, the index of each newest run node among all
        # candidates, and what these nodes see.
        self._newest = 0
        self._run_BW: Tensor | None = None
        self._visible_BWE: Tensor | None = None

    def highest_value(self) -> float:
        """Probability of the best path of the newest level; synchronises with the device."""
        return float(self._log_probs_BP[:, self._newest :].max().exp())

    def frontier(self, width: int) -> Frontier:
        """Choose the most probable candidates of the newest level, at most `width`."""
        newest_BX = self._log_probs_BP[:, self._newest :]
        chosen_BW = newest_BX.topk(min(width, newest_BX.shape[1]), dim=1).indices
        parents_BW = chosen_BW // self._num_ranks
        num_places = chosen_BW.shape[1]
        own = torch.eye(num_places, dtype=torch.bool, device=chosen_BW.device)
        visible_BWE = own.expand(len(chosen_BW), -1, -1)
        if self._visible_BWE is not None:
            rows = parents_BW.unsqueeze(2).expand(-1, -1, self._visible_BWE.shape[2])
            visible_BWE = torch.cat((self._visible_BWE.gather(1, rows), visible_BWE), dim=2)
        self._visible_BWE = visible_BWE
        self._run_BW = chosen_BW + self._newest
        token_ids_BW = self._token_ids_BP.gather(1, self._run_BW).clamp(min=0)
        return Frontier(token_ids_BW, parents_BW, visible_BWE)

    def add(self, candidates: Candidates) -> None:
        """Take the candidates [B, W, R] that follow the nodes of the last frontier."""
        run_BW = self._run_BW
        if run_BW is None:
            raise AssertionError("no frontier was asked for")
        above_BW1 = self._log_probs_BP.gather(1, run_BW).unsqueeze(2)
        log_probs_BWR = candidates.log_probs_BKR + above_BW1
        parents_BWR = run_BW.unsqueeze(2).expand_as(log_probs_BWR)
        self._newest = self._token_ids_BP.shape[1]
        self._token_ids_BP = torch.cat((self._token_ids_BP, candidates.token_ids_BKR.flatten(1)), 1)
        self._log_probs_BP = torch.cat((self._log_probs_BP, log_probs_BWR.flatten(1)), 1)
        self._parents_BP = torch.cat((self._parents_BP, parents_BWR.flatten(1)), 1)
        self._run_BW = None

    def best(self, root_tokens: list[int], num_nodes: int) -> list[GrownProposal]:
        """Return each sequence's tree of at most `num_nodes` nodes, root included.

        Nodes are numbered by falling path probability, so that the first n of them are the best
        tree of n nodes. Synchronises with the device.
        """
        # Stable: a child as probable as its parent comes behind it, since its level did.
        sorted_BP = self._log_probs_BP.sort(dim=1, descending=True, stable=True)
        chosen_BN = sorted_BP.indices[:, : num_nodes - 1]
        token_ids = self._token_ids_BP.gather(1, chosen_BN).tolist()
        parents = self._parents_BP.gather(1, chosen_BN).tolist()
        log_probs = sorted_BP.values[:, : num_nodes - 1].tolist()
        columns = zip(root_tokens, chosen_BN.tolist(), token_ids, parents, log_probs, strict=True)
        return [self._tree(*column) for column in columns]

    def _tree(
        self,
        root_token: int,
        chosen: list[int],
        token_ids: list[int],
        parents: list[int],
        log_probs: list[float],
    ) -> GrownProposal:
        num_real = sum(log_prob > -math.inf for log_prob in log_probs)
        node_of = {NO_PARENT: 0} | {index: node for node, index in enumerate(chosen, start=1)}
        tree = DraftTree(
            (NO_PARENT, *(node_of[parent] for parent in parents[:num_real])),
            # Candidates of one state lie side by side, by rank.
            (-1, *(index % self._num_ranks for index in chosen[:num_real])),
        )
        path_log_probs = (0.0, *log_probs[:num_real])
        probabilities = [
            math.exp(path_log_probs[node] - path_log_probs[tree.parents[node]])
            for node in range(1, tree.num_nodes)
        ]
        return GrownProposal(DraftTokens(tree, (root_token, *token_ids[:num_real])), probabilities)
