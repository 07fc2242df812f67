"""Measures draft heads on answers that they were not trained on.

From the ranks that heads give the tokens of the answers follow the accept rates and, by walking
through the answers as the engine would, the tokens that a verify step emits with any tree.

Shape suffixes: N examples, K depths, R ranks, C bins of confidence.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from heads.calibration import CELL_PRIOR, NUM_BINS, probability_bin
from heads.tree import DraftTree
from heads.tree_search import AcceptanceProfile, best_tree, expected_tokens_per_step
from training.errors import DataError
from training.measure.ranking import UNRANKED, RankedAnswer

TREE_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Nodes of the tree that accept rates and categories are measured with: the server's default limit.
PROFILE_TREE_SIZE = 32
# Rates are conditional on an accepted parent, hence on a tree; each round takes the tree of the
# round before, and the tree hardly changes after two.
_PROFILE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class _Step:
    """A verify step: ranks of the tokens after its root, and how many of them were accepted."""

    ranks: Sequence[int]
    accepted_depth: int
    confidences_KR: Tensor | None


@dataclass(frozen=True, slots=True)
class Walk:
    """What verify steps emitted.

    Attributes:
        num_steps: Verify steps.
        num_tokens: Tokens that the steps emitted, bonus tokens included.
    """

    num_steps: int = 0
    num_tokens: int = 0

    def __add__(self, other: "Walk") -> "Walk":
        return Walk(self.num_steps + other.num_steps, self.num_tokens + other.num_tokens)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per verify step; 0.0 without steps."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0


def walk(answers: Sequence[RankedAnswer], tree: DraftTree) -> Walk:
    """Decode the answers with a tree: accept the longest path that the answer follows, go on there.

    The first token of an answer ends its prefill and belongs to no verify step. A category's
    figure comes from its answers alone.
    """
    num_steps = sum(1 for _ in _verify_steps(answers, tree))
    # Each step begins at a root of its own; all tokens but the first are emitted by some step.
    return Walk(num_steps, sum(max(0, answer.num_tokens - 1) for answer in answers))


def _verify_steps(answers: Sequence[RankedAnswer], tree: DraftTree) -> Iterator[_Step]:
    child_of = {(tree.parents[node], tree.ranks[node]): node for node in range(1, tree.num_nodes)}
    for answer in answers:
        root = 0
        while root < len(answer.ranks):
            ranks_K = answer.ranks[root]
            depth = _accepted_depth(child_of, ranks_K)
            yield _Step(ranks_K, depth, _confidences(answer, root))
            root += 1 + depth


def _accepted_depth(child_of: Mapping[tuple[int, int], int], ranks_K: Sequence[int]) -> int:
    node = 0
    for depth, rank in enumerate(ranks_K):
        child = child_of.get((node, rank))
        if child is None:
            return depth
        node = child
    return len(ranks_K)


def measure_profile(
    answers: Sequence[RankedAnswer], num_ranks: int, num_nodes: int
) -> AcceptanceProfile:
    """Measure how often the candidate of each depth and rank is accepted if its parent was.

    The rates are those of the steps that decoding with a tree takes, and the tree follows from the
    rates, so both are refined in turn.

    Args:
        answers: Ranked answers.
        num_ranks: Candidates per depth that get a rate, R.
        num_nodes: Nodes of the tree.

    Raises:
        DataError: If no answer has two tokens.
    """
    num_heads = max((len(row) for answer in answers for row in answer.ranks), default=0)
    if num_heads == 0:
        raise DataError("the held-out answers have no token to draft; give longer ones")
    steps = _all_positions(answers, num_ranks)
    for _ in range(_PROFILE_ROUNDS):
        profile = _accept_rates(steps, num_heads, num_ranks)
        steps = _verify_steps(answers, best_tree(profile, num_nodes))
    return profile


def _all_positions(answers: Sequence[RankedAnswer], num_ranks: int) -> Iterator[_Step]:
    """Steps from every position, with a tree that has all candidates of every depth."""
    for answer in answers:
        for root, ranks_K in enumerate(answer.ranks):
            is_drafted = (UNRANKED < rank < num_ranks for rank in ranks_K)
            depth = sum(itertools.takewhile(bool, is_drafted))
            yield _Step(ranks_K, depth, _confidences(answer, root))


def _confidences(answer: RankedAnswer, root: int) -> Tensor | None:
    return None if answer.confidences_NKR is None else answer.confidences_NKR[root]


def _accept_rates(steps: Iterable[_Step], num_heads: int, num_ranks: int) -> AcceptanceProfile:
    num_tried = [0] * num_heads
    num_hits = [[0] * num_ranks for _ in range(num_heads)]
    for step in steps:
        for depth in range(min(step.accepted_depth + 1, num_heads)):
            num_tried[depth] += 1
            rank = step.ranks[depth]
            if UNRANKED < rank < num_ranks:
                num_hits[depth][rank] += 1
    return AcceptanceProfile(
        tuple(
            tuple(hits / max(1, tried) for hits in hits_R)
            for hits_R, tried in zip(num_hits, num_tried, strict=True)
        )
    )


def measure_calibration(
    answers: Sequence[RankedAnswer], tree: DraftTree
) -> tuple[tuple[float, ...], ...]:
    """Measure by depth and bin how the heads' probabilities relate to accept rates.

    A candidate counts where its parent was accepted, in the steps that decoding with a tree takes.

    Args:
        answers: Ranked answers with their confidences.
        tree: The tree that the steps verify.

    Returns:
        KC as in `AcceptanceProfile.calibration_KC`; a cell that is rarely seen is close to 1.
    """
    num_heads = max(len(row) for answer in answers for row in answer.ranks)
    expected_KC = [[CELL_PRIOR] * NUM_BINS for _ in range(num_heads)]
    hits_KC = [[CELL_PRIOR] * NUM_BINS for _ in range(num_heads)]
    for step in _verify_steps(answers, tree):
        if step.confidences_KR is None:
            raise ValueError("an answer has no confidences; rank it again")
        reached = step.confidences_KR[: step.accepted_depth + 1].tolist()
        for depth, confidences_R in enumerate(reached):
            for rank, confidence in enumerate(confidences_R):
                place = probability_bin(confidence)
                expected_KC[depth][place] += confidence
                hits_KC[depth][place] += step.ranks[depth] == rank
    return tuple(
        tuple(hits / expected for hits, expected in zip(*rows, strict=True))
        for rows in zip(hits_KC, expected_KC, strict=True)
    )


@dataclass(frozen=True, slots=True)
class TreeResult:
    """What trees of one size are worth.

    Attributes:
        num_nodes: Nodes of the tree, root included.
        expected_tokens_per_step: Follows from the profile.
        mean_acceptance_length: Counted by walking through the answers.
    """

    num_nodes: int
    expected_tokens_per_step: float
    mean_acceptance_length: float


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What heads are worth.

    Attributes:
        profile: Accept rates, and how the heads' probabilities relate to them.
        trees: Results for trees of several sizes.
        by_category: Mean acceptance length of each category with `tree`.
        tree: The best tree of `PROFILE_TREE_SIZE` nodes.
        num_answers: Answers that were measured.
        num_answer_tokens: Tokens of these answers.
    """

    profile: AcceptanceProfile
    trees: tuple[TreeResult, ...]
    by_category: dict[str, float]
    tree: DraftTree
    num_answers: int
    num_answer_tokens: int


def evaluate(answers: Sequence[RankedAnswer], num_ranks: int) -> EvaluationResult:
    """Measure profile, tree sizes and categories.

    Raises:
        DataError: If no answer has two tokens.
    """
    profile = measure_profile(answers, num_ranks, PROFILE_TREE_SIZE)
    trees = {size: best_tree(profile, size) for size in TREE_SIZES}
    if all(answer.confidences_NKR is not None for answer in answers):
        calibration_KC = measure_calibration(answers, trees[PROFILE_TREE_SIZE])
        profile = replace(profile, calibration_KC=calibration_KC)
    categories = sorted({answer.category for answer in answers})
    return EvaluationResult(
        profile=profile,
        trees=tuple(
            TreeResult(
                size,
                expected_tokens_per_step(profile, tree),
                walk(answers, tree).mean_acceptance_length,
            )
            for size, tree in trees.items()
        ),
        by_category={
            category: walk(
                [answer for answer in answers if answer.category == category],
                trees[PROFILE_TREE_SIZE],
            ).mean_acceptance_length
            for category in categories
        },
        tree=trees[PROFILE_TREE_SIZE],
        num_answers=len(answers),
        num_answer_tokens=sum(answer.num_tokens for answer in answers),
    )
