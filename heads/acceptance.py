"""Which path of each verified tree is kept, by the exact or by the typical rule.

Pure functions over a batch of trees. How a token is drawn from the target distribution (filters,
penalties, seeds) is the caller's business and comes in as `draw_next`: given one node per
sequence [B], it returns the target's token [B] after that node.

Shape suffixes: B sequences, N nodes, D depths (max_depth + 1, root at 0), V vocabulary, X rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.candidates import TreeBatch

DrawNext = Callable[[Tensor], Tensor]
_NODE_SHIFT = 32


@dataclass(frozen=True, slots=True)
class AcceptedPaths:
    """The kept path of every tree of a batch.

    Attributes:
        node_ids_BD: Int64 [B, max_depth + 1]; node ids along the path, increasing, the root in
            column 0, padded with -1.
        num_nodes_B: Int64; nodes of the path: 1 + accepted tokens.
        bonus_B: Int64; the target's own token after the last node of the path.
    """

    node_ids_BD: Tensor
    num_nodes_B: Tensor
    bonus_B: Tensor


def accept_exact(trees: TreeBatch, draw_next: DrawNext) -> AcceptedPaths:
    """Follow the target's own tokens down the trees: sample, then match.

    Lossless: the emitted tokens are exactly those that `draw_next` returned along the path, so
    their distribution is the target's, whatever was drafted. Synchronises with the device once
    per depth reached.

    Args:
        trees: The verified trees.
        draw_next: Called once for every depth that some path reaches. For a sequence whose path
            has ended it is asked about the last node again, and the answer is not used.
    """
    # A node is found by its parent and token in one comparison. Roots and padding have parent -1,
    # hence a negative key, and are never found.
    keys_BN = (trees.parents_BN << _NODE_SHIFT) + trees.token_ids_BN
    num_sequences = keys_BN.shape[0]
    node_ids_BD = keys_BN.new_full((num_sequences, trees.max_depth + 1), -1)
    node_ids_BD[:, 0] = 0
    node_B = keys_BN.new_zeros(num_sequences)
    bonus_B = draw_next(node_B)
    next_B, moving_B = bonus_B, torch.ones_like(node_B, dtype=torch.bool)
    for depth in range(1, trees.max_depth + 1):
        key_B = (node_B << _NODE_SHIFT) + next_B
        found_B, child_B = (keys_BN == key_B.unsqueeze(1)).max(dim=1)
        moving_B = moving_B & found_B
        if not moving_B.any():
            break
        node_B = torch.where(moving_B, child_B, node_B)
        node_ids_BD[:, depth] = torch.where(moving_B, child_B, -1)
        next_B = draw_next(node_B)
        bonus_B = torch.where(moving_B, next_B, bonus_B)
    return AcceptedPaths(node_ids_BD, (node_ids_BD >= 0).sum(dim=1), bonus_B)


def accept_typical(
    trees: TreeBatch, log_probs_BN: Tensor, log_threshold_BN: Tensor, draw_next: DrawNext
) -> AcceptedPaths:
    """Keep the deepest path all of whose tokens are typical under the target model.

    Among equally deep paths the one of larger probability is kept. Lossy: the output need not
    follow the target distribution. Source: Medusa, arXiv:2401.10774, 2.3.1.

    Args:
        trees: The verified trees.
        log_probs_BN: Float32 log-probability of each node's token under the target distribution
            at the node's parent. Roots and padding may hold anything.
        log_threshold_BN: Float32 value that the log-probability must exceed, as
            `typical_log_threshold` gives it for the node's parent.
        draw_next: Called once, for the last node of every path.
    """
    # The score of a node is its path's log-probability, or -inf as soon as a token is refused.
    typical_BN = (log_probs_BN > log_threshold_BN) & (trees.parents_BN >= 0)
    score_BN = torch.where(typical_BN, log_probs_BN, -math.inf)
    score_BN[:, 0] = 0.0
    own_score_BN = score_BN
    parents_BN = trees.parents_BN.clamp(min=0)
    for _ in range(trees.max_depth - 1):
        score_BN = own_score_BN + score_BN.gather(1, parents_BN)
    depths_BN = torch.where(score_BN > -math.inf, trees.depths_BN, -1)
    deepest_BN = depths_BN == depths_BN.amax(dim=1, keepdim=True)
    last_B = torch.where(deepest_BN, score_BN, -math.inf).argmax(dim=1)
    node_ids_BD = _paths_to(last_B, trees)
    return AcceptedPaths(node_ids_BD, (node_ids_BD >= 0).sum(dim=1), draw_next(last_B))


def _paths_to(last_B: Tensor, trees: TreeBatch) -> Tensor:
    node_B1 = last_B.unsqueeze(1)
    columns = []
    for depth in range(trees.max_depth, 0, -1):
        on_path_B1 = trees.depths_BN.gather(1, node_B1) == depth
        columns.append(torch.where(on_path_B1, node_B1, -1))
        node_B1 = torch.where(on_path_B1, trees.parents_BN.gather(1, node_B1), node_B1)
    columns.append(node_B1)
    return torch.cat(columns[::-1], dim=1)


def typical_log_threshold(
    log_probs_XV: Tensor, epsilon: float | Tensor, delta: float | Tensor
) -> Tensor:
    """Return log(min(epsilon, delta * exp(-H))) per row [X], H being the row's entropy in nats.

    Args:
        log_probs_XV: Float32 log-probabilities, after temperature; -inf for impossible tokens.
        epsilon: Hard probability floor in [0, 1], for all rows or as a tensor [X].
        delta: Entropy-scaled floor factor in [0, 1], for all rows or as a tensor [X].

    Raises:
        ValueError: If epsilon or delta lies outside [0, 1].
    """
    log_epsilon = _log_of_unit_value(epsilon, "epsilon", log_probs_XV)
    log_delta = _log_of_unit_value(delta, "delta", log_probs_XV)
    # An impossible token makes 0 * -inf, which is NaN and must count as 0.
    entropy_X = -log_probs_XV.exp().mul_(log_probs_XV).nansum(dim=1)
    return torch.minimum(log_epsilon, log_delta - entropy_X)


def _log_of_unit_value(value: float | Tensor, name: str, like: Tensor) -> Tensor:
    value_X = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if not ((value_X >= 0.0) & (value_X <= 1.0)).all():
        raise ValueError(f"{name} is {value}; give 0 to 1")
    return value_X.log()
