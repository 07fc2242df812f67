"""Accepts draft tokens: ties a step's logits to the acceptance rules of `heads.acceptance`.

Shapes: B sequences, N nodes, S rows of logits of the step, X some of these rows, C children of
their nodes, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from heads.acceptance import AcceptedPaths, accept_exact, accept_typical, typical_log_threshold
from heads.candidates import TreeBatch
from server.core.step import StepEntry
from server.sampling.logits import draw_tokens, filter_logits
from server.sampling.uniform import uniform


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the base model made of one sequence's drafts.

    Attributes:
        path: Accepted node ids, root first, increasing.
        bonus_token: The target's own token after the last accepted node.
    """

    path: tuple[int, ...]
    bonus_token: int


class TargetSampler:
    """Draws the target's next token at tree nodes, from the fully processed distribution."""

    def __init__(self, logits_SV: Tensor, items: Seq[StepEntry], first_rows: Seq[int]) -> None:
        self._logits_SV = logits_SV
        self._items = items
        self._first_rows = first_rows
        # What was drawn last; a sequence whose walk has ended is asked about its node again.
        self._nodes = [-1] * len(items)
        self._next_B = torch.zeros(len(items), dtype=torch.int64, device=logits_SV.device)

    def draw_next(self, node_B: Tensor) -> Tensor:
        """The target's token after one node of every sequence; computed once per node."""
        nodes = node_B.tolist()
        changed = [i for i, node in enumerate(nodes) if node != self._nodes[i]]
        if changed:
            self._next_B[changed] = self._draw(changed, [nodes[i] for i in changed])
            self._nodes = nodes
        return self._next_B.clone()

    def _draw(self, indices: Seq[int], nodes: Seq[int]) -> Tensor:
        members = [self._items[i].sequence for i in indices]
        if all(m.request.sampling.is_greedy and m.adjuster is None for m in members):
            rows = [self._first_rows[i] + node for i, node in zip(indices, nodes, strict=True)]
            # In float32 argmax is several times faster on CPU than in bfloat16.
            return self._logits_SV[rows].float().argmax(-1)
        logits_XV = self.target_logits(indices, nodes)
        next_X = logits_XV.argmax(-1)
        drawn = [x for x, member in enumerate(members) if not member.request.sampling.is_greedy]
        if drawn:
            uniforms = [self._uniform(indices[x], nodes[x]) for x in drawn]
            next_X[drawn] = draw_tokens(logits_XV[drawn], uniforms)
        return next_X

    def target_logits(self, indices: Seq[int], nodes: Seq[int]) -> Tensor:
        """Logits [X, V] whose softmax is the target distribution after the given nodes."""
        rows = [self._first_rows[i] + node for i, node in zip(indices, nodes, strict=True)]
        logits_XV = self._logits_SV[rows].float()
        for row, (i, node) in enumerate(zip(indices, nodes, strict=True)):
            adjuster = self._items[i].sequence.adjuster
            if adjuster is not None:
                path = _path_tokens(self._items[i], node)
                logits_XV[row] = adjuster.apply(logits_XV[row], path)
        return filter_logits(logits_XV, [self._items[i].sequence.request.sampling for i in indices])

    def _uniform(self, index: int, node: int) -> float:
        item = self._items[index]
        depth = item.drafts.tree.depths[node]
        return uniform(item.sequence.seed, len(item.sequence.token_ids) + depth)


def verify(logits_SV: Tensor, items: Seq[StepEntry]) -> list[Verdict]:
    """Verify the drafts of every sequence by its own rule.

    Args:
        logits_SV: Logits at all nodes of all sequences, in order.
        items: The verified part of the step's plan, in the same order.
    """
    sizes = [item.drafts.tree.num_nodes for item in items]
    first_rows = list(accumulate(sizes, initial=0))[:-1]
    verdicts: dict[int, Verdict] = {}
    for rule in ("exact", "typical"):
        group = [i for i, item in enumerate(items) if item.sequence.acceptance == rule]
        if not group:
            continue
        members = [items[i] for i in group]
        sampler = TargetSampler(logits_SV, members, [first_rows[i] for i in group])
        trees = TreeBatch.from_drafts([item.drafts for item in members], logits_SV.device)
        if rule == "exact":
            accepted = accept_exact(trees, sampler.draw_next)
        else:
            accepted = _accept_typical(trees, sampler, members)
        verdicts.update(zip(group, _verdicts(accepted), strict=True))
    return [verdicts[i] for i in range(len(items))]


def _accept_typical(
    trees: TreeBatch, sampler: TargetSampler, items: Seq[StepEntry]
) -> AcceptedPaths:
    """Evaluate the rule depth by depth, only below nodes that were accepted, then pick paths."""
    device = trees.token_ids_BN.device
    log_probs_BN = torch.full(trees.token_ids_BN.shape, float("-inf"), device=device)
    threshold_BN = torch.zeros_like(log_probs_BN)
    children = [item.drafts.tree.children() for item in items]
    frontier = [(index, 0) for index in range(len(items)) if children[index][0]]
    while frontier:
        indices = [index for index, _ in frontier]
        log_probs_XV = sampler.target_logits(indices, [n for _, n in frontier]).log_softmax(-1)
        asked = [items[index].sequence.request.speculation for index in indices]
        threshold_X = typical_log_threshold(
            log_probs_XV,
            torch.tensor([params.epsilon for params in asked], device=device),
            torch.tensor([params.delta for params in asked], device=device),
        )
        below = [
            (row, index, child)
            for row, (index, node) in enumerate(frontier)
            for child in children[index][node]
        ]
        rows, owners, nodes = (list(column) for column in zip(*below, strict=True))
        tokens = [items[index].drafts.token_ids[node] for _, index, node in below]
        log_probs_C, threshold_C = log_probs_XV[rows, tokens], threshold_X[rows]
        log_probs_BN[owners, nodes] = log_probs_C
        threshold_BN[owners, nodes] = threshold_C
        frontier = [
            (index, node)
            for (_, index, node), is_typical in zip(
                below, (log_probs_C > threshold_C).tolist(), strict=True
            )
            if is_typical and children[index][node]
        ]
    return accept_typical(trees, log_probs_BN, threshold_BN, sampler.draw_next)


def _verdicts(accepted: AcceptedPaths) -> list[Verdict]:
    return [
        Verdict(tuple(path[:length]), bonus)
        for path, length, bonus in zip(
            accepted.node_ids_BD.tolist(),
            accepted.num_nodes_B.tolist(),
            accepted.bonus_B.tolist(),
            strict=True,
        )
    ]


def _path_tokens(item: StepEntry, node: int) -> list[int]:
    """Draft tokens from below the root down to `node`."""
    parents, token_ids = item.drafts.tree.parents, item.drafts.token_ids
    path = []
    while node:
        path.append(token_ids[node])
        node = parents[node]
    return path[::-1]
