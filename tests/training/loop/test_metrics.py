from pathlib import Path

from training.loop.metrics import METRICS_FILE, open_metrics, read_metrics
from training.loop.run_state import RunRecord


def test_a_resumed_run_drops_the_steps_that_it_repeats(tmp_path: Path) -> None:
    with open_metrics(RunRecord(tmp_path, {}), first_step=0) as file:
        for step in (1, 2, 3):
            file.append({"step": step, "run": "first"})
    with (tmp_path / METRICS_FILE).open("ab") as file_left_torn:
        file_left_torn.write(b'{"step": 4, "ru')
    with open_metrics(RunRecord(tmp_path, {}), first_step=2) as file:
        file.append({"step": 3, "run": "second"})
    found = [(line["step"], line["run"]) for line in read_metrics(tmp_path)]
    assert found == [(1, "first"), (2, "first"), (3, "second")]
