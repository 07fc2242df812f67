from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import tracking as accelerate_tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.model.loading import LoadedModel
from tests.training.loop.test_trainer import CONFIG, make_trainer, train_until
from tests.training.running import error_text, train
from training.errors import RunError
from training.loop import trackers
from training.loop.metrics import open_metrics, read_metrics
from training.loop.run_state import RunRecord
from training.loop.trackers import NO_TRACKING, Tracking, flat_figures, open_trackers
from training.states.hidden_states import HiddenStateEncoder

SMALL = ("--draft-vocab-size", "100", "--batch-size", "64", "--epochs", "4", "--log-interval", "2")


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by name."""
    found = EventAccumulator(str(directory))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def board(directory: Path) -> Tracking:
    return Tracking(("tensorboard",), directory, "board")


def line(step: int, loss: float) -> dict[str, object]:
    return {"step": step, "loss": loss, "per_head": [loss, 2 * loss], "further": {"kl": 0.5}}


def write(directory: Path, first_step: int, lines: Sequence[dict[str, object]]) -> None:
    with open_metrics(RunRecord(directory, {}, board(directory)), first_step) as log:
        for metrics in lines:
            log.append(metrics)


def test_each_figure_has_a_name_of_its_own() -> None:
    assert flat_figures(line(3, 1.0)) == {
        "loss": 1.0,
        "per_head/0": 1.0,
        "per_head/1": 2.0,
        "further/kl": 0.5,
    }


def test_all_figures_are_at_their_step(tmp_path: Path) -> None:
    write(tmp_path, 0, [line(10, 1.0), line(20, 0.5)])
    assert scalars(tmp_path / "board") == {
        "loss": [(10, 1.0), (20, 0.5)],
        "per_head/0": [(10, 1.0), (20, 0.5)],
        "per_head/1": [(10, 2.0), (20, 1.0)],
        "further/kl": [(10, 0.5), (20, 0.5)],
    }
    assert read_metrics(tmp_path) == [line(10, 1.0), line(20, 0.5)]


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 0, [line(step, 1.0) for step in (10, 20, 30)])
    write(tmp_path, 20, [line(step, 0.5) for step in (30, 40)])
    assert scalars(tmp_path / "board")["loss"] == [(10, 1.0), (20, 1.0), (30, 0.5), (40, 0.5)]


def test_steps_are_there_before_the_metrics_are_closed(tmp_path: Path) -> None:
    with open_metrics(RunRecord(tmp_path, {}, board(tmp_path)), 0) as log:
        log.append(line(10, 1.0))
        assert scalars(tmp_path / "board")["loss"] == [(10, 1.0)]


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"file cannot be written by tensorboard: .*; give another --track-dir"
    with (
        pytest.raises(RunError, match=message),
        open_trackers(board(tmp_path / "file"), 0),
    ):
        pass


def test_a_killed_run_that_goes_on_has_each_step_once(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    config, tracking = replace(CONFIG, log_interval=1), board(tmp_path)
    # A state is saved every fourth step.
    train_until(make_trainer(loaded, encoder, tmp_path, config, tracking=tracking), last_step=7)
    assert [step for step, _ in scalars(tmp_path / "board")["loss"]] == [1, 2, 3, 4, 5, 6]
    again = make_trainer(loaded, encoder, tmp_path, config, tracking=tracking)
    assert again.resume()
    again.train(lambda _: None)
    found, lines = scalars(tmp_path / "board")["loss"], read_metrics(tmp_path)
    assert [step for step, _ in found] == [x["step"] for x in lines]
    assert [loss for _, loss in found] == pytest.approx([x["loss"] for x in lines])


class Recorded(accelerate_tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker of somebody else."""

    name = "recorded"
    requires_logging_directory = False
    tracker = None
    runs: dict[str, list[object]] = {}  # noqa: RUF012

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.calls = self.runs.setdefault(run_name, [])

    def start(self) -> None:
        self.calls.append("start")

    def log(self, values: dict[str, float], step: int | None) -> None:
        self.calls.append((step, values["loss"]))

    def finish(self) -> None:
        self.calls.append("finish")


def test_any_tracker_of_accelerate_gets_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "recorded", Recorded)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["recorded"])
    tracking = Tracking(("recorded",), tmp_path, "run").part("warmup")
    with open_metrics(RunRecord(tmp_path, {}, tracking), 0) as log:
        log.append(line(10, 1.0))
    assert Recorded.runs == {"run/warmup": ["start", (10, 1.0), "finish"]}


def test_an_unknown_or_missing_tracker_is_an_error_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RunError, match="track is 'board', which is no tracker; give one of aim, "):
        replace(NO_TRACKING, names=("board",))
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(RunError, match="whose package is not installed; pip install wandb"):
        replace(NO_TRACKING, names=("wandb",))


def test_a_run_does_not_begin_without_a_tracker_that_is_asked_for(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--track", "mlflow")
    assert train(distilled_file, tmp_path / "heads", model_dir, *SMALL, *more) == 2
    assert "pip install mlflow" in error_text(capsys)
    assert not (tmp_path / "heads").exists()


def test_a_run_tracks_what_its_metrics_have_and_a_warm_up_has_a_run_of_its_own(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "heads"
    argv = ("--method", "medusa2", "--track", "tensorboard")
    assert train(distilled_file, output, model_dir, *SMALL, *argv) == 0
    found_in = output / "tracking" / "heads"
    for ours, theirs in ((found_in, output), (found_in / "warmup", output / "warmup")):
        found, lines = scalars(ours), read_metrics(theirs)
        assert [step for step, _ in found["loss"]] == [x["step"] for x in lines]
        for name in ("loss", "learning_rate", "gradient_norm", "peak_memory_bytes"):
            values = [value for _, value in found[name]]
            assert values == pytest.approx([x[name] for x in lines], rel=1e-6)
        last = [found[f"loss_per_head/{head}"][-1][1] for head in range(4)]
        assert last == pytest.approx(lines[-1]["loss_per_head"])
    assert "further_losses/divergence" in scalars(found_in)
