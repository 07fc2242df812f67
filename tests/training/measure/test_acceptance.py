import json
from pathlib import Path

import pytest

from tests.training.measurements import PROFILE, measurement
from training.errors import DataError
from training.measure.acceptance import ACCEPTANCE_FILE, load_acceptance, save_acceptance, summary

SUMMARY = {
    "mean_acceptance_length": {"1": 1.0, "8": 1.7},
    "expected_tokens_per_step": {"1": 1.0, "8": 1.6543},
    "accept_rates": [[0.3333, 0.1], [0.25, 0.05]],
    "by_category": {"qa": 1.7},
    "num_answers": 3,
    "num_answer_tokens": 60,
}


def test_a_summary_is_plain_json_by_tree_size() -> None:
    assert json.loads(json.dumps(summary(measurement().result))) == SUMMARY


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    save_acceptance(tmp_path, measurement(), "tiny", "0" * 64)
    found = load_acceptance(tmp_path)
    assert {name: found[name] for name in SUMMARY} == SUMMARY
    assert (found["base"], found["data_sha256"]) == ("tiny", "0" * 64)
    assert [len(bins) for bins in found["calibration"]] == [20, 20]
    tree = found["tree"]
    assert len(tree["parents"]) == len(tree["ranks"]) == len(tree["values"]) == 5
    assert tree["values"][0] == 1.0
    for node in range(1, 5):
        depth = 1 if tree["parents"][node] == 0 else 2
        rate = PROFILE.accept_rates_KR[depth - 1][tree["ranks"][node]]
        parent = tree["values"][tree["parents"][node]]
        assert tree["values"][node] == pytest.approx(parent * rate, abs=1e-4)


def test_a_missing_or_foreign_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"acceptance\.json cannot be read.*training evaluate"):
        load_acceptance(tmp_path)
    save_acceptance(tmp_path, measurement(), "tiny", "0" * 64)
    path = tmp_path / ACCEPTANCE_FILE
    content = json.loads(path.read_text())
    for broken in ("{", "[]", json.dumps(content | {"format_version": 9}), '{"format": 1}'):
        path.write_text(broken)
        with pytest.raises(DataError, match="training evaluate"):
            load_acceptance(tmp_path)
