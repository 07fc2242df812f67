import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.model.loading import LoadedModel
from tests.training.loop.test_trainer import CONFIG, make_trainer, train_until
from training.__main__ import main
from training.errors import RunError
from training.loop.metrics import open_metrics, read_metrics
from training.loop.tensorboard import TensorBoardLog, summary_writer
from training.states.hidden_states import HiddenStateEncoder


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by name."""
    found = EventAccumulator(str(directory))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def line(step: int, loss: float) -> dict[str, object]:
    return {"step": step, "loss": loss, "per_head": [loss, 2 * loss], "further": {"kl": 0.5}}


def write(directory: Path, first_step: int, lines: Sequence[dict[str, object]]) -> None:
    with open_metrics(directory, first_step, directory / "board") as log:
        for metrics in lines:
            log.append(metrics)


def test_all_numbers_become_scalars_at_their_step(tmp_path: Path) -> None:
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


def test_steps_are_there_before_the_log_is_closed(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, 0)
    log.append(line(10, 1.0))
    assert scalars(tmp_path)["loss"] == [(10, 1.0)]
    log.close()


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.* cannot be written: .*; give another --tensorboard"):
        TensorBoardLog(tmp_path / "file", 0)


def test_a_killed_run_that_goes_on_has_each_step_once(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    board = tmp_path / "board"
    config = replace(CONFIG, tensorboard=board, log_interval=1)
    # A state is saved every fourth step.
    train_until(make_trainer(loaded, encoder, tmp_path, config), last_step=7)
    assert [step for step, _ in scalars(board)["loss"]] == [1, 2, 3, 4, 5, 6]
    again = make_trainer(loaded, encoder, tmp_path, config)
    assert again.resume()
    again.train(lambda _: None)
    found, lines = scalars(board)["loss"], read_metrics(tmp_path)
    assert [step for step, _ in found] == [x["step"] for x in lines]
    assert [loss for _, loss in found] == pytest.approx([x["loss"] for x in lines])


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)


@pytest.mark.usefixtures("without_tensorboard")
def test_a_missing_tensorboard_is_named_with_the_remedy() -> None:
    with pytest.raises(RunError, match=r"not installed; pip install 'euryale\[tensorboard\]'"):
        summary_writer()


def train(data: Path, output: Path, model: Path, *more: str) -> int:
    argv = ["train", "--data", str(data), "--output", str(output), "--model", str(model)]
    argv += ["--device", "cpu", "--draft-vocab-size", "100", "--batch-size", "64", "--epochs", "4"]
    return main([*argv, "--log-interval", "2", *more])


@pytest.mark.usefixtures("without_tensorboard")
def test_a_run_does_not_begin_without_tensorboard_if_it_is_asked_for(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = ("--tensorboard", str(tmp_path / "board"))
    assert train(distilled_file, tmp_path / "heads", model_dir, *board) == 2
    assert "euryale[tensorboard]" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "heads").exists()


def test_a_run_writes_what_its_metrics_have_and_a_warm_up_has_a_run_of_its_own(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output, board = tmp_path / "heads", tmp_path / "board"
    argv = ("--method", "medusa2", "--tensorboard", str(board))
    assert train(distilled_file, output, model_dir, *argv) == 0
    for ours, theirs in ((board, output), (board / "warmup", output / "warmup")):
        found, lines = scalars(ours), read_metrics(theirs)
        assert [step for step, _ in found["loss"]] == [x["step"] for x in lines]
        for name in ("loss", "learning_rate", "gradient_norm", "peak_memory_bytes"):
            values = [value for _, value in found[name]]
            assert values == pytest.approx([x[name] for x in lines], rel=1e-6)
        last = [found[f"loss_per_head/{head}"][-1][1] for head in range(4)]
        assert last == pytest.approx(lines[-1]["loss_per_head"])
    assert "further_losses/divergence" in scalars(board)
