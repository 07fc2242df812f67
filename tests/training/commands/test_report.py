import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from heads.tree_search import AcceptanceProfile, best_tree
from training.commands.report import ReportOptions, run
from training.errors import DataError
from training.loop.metrics import METRICS_FILE
from training.measure.acceptance import (
    ACCEPTANCE_FILE,
    Measurement,
    load_acceptance,
    save_acceptance,
)
from training.measure.calibration import CalibrationCounter
from training.measure.evaluate import EvaluationResult, TreeResult

pytestmark = pytest.mark.slow


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def save(directory: Path) -> None:
    profile = AcceptanceProfile(((0.5, 0.2), (0.4, 0.1)))
    tree = best_tree(profile, 4)
    sizes = (TreeResult(1, 1.0, 1.0), TreeResult(4, 1.8, 1.7))
    result = EvaluationResult(profile, sizes, {"<script>x</script>": 1.7}, tree, 3, 60)
    found = Measurement(result, CalibrationCounter(2).result())
    save_acceptance(directory, found, "<script>base</script>", "ab" * 32)


def test_a_page_without_metrics_says_so_and_runs_no_script(tmp_path: Path) -> None:
    save(tmp_path)
    run(ReportOptions(heads=tmp_path))
    page = (tmp_path / "report.html").read_text()
    tags = Tags(page).found
    assert tags.count("svg") == 5
    assert "script" not in tags
    assert "no metrics" in page


def test_metrics_add_their_plots(tmp_path: Path) -> None:
    save(tmp_path)
    rows = [{"step": n, "loss_per_head": [2.0, 3.0], "learning_rate": 0.1} for n in (1, 2)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "page.html"
    assert run(ReportOptions(heads=tmp_path, output=output))["report"] == str(output)
    assert Tags(output.read_text()).found.count("svg") == 7


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "other"}'])
def test_a_missing_damaged_or_foreign_measurement_is_an_error(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / ACCEPTANCE_FILE).write_text(content)
    with pytest.raises(DataError, match="evaluate"):
        load_acceptance(tmp_path)
