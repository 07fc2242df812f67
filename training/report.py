"""What a measurement of heads looks like while it runs and in the result that is printed."""

from typing import Any

from heads.medusa import MedusaHeads
from training.dataset import Corpus
from training.evaluate import EvaluationResult, RankedAnswer, rank_answers
from training.hidden_states import HiddenStateEncoder
from training.progress import progress_bar

# Candidates per head that a profile covers: more than the largest tree takes of any.
NUM_RANKS = 16
_DIGITS = 4


def rank_with_progress(
    corpus: Corpus, encoder: HiddenStateEncoder, heads: MedusaHeads
) -> list[RankedAnswer]:
    """Rank the tokens of all answers while a bar shows how far it is."""
    with progress_bar("measuring", len(corpus.documents)) as bar:
        return rank_answers(corpus, encoder, heads, bar.advance)


def summary(result: EvaluationResult) -> dict[str, Any]:
    """Turn a measurement into a JSON object."""
    return {
        "mean_acceptance_length": _by_size(result, "mean_acceptance_length"),
        "expected_tokens_per_step": _by_size(result, "expected_tokens_per_step"),
        "accept_rates": [
            [round(rate, _DIGITS) for rate in rates_R] for rates_R in result.profile.accept_rates_KR
        ],
        "by_category": {name: round(value, _DIGITS) for name, value in result.by_category.items()},
        "num_answers": result.num_answers,
        "num_answer_tokens": result.num_answer_tokens,
    }


def _by_size(result: EvaluationResult, figure: str) -> dict[str, float]:
    return {str(tree.num_nodes): round(getattr(tree, figure), _DIGITS) for tree in result.trees}
