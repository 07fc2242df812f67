import json

from heads.tree_search import AcceptanceProfile
from training.evaluate import EvaluationResult, TreeResult
from training.report import summary


def test_a_summary_is_plain_json_by_tree_size() -> None:
    profile = AcceptanceProfile(((0.333333333, 0.1), (0.25, 0.05)))
    trees = (TreeResult(1, 1.0, 1.0), TreeResult(8, 1.654321, 1.7))
    found = summary(EvaluationResult(profile, trees, {"qa": 1.7}, 3, 60))
    assert json.loads(json.dumps(found)) == {
        "mean_acceptance_length": {"1": 1.0, "8": 1.7},
        "expected_tokens_per_step": {"1": 1.0, "8": 1.6543},
        "accept_rates": [[0.3333, 0.1], [0.25, 0.05]],
        "by_category": {"qa": 1.7},
        "num_answers": 3,
        "num_answer_tokens": 60,
    }
