"""A measurement of heads: taken with a progress bar, printed, and written as `acceptance.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heads.tree_search import node_values
from server.cli.console import progress_bar
from training.data.dataset import Corpus
from training.data.jsonl import replace_file
from training.errors import DataError
from training.measure.calibration import CalibrationBin, CalibrationCounter
from training.measure.drafts import Drafts
from training.measure.evaluate import EvaluationResult, evaluate
from training.measure.ranking import rank_answers

# Candidates per head that a profile covers: more than the largest tree takes of any.
NUM_RANKS = 16
ACCEPTANCE_FILE = "acceptance.json"
FORMAT = "euryale-acceptance"
FORMAT_VERSION = 1
_DIGITS = 4
_FIELDS = {
    "format",
    "format_version",
    "base",
    "data_sha256",
    "mean_acceptance_length",
    "expected_tokens_per_step",
    "accept_rates",
    "by_category",
    "num_answers",
    "num_answer_tokens",
    "calibration",
    "tree",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """Heads on answers that they were not trained on.

    Attributes:
        result: What the heads are worth.
        calibration: How sure each head was and how often it was right, by bins.
    """

    result: EvaluationResult
    calibration: tuple[tuple[CalibrationBin, ...], ...]


def measure(corpus: Corpus, drafts: Drafts, num_ranks: int = NUM_RANKS) -> Measurement:
    """Measure what heads draft while a bar shows how far it is.

    Raises:
        DataError: If no answer has two tokens.
    """
    counter = CalibrationCounter(drafts.num_depths)
    with progress_bar("measuring", len(corpus.documents)) as bar:
        answers = rank_answers(corpus, drafts, counter, bar.advance)
    return Measurement(evaluate(answers, num_ranks), counter.result())


def summary(result: EvaluationResult) -> dict[str, Any]:
    """Turn a measurement into the JSON object that is printed."""
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


def save_acceptance(directory: Path, found: Measurement, base_name: str, data_sha256: str) -> None:
    """Write `acceptance.json` into the directory of the heads, whole or not at all."""
    tree = found.result.tree
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": base_name,
        "data_sha256": data_sha256,
        **summary(found.result),
        "calibration": [[asdict(item) for item in bins] for bins in found.calibration],
        "tree": {
            "parents": tree.parents,
            "ranks": tree.ranks,
            "values": [round(v, _DIGITS) for v in node_values(found.result.profile, tree)],
        },
    }
    replace_file(directory / ACCEPTANCE_FILE, (json.dumps(content, indent=2) + "\n").encode())


def load_acceptance(directory: Path) -> Mapping[str, Any]:
    """Read what `save_acceptance` wrote.

    Raises:
        DataError: If it is missing, damaged or of another format.
    """
    path = directory / ACCEPTANCE_FILE
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); `python -m training evaluate` writes it"
        ) from error
    is_ours = isinstance(content, dict) and set(content) == _FIELDS
    if not is_ours or (content["format"], content["format_version"]) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{path} is not of format {FORMAT} {FORMAT_VERSION}; `python -m training evaluate` "
            "writes it again"
        )
    return dict(content)
