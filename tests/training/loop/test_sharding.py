import time
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from server.model.loading import load_model
from tests.training.corpora import document
from tests.training.launched import launch, launch_function
from training.__main__ import main
from training.loop.metrics import METRICS_FILE, read_metrics
from training.loop.processes import Processes
from training.loop.sharding import spread
from training.measure.acceptance import load_acceptance
from training.states.hidden_states import HiddenStateEncoder

pytestmark = pytest.mark.slow


def argv_of(data: Path, model: Path, output: Path, *more: str) -> list[str]:
    argv = ["train", "--data", str(data), "--model", str(model), "--output", str(output)]
    argv += ["--device", "cpu", "--num-threads", "1", "--epochs", "2", "--held-out", "0.4"]
    return [
        *argv,
        "--draft-vocab-size",
        "100",
        "--log-interval",
        "1",
        "--save-interval",
        "2",
        *more,
    ]


def losses(directory: Path) -> torch.Tensor:
    return torch.tensor(
        [[*line["loss_per_head"], line["gradient_norm"]] for line in read_metrics(directory)]
    )


def encoded_by_parts(argv: list[str]) -> int:
    """Compares what two processes with half of every layer compute with what the model does."""
    processes = Processes("cpu")
    loaded = spread(load_model(argv[0], "cpu", "float32"), processes)
    whole = load_model(argv[0], "cpu", "float32")
    documents = [document(20, (5, 15)), document(9, (2, 8), seed=1)]
    ours = HiddenStateEncoder(loaded).encode(documents)
    theirs = HiddenStateEncoder(whole).encode(documents)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)
    all_of_them = dict(whole.model.named_parameters())
    num_parts = 0
    for name, parameter in loaded.model.named_parameters():
        if isinstance(parameter, DTensor):
            assert ".layers." in name
            assert parameter.to_local().numel() == all_of_them[name].numel() // 2
            assert torch.equal(parameter.full_tensor(), all_of_them[name])
            num_parts += 1
        else:
            assert ".layers." not in name
    assert num_parts > 0
    processes.end()
    return 0


def test_each_process_keeps_half_of_every_layer_and_computes_what_the_whole_does(
    model_dir: Path, tmp_path: Path
) -> None:
    running = launch_function(encoded_by_parts, [str(model_dir)], tmp_path)
    assert running.wait() == [0, 0]


@pytest.mark.parametrize(
    "more",
    [
        ("--batch-size", "37", "--num-heads", "2"),
        ("--batch-size", "37", "--num-heads", "2", "--no-cache"),
        # At a small rate, because a tiny model blows rounding up from step to step.
        (
            "--method",
            "mtp",
            "--batch-tokens",
            "100",
            "--num-depths",
            "2",
            "--learning-rate",
            "1e-6",
        ),
    ],
)
def test_parts_of_the_base_take_the_steps_of_the_whole(
    more: tuple[str, ...], distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    argv = argv_of(distilled_file, model_dir, tmp_path / "parts", *more)
    running = launch([*argv, "--sharding", "fsdp"], tmp_path / "logs")
    assert running.wait() == [0, 0]
    assert main(argv_of(distilled_file, model_dir, tmp_path / "whole", *more)) == 0
    ours, expected = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    parts, whole = (load_acceptance(tmp_path / name) for name in ("parts", "whole"))
    assert parts["num_answers"] == whole["num_answers"] > 0
    for rates, others in zip(parts["accept_rates"], whole["accept_rates"], strict=True):
        assert rates == pytest.approx(others, abs=0.02)


def test_a_run_that_was_killed_with_parts_goes_on_with_the_whole(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    more = ("--batch-size", "20", "--num-heads", "2", "--epochs", "20")
    argv = argv_of(distilled_file, model_dir, tmp_path / "killed", *more)
    running = launch([*argv, "--sharding", "fsdp"], tmp_path / "logs")
    metrics = tmp_path / "killed" / METRICS_FILE
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
        assert running.processes[0].is_alive(), running.text(0)
        time.sleep(0.001)
    running.kill()
    assert main(argv) == 0
    assert main(argv_of(distilled_file, model_dir, tmp_path / "whole", *more)) == 0
    ours, expected = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "sharding is fsdp, but the run has one process; start several by torchrun"),
        (("--method", "medusa2"), "method is medusa2, whose adapter lies in the layers"),
        (("--hidden-cache", "states"), "hidden_cache is states, of which each process computes"),
        (("--early-stopping", "3"), "early_stopping is 3, for which one process measures alone"),
    ],
)
def test_what_parts_cannot_do_is_an_error_that_names_it(
    more: tuple[str, ...],
    message: str,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = argv_of(distilled_file, model_dir, tmp_path / "heads", "--sharding", "fsdp", *more)
    assert main(argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())
