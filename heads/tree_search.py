"""Which tree to draft: the one that is expected to be worth most for its number of nodes.

The value of a node is the probability that its whole path is accepted, so the values of a tree
add up to the tokens that a verify step emits. Knows rates and shapes, not tokens or costs.

Shape suffixes: K draft heads, R top-k ranks, C bins of confidence.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from heads.calibration import NUM_BINS
from heads.tree import NO_PARENT, DraftTree


@dataclass(frozen=True, slots=True)
class AcceptanceProfile:
    """How often the candidates of each draft head were the target's token.

    Attributes:
        accept_rates_KR: Entry (k, r) is the probability that the candidate of rank r at depth
            k + 1 is accepted, given that its parent on the path was.
        calibration_KC: By depth and `heads.calibration.probability_bin` the factor that turns a
            draft probability into an accept rate, given that its parent was accepted; empty if not
            measured.

    Raises:
        ValueError: If there is no rate at some depth, a rate lies outside [0, 1], or a ratio of
            the calibration is missing or not positive.
    """

    accept_rates_KR: tuple[tuple[float, ...], ...]
    calibration_KC: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.accept_rates_KR or not all(self.accept_rates_KR):
            raise ValueError(
                f"accept_rates_KR is {self.accept_rates_KR}; give at least one rate per head"
            )
        for depth, rates_R in enumerate(self.accept_rates_KR, start=1):
            for rate in rates_R:
                if not 0.0 <= rate <= 1.0:
                    raise ValueError(f"a rate at depth {depth} is {rate}; give 0 to 1")
        for depth, ratios_C in enumerate(self.calibration_KC, start=1):
            if len(ratios_C) != NUM_BINS:
                raise ValueError(f"{len(ratios_C)} ratios at depth {depth}; give {NUM_BINS}")
            for ratio in ratios_C:
                if not (ratio > 0.0 and math.isfinite(ratio)):
                    raise ValueError(f"a ratio at depth {depth} is {ratio}; give more than 0")

    @property
    def max_depth(self) -> int:
        """Depth of the deepest tree that the profile can value."""
        return len(self.accept_rates_KR)

    def to_json(self) -> dict[str, Any]:
        """Return the profile as a JSON object."""
        data = {"accept_rates": [list(rates_R) for rates_R in self.accept_rates_KR]}
        if self.calibration_KC:
            data["calibration"] = [list(ratios_C) for ratios_C in self.calibration_KC]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned; older profiles have no calibration.

        Raises:
            ValueError: If a key is missing or unknown, a rate is no number in [0, 1], or a ratio is
                no positive number.
        """
        if set(data) - {"calibration"} != {"accept_rates"}:
            raise ValueError(
                f"profile keys are {sorted(data)}; give accept_rates, and calibration if known"
            )
        return cls(_rows(data, "accept_rates"), _rows(data, "calibration"))


def _rows(data: Mapping[str, Any], key: str) -> tuple[tuple[float, ...], ...]:
    rows = data.get(key, ())
    try:
        return tuple(tuple(map(float, row)) for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is {rows!r}; give a list of lists of numbers") from error


def best_tree(profile: AcceptanceProfile, num_nodes: int) -> DraftTree:
    """Return the tree of at most `num_nodes` nodes whose node values add up to the most.

    Values never rise along a path, so taking the most valuable node of the frontier each time is
    optimal. Nodes are numbered in that order: `tree.prefix(n)` is the best tree of n nodes.

    Args:
        profile: Measured accept rates.
        num_nodes: Nodes of the tree, root included. The tree is smaller only when the profile
            has fewer candidates of positive value.

    Raises:
        ValueError: If num_nodes is less than 1.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes is {num_nodes}; give at least 1")
    parents, ranks, depths = [NO_PARENT], [-1], [0]
    frontier: list[tuple[float, int, int]] = []

    def push_children(node: int, value: float) -> None:
        if depths[node] == profile.max_depth:
            return
        for rank, rate in enumerate(profile.accept_rates_KR[depths[node]]):
            if value * rate > 0.0:
                heapq.heappush(frontier, (-value * rate, node, rank))

    push_children(0, 1.0)
    while frontier and len(parents) < num_nodes:
        negative_value, parent, rank = heapq.heappop(frontier)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
        push_children(len(parents) - 1, -negative_value)
    return DraftTree(tuple(parents), tuple(ranks))


def node_values(profile: AcceptanceProfile, tree: DraftTree) -> tuple[float, ...]:
    """Return the probability that each node's whole path is accepted; 1.0 for the root.

    Raises:
        ValueError: If a node's depth or rank lies outside the profile.
    """
    values = [1.0]
    for node in range(1, tree.num_nodes):
        depth, rank = tree.depths[node], tree.ranks[node]
        if depth > profile.max_depth or rank >= len(profile.accept_rates_KR[depth - 1]):
            raise ValueError(
                f"node {node} has depth {depth} and rank {rank}, outside the acceptance profile; "
                "measure a profile with more heads or ranks, or draft a smaller tree"
            )
        values.append(values[tree.parents[node]] * profile.accept_rates_KR[depth - 1][rank])
    return tuple(values)


def expected_tokens_per_step(profile: AcceptanceProfile, tree: DraftTree) -> float:
    """Return the mean acceptance length of the tree: the root's 1.0 stands for the bonus token.

    Raises:
        ValueError: If a node's depth or rank lies outside the profile.
    """
    return sum(node_values(profile, tree))
