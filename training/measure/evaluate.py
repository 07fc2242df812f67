"""Measures draft heads on answers that they were not trained on.

For every position of every answer it finds the rank that each depth gives the token that the target
model really drew. From the ranks alone follow the accept rates and, by walking through the answers
as the engine would, the tokens that a verify step emits with any tree.

Shape suffixes: N examples, D model width, K depths, U draft vocabulary, R ranks,
C bins of confidence.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.calibration import CELL_PRIOR, NUM_BINS, probability_bin
from heads.tree import DraftTree
from heads.tree_search import AcceptanceProfile, best_tree, expected_tokens_per_step
from training.data.dataset import NO_LABEL, Corpus, Document, document_labels, draft_vocab_index
from training.errors import DataError
from training.measure.calibration import CalibrationCounter
from training.measure.drafts import Drafts

# No candidate of any tree: the token is not drafted at all, or the answer ends before it.
UNRANKED = -1
TREE_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Nodes of the tree that accept rates and categories are measured with: the server's default limit.
PROFILE_TREE_SIZE = 32
_DOCUMENTS_AT_ONCE = 64
# Rates are conditional on an accepted parent, hence on a tree; each round takes the tree of the
# round before, and the tree hardly changes after two.
_PROFILE_ROUNDS = 3
# As many as the server's dynamic trees choose from.
_NUM_CALIBRATED_RANKS = 8


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    """The ranks that heads give the tokens of one answer.

    Attributes:
        ranks: Entry [i][k] is the rank, from 0, that depth k gives the token k + 1 places after the
            answer's token i, drafted when token i is the root; or `UNRANKED`.
        num_tokens: Tokens of the answer; one more than there are entries.
        confidences_NKR: Draft probabilities of the first ranks, falling; None if not known.
    """

    category: str
    ranks: list[list[int]]
    num_tokens: int
    confidences_NKR: Tensor | None = None


@torch.no_grad()
def rank_answers(
    corpus: Corpus,
    drafts: Drafts,
    calibration: CalibrationCounter,
    on_documents: Callable[[int], None],
) -> list[RankedAnswer]:
    """Rank every token of every answer.

    Args:
        corpus: Answers of the base model that the heads belong to.
        drafts: What the heads draft.
        calibration: Counts the heads' candidates on the way.
        on_documents: Called with the number of documents after each group.
    """
    answers: list[RankedAnswer] = []
    for start in range(0, len(corpus.documents), _DOCUMENTS_AT_ONCE):
        documents = corpus.documents[start : start + _DOCUMENTS_AT_ONCE]
        for document, states_KND in zip(documents, drafts.states(documents), strict=True):
            answers += _rank_document(document, states_KND, drafts, calibration)
        on_documents(len(documents))
    return answers


def _rank_document(
    document: Document, states_KND: Tensor, drafts: Drafts, calibration: CalibrationCounter
) -> list[RankedAnswer]:
    labels_NK = document_labels(document, drafts.num_depths).to(states_KND.device)
    answers, first = [], 0
    for span in document.spans:
        rows = slice(first, first + span.num_examples)
        prompt = document.token_ids_T[: span.start].tolist()
        ranks_NK, confidences_NKR = _ranks(
            states_KND[:, rows], labels_NK[rows], drafts, prompt, calibration
        )
        num_tokens = span.end - span.start
        answers.append(
            RankedAnswer(document.category, ranks_NK.tolist(), num_tokens, confidences_NKR)
        )
        first = rows.stop
    return answers


def _ranks(
    states_KND: Tensor,
    labels_NK: Tensor,
    drafts: Drafts,
    prompt: Sequence[int],
    calibration: CalibrationCounter,
) -> tuple[Tensor, Tensor]:
    """Rank among the draft vocabulary and the prompt's tokens, as the engine orders them.

    Returns:
        Ranks NK, and on the CPU the draft probabilities NKR of the first ranks.
    """
    token_ids_U = drafts.draft_vocab_ids
    seen = drafts.seen_rows(prompt)
    if seen is not None:
        token_ids_U = torch.cat((token_ids_U, seen.token_ids_E))
    index_V = draft_vocab_index(token_ids_U, drafts.vocab_size)
    index_NK = index_V[labels_NK.clamp(min=-1)]
    ranks_NK = torch.full_like(index_NK, UNRANKED)
    confidences: list[Tensor] = []
    for depth, states_ND in enumerate(states_KND):
        logits_NU = F.linear(states_ND, drafts.draft_rows(depth))
        if seen is not None:
            logits_NU = torch.cat((logits_NU, F.linear(states_ND, seen.rows_ED)), dim=1)
        index_N1 = index_NK[:, depth : depth + 1]
        drawn_N1 = logits_NU.gather(1, index_N1.clamp(min=0))
        ranks_N = (logits_NU > drawn_N1).sum(dim=1)
        ranks_NK[:, depth] = torch.where(index_N1[:, 0] >= 0, ranks_N, UNRANKED)
        calibration.add(depth, logits_NU, index_N1[:, 0], labels_NK[:, depth] != NO_LABEL)
        top_NR = logits_NU.topk(min(_NUM_CALIBRATED_RANKS, logits_NU.shape[1])).values.float()
        confidences.append((top_NR - logits_NU.float().logsumexp(dim=1, keepdim=True)).exp().cpu())
    return ranks_NK, torch.stack(confidences, dim=1)


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
