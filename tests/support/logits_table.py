"""A "model" that is a table of logits, one row per last token, and trees to verify under it.

The exact distribution of any continuation is a product of softmax values.

Shapes: N nodes, S rows of logits of the step, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from heads.candidates import DraftTokens
from heads.tree import DraftTree
from server.config import SamplingParams, SpeculationParams
from server.core.step import StepEntry, Verdict
from server.sampling.verify import verify
from tests.support.engine_tools import make_sequence
from tests.support.trees import tree_of_paths


def random_table(seed: int, vocab_size: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, vocab_size, generator=generator) * scale


def random_tree(rng: Random, num_nodes: int, vocab_size: int, root: int) -> DraftTokens:
    """Any shape; siblings carry different tokens, as a head's candidates do."""
    parents, ranks, token_ids = [-1], [-1], [root]
    taken: dict[int, list[int]] = {0: []}
    for node in range(1, num_nodes):
        parent = rng.choice([p for p in range(node) if len(taken[p]) < vocab_size])
        token = rng.choice([t for t in range(vocab_size) if t not in taken[parent]])
        parents.append(parent)
        ranks.append(len(taken[parent]))
        token_ids.append(token)
        taken[parent].append(token)
        taken[node] = []
    return DraftTokens(DraftTree(tuple(parents), tuple(ranks)), tuple(token_ids))


def make_item(
    drafts: DraftTokens,
    sampling: SamplingParams,
    speculation: SpeculationParams | None = None,
    prompt: tuple[int, ...] = (0,),
    generated: tuple[int, ...] = (),
    vocab_size: int = 8,
) -> StepEntry:
    """A decoding sequence whose last token is the root of `drafts`."""
    sequence = make_sequence(
        prompt, (*generated, drafts.token_ids[0]), sampling, speculation, vocab_size
    )
    return StepEntry(sequence, 1, drafts, is_verified=True, is_decoding=True)


def verify_all(logits_SV: Tensor, items: Sequence[StepEntry]) -> list[Verdict]:
    """Verify entries whose rows lie one after the other."""
    sizes = [item.drafts.tree.num_nodes for item in items]
    return verify(logits_SV, items, list(accumulate(sizes, initial=0))[:-1])


def node_logits(table: Tensor, items: Sequence[StepEntry]) -> Tensor:
    """The table's rows at all nodes of all trees."""
    return table[[token for item in items for token in item.drafts.token_ids]]


TREE = tree_of_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def likely_drafts(table: Tensor, root: int) -> DraftTokens:
    """Candidates as heads make them: per depth the same few likely tokens for all parents."""
    second = table[root].topk(2).indices.tolist()
    third = table[second[0]].topk(2).indices.tolist()
    fourth = table[third[0]].topk(1).indices.tolist()
    ranks = [second, third, fourth]
    pairs = zip(TREE.depths[1:], TREE.ranks[1:], strict=True)
    return DraftTokens(TREE, (root, *(ranks[depth - 1][rank] for depth, rank in pairs)))
