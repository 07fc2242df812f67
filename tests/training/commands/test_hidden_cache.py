"""Training and evaluation with hidden states on disk against the same without."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

from tests.support.tiny_models import VOCAB_SIZE
from tests.training.corpora import write_lines
from tests.training.launched import launch
from tests.training.running import error_text
from training.__main__ import main
from training.loop.metrics import read_metrics
from training.measure.acceptance import load_acceptance

# States are computed together with other documents, which rounds otherwise.
RELATIVE_TOLERANCE = 1e-5
# The cache of MTP modules in memory has eight bits.
MEMORY_TOLERANCE = 1e-3


def argv_of(method: str, data: Path, output: Path, model: Path, *more: str) -> list[str]:
    argv = ["train", "--method", method, "--data", str(data), "--output", str(output)]
    argv += ["--model", str(model), "--device", "cpu", "--held-out", "0.3", "--epochs", "3"]
    argv += ["--draft-vocab-size", "100", "--log-interval", "1", "--num-threads", "1"]
    return [*argv, *more]


def losses(directory: Path) -> torch.Tensor:
    return torch.tensor(
        [[line["loss"], *line["loss_per_head"]] for line in read_metrics(directory)]
    )


def written(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize("more", [("--no-cache",), ()], ids=["streamed", "in-memory"])
@pytest.mark.parametrize("method", ["medusa", "mtp"])
def test_a_run_with_states_on_disk_has_the_losses_of_one_without(
    method: str, more: tuple[str, ...], distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    plain, first, second = (tmp_path / name for name in ("plain", "first", "second"))
    states = tmp_path / "states"
    assert main(argv_of(method, distilled_file, plain, model_dir, *more)) == 0
    on_disk = (*more, "--hidden-cache", str(states))
    assert main(argv_of(method, distilled_file, first, model_dir, *on_disk)) == 0
    before = written(states)
    assert main(argv_of(method, distilled_file, second, model_dir, *on_disk)) == 0
    assert written(states) == before
    # Filled or found, the states are the same to the bit.
    assert torch.equal(losses(first), losses(second))
    assert load_acceptance(first) == load_acceptance(second)
    tolerance = MEMORY_TOLERANCE if method == "mtp" and not more else RELATIVE_TOLERANCE
    torch.testing.assert_close(losses(first), losses(plain), rtol=tolerance, atol=1e-6)


def test_methods_held_out_answers_and_evaluation_share_the_states(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = ("--hidden-cache", str(tmp_path / "states"))
    for method in ("medusa", "mtp"):
        argv = argv_of(method, distilled_file, tmp_path / method, model_dir, *states)
        assert main(argv) == 0
    before = written(tmp_path / "states")
    assert error_text(capsys).count("documents are missing") == 1
    for method in ("medusa", "mtp"):
        argv = ["evaluate", "--heads", str(tmp_path / method), "--data", str(distilled_file)]
        argv += ["--model", str(model_dir), "--device", "cpu"]
        assert main([*argv, *states]) == 0
        kept = load_acceptance(tmp_path / method)
        assert main(argv) == 0
        assert load_acceptance(tmp_path / method) == kept
    assert written(tmp_path / "states") == before


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        (
            "medusa2",
            ("--hidden-cache", "states"),
            "--hidden-cache is an option of --method medusa or mtp",
        ),
        ("medusa", ("--hidden-cache-dtype", "float16"), "but there is no directory to keep"),
        ("mtp", ("--hidden-cache", __file__), "is no directory; give another --hidden-cache"),
    ],
)
def test_what_cannot_be_kept_is_an_error(
    method: str,
    more: tuple[str, ...],
    message: str,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(argv_of(method, distilled_file, tmp_path / "heads", model_dir, *more)) == 2
    assert message in error_text(capsys)


def test_the_type_on_disk_is_part_of_a_run(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    plain, narrow = tmp_path / "plain", tmp_path / "narrow"
    assert main(argv_of("medusa", distilled_file, plain, model_dir)) == 0
    more = ("--hidden-cache", str(tmp_path / "states"), "--hidden-cache-dtype", "float16")
    assert main(argv_of("medusa", distilled_file, narrow, model_dir, *more)) == 0
    torch.testing.assert_close(losses(narrow), losses(plain), rtol=1e-3, atol=1e-4)
    assert not torch.equal(losses(narrow), losses(plain))
    assert 'hidden-cache-dtype = "float16"' in (narrow / "train.toml").read_text()


def many_answers(path: Path) -> Path:
    random = Random(0)

    def tokens(count: int) -> list[int]:
        return random.choices(range(3, VOCAB_SIZE), k=count)

    return write_lines(
        path,
        [
            {"id": str(i), "turns": [{"prompt_token_ids": tokens(9), "token_ids": tokens(12)}]}
            for i in range(300)
        ],
    )


def test_a_run_killed_while_it_computes_states_goes_on_with_what_is_there(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, states = many_answers(tmp_path / "data.jsonl"), tmp_path / "states"
    more = ("--hidden-cache", str(states))
    argv = argv_of("medusa", data, tmp_path / "heads", model_dir, *more)
    small_files = "import training.states.document_states as states; states._FILE_BYTES = 8192;"
    command = f"{small_files} from training.__main__ import main; main({argv!r})"
    with subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if states.exists() and len(list(states.glob("*.safetensors"))) >= 3:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL
    before = {path: path.read_bytes() for path in states.glob("*.safetensors")}
    assert main(argv) == 0
    (num_missing,) = [
        int(line.split()[3])
        for line in capsys.readouterr().err.splitlines()
        if line.endswith("documents are missing")
    ]
    # Three documents of 21 tokens fit into a small file.
    assert num_missing == 300 - 3 * len(before)
    assert {path: path.read_bytes() for path in before} == before
    assert main(argv_of("medusa", data, tmp_path / "plain", model_dir)) == 0
    torch.testing.assert_close(
        losses(tmp_path / "heads"),
        losses(tmp_path / "plain"),
        rtol=RELATIVE_TOLERANCE,
        atol=1e-6,
    )


def test_each_of_two_processes_computes_half_of_the_states(model_dir: Path, tmp_path: Path) -> None:
    data, states = many_answers(tmp_path / "data.jsonl"), tmp_path / "states"
    more = ("--hidden-cache", str(states))
    argv = argv_of("medusa", data, tmp_path / "two", model_dir, *more)
    found = launch(argv, tmp_path / "log")
    assert found.wait() == [0, 0], found.text(0)
    files = sorted(states.iterdir())
    assert len(files) == 2
    assert abs(files[0].stat().st_size - files[1].stat().st_size) < 1000
    argv = argv_of("medusa", data, tmp_path / "one", model_dir, *more)
    assert main(argv) == 0
    assert sorted(states.iterdir()) == files
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=RELATIVE_TOLERANCE, atol=1e-6
    )
