"""Draws the target's next token at tree nodes, from the fully processed distribution.

Shapes: B sequences, S rows of logits of the step, X some of these rows, V vocabulary.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.config import SamplingParams
from server.core.step import StepEntry
from server.sampling.logits import draw_tokens, filter_logits
from server.sampling.uniform import uniform


class TargetSampler:
    """The target distributions of some verified entries.

    Args:
        logits_SV: Logits at all nodes of all entries of a step.
        entries: Those that are asked about; the B of what follows.
        first_rows: Row of each entry's root.
    """

    def __init__(self, logits_SV: Tensor, entries: Seq[StepEntry], first_rows: Seq[int]) -> None:
        self.entries = entries
        self._logits_SV = logits_SV
        self._first_rows = first_rows
        # What was drawn last; a sequence whose walk has ended is asked about its node again.
        self._nodes = [-1] * len(entries)
        self._next_B = torch.zeros(len(entries), dtype=torch.int64, device=logits_SV.device)

    def draw_next(self, node_B: Tensor) -> Tensor:
        """The target's token after one node of every sequence; computed once per node."""
        nodes = node_B.tolist()
        changed = [i for i, node in enumerate(nodes) if node != self._nodes[i]]
        if changed:
            self._next_B[changed] = self._draw(changed, [nodes[i] for i in changed])
            self._nodes = nodes
        return self._next_B.clone()

    def target_logits(self, indices: Seq[int], nodes: Seq[int]) -> Tensor:
        """Logits [X, V] whose softmax is the target distribution after the given nodes."""
        logits_XV = self._logits_SV[self._rows(indices, nodes)].float()
        for row, (index, node) in enumerate(zip(indices, nodes, strict=True)):
            entry = self.entries[index]
            processors = entry.sequence.processors
            if processors:
                path = entry.path_tokens(node)
                for processor in processors:
                    logits_XV[row] = processor.apply(logits_XV[row], path)
        return filter_logits(logits_XV, [self._sampling(index) for index in indices])

    def _draw(self, indices: Seq[int], nodes: Seq[int]) -> Tensor:
        is_greedy = [self._sampling(index).is_greedy for index in indices]
        if all(is_greedy) and not any(self.entries[i].sequence.processors for i in indices):
            # In float32 argmax is several times faster on CPU than in bfloat16.
            return self._logits_SV[self._rows(indices, nodes)].float().argmax(-1)
        logits_XV = self.target_logits(indices, nodes)
        next_X = logits_XV.argmax(-1)
        drawn = [x for x, greedy in enumerate(is_greedy) if not greedy]
        if drawn:
            uniforms = [self._uniform(indices[x], nodes[x]) for x in drawn]
            next_X[drawn] = draw_tokens(logits_XV[drawn], uniforms)
        return next_X

    def _rows(self, indices: Seq[int], nodes: Seq[int]) -> list[int]:
        return [self._first_rows[i] + node for i, node in zip(indices, nodes, strict=True)]

    def _sampling(self, index: int) -> SamplingParams:
        return self.entries[index].sequence.request.sampling

    def _uniform(self, index: int, node: int) -> float:
        entry = self.entries[index]
        depth = entry.drafts.tree.depths[node]
        return uniform(entry.sequence.seed, len(entry.sequence.token_ids) + depth)
