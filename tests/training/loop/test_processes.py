"""Training by two processes that talk through gloo, started as a user starts them."""

import gc
import json
import math
import shutil
import signal
import time
import weakref
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from tests.training.corpora import write_lines
from tests.training.launched import launch, launch_function, torchrun
from training.__main__ import main
from training.errors import RunError
from training.loop.metrics import METRICS_FILE, read_metrics
from training.loop.processes import Processes
from training.loop.run_state import STATE_FILE

# Sums of a batch are taken in another order; ten AdamW steps carry that on.
RELATIVE_TOLERANCE = 1e-5
OPTIONS = {
    "--draft-vocab-size": "100",
    "--num-heads": "2",
    "--batch-size": "37",
    "--epochs": "4",
    "--held-out": "0.2",
    "--log-interval": "1",
    "--save-interval": "3",
    "--device": "cpu",
    "--num-threads": "1",
}


def arguments(data: Path, model: Path, output: Path, *more: str) -> list[str]:
    options = [text for pair in OPTIONS.items() for text in pair]
    paths = ["--data", str(data), "--model", str(model), "--output", str(output)]
    return ["train", *paths, *options, *more]


def losses(directory: Path) -> list[list[float]]:
    return [
        [line["step"], line["loss"], *line["loss_per_head"], line["gradient_norm"]]
        for line in read_metrics(directory)
    ]


@pytest.fixture(scope="module")
def alone(distilled_file: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with, by one process."""
    output = tmp_path_factory.mktemp("processes") / "alone"
    assert main(arguments(distilled_file, model_dir, output)) == 0
    return output


def check_same(directory: Path, expected: Path) -> None:
    torch.testing.assert_close(
        torch.tensor(losses(directory)),
        torch.tensor(losses(expected)),
        rtol=RELATIVE_TOLERANCE,
        atol=1e-6,
    )
    ours, theirs = (load_file(d / "heads.safetensors") for d in (directory, expected))
    for name, tensor in theirs.items():
        # They are stored in bfloat16.
        torch.testing.assert_close(ours[name], tensor, rtol=2**-7, atol=1e-4)


def test_two_processes_take_the_steps_of_one_with_the_same_batch(
    alone: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    """Started by torchrun, as a user does."""
    argv = arguments(distilled_file, model_dir, tmp_path / "two")
    found = torchrun(argv)
    assert found.returncode == 0, found.stderr
    check_same(tmp_path / "two", alone)
    assert not (tmp_path / "two" / STATE_FILE).exists()
    # One of them prints the result, and progress.
    assert json.loads(found.stdout)["num_steps"] == len(losses(alone))
    assert found.stderr.count("loading model") == 1


def test_two_processes_killed_at_any_step_go_on_with_the_same_losses(
    alone: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    # The parts of the batches change nothing either.
    argv = arguments(distilled_file, model_dir, output, "--gradient-accumulation", "3")
    last_step = Random().randrange(4, len(losses(alone)) - 1)
    first = launch(argv, tmp_path / "first")
    metrics = output / METRICS_FILE
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= last_step):
        assert first.processes[0].is_alive(), first.text(0)
        time.sleep(0.001)
    first.kill()
    again = launch(argv, tmp_path / "again")
    assert again.wait() == [0, 0], again.text(0)
    assert "goes on after step" in again.text(0)
    check_same(output, alone)


def test_a_loss_that_is_no_number_stops_all_processes(model_dir: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(model_dir, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.embed_tokens.weight"][200] = math.nan
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    # One example: the part of the second process is empty, and it stops nevertheless.
    line = {"id": "a", "turns": [{"prompt_token_ids": [1, 200], "token_ids": [5, 6]}]}
    data = write_lines(tmp_path / "data.jsonl", [line])
    found = launch(arguments(data, spoilt, tmp_path / "heads", "--held-out", "0"), tmp_path)
    assert found.wait() == [3, 3]
    assert "error: step 1: the loss is nan" in found.text(0)
    assert found.text(1).startswith("process 1: error: step 1: the loss is nan")


def test_when_one_process_dies_the_others_end_too(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    """Without a launcher, which would kill them."""
    argv = arguments(distilled_file, model_dir, tmp_path / "heads", "--epochs", "10000")
    running = launch(argv, tmp_path)
    metrics = tmp_path / "heads" / METRICS_FILE
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert running.processes[0].is_alive(), running.text(0)
        time.sleep(0.001)
    running.processes[1].kill()
    assert running.wait() == [1, -signal.SIGKILL]
    assert "gloo/transport" in running.text(0)


def trained_and_ended(_: list[str]) -> int:
    processes = Processes("cpu")
    module = torch.nn.Linear(3, 2)
    processes.prepare(module, torch.optim.AdamW(module.parameters()))
    processes.backward(processes.run(torch.ones(3)).sum())
    wrappers = [weakref.ref(o) for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    group = weakref.ref(torch.distributed.group.WORLD)
    assert len(wrappers) == 1
    processes.end()
    assert wrappers[0]() is None
    assert group() is None
    return 0


def test_no_wrapper_outlives_the_group_of_processes(tmp_path: Path) -> None:
    """It would free the group, and wait for its threads, which may then wait for it."""
    running = launch_function(trained_and_ended, [], tmp_path)
    assert running.wait() == [0, 0]


@pytest.mark.parametrize("num_parts", ["2", "5", "50"])
def test_a_batch_taken_in_parts_gives_the_same_losses(
    num_parts: str, alone: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    argv = arguments(distilled_file, model_dir, tmp_path, "--gradient-accumulation", num_parts)
    assert main(argv) == 0
    check_same(tmp_path, alone)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "launch without --use_deepspeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "launch without --use_megatron_lm"),
        ("ACCELERATE_USE_FSDP", "true", "--use_fsdp and give train --sharding fsdp"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4 accumulation steps.*--gradient-acc"),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_an_error_that_names_it(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message):
        Processes("cpu")


def test_losses_cannot_be_scaled_on_a_cpu() -> None:
    with pytest.raises(RunError, match="fp16 needs a CUDA device; give --mixed-precision bf16"):
        Processes("cpu", is_scaled=True)


def test_a_process_alone_has_all_parts() -> None:
    processes = Processes("cpu")
    assert (processes.count, processes.rank, processes.is_main) == (1, 0, True)
    assert processes.own(["a", "b"]) == ["a", "b"]
    assert processes.loss_scale == 1.0
    assert processes.loss_scaling() == {}
    assert torch.equal(processes.sum(torch.arange(3)), torch.arange(3))
