"""`train --method medusa2` from distilled answers to what is served, on a tiny model."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heads.checkpoint import save_heads
from heads.medusa import MedusaConfig, MedusaHeads
from server.model.draft_heads import load_draft_heads
from server.model.loading import load_model
from tests.training.corpora import write_lines
from tests.training.launched import launch
from tests.training.running import (
    error_text,
    evaluate,
    kill_when_exists,
    result,
    train,
    train_argv,
)
from training.loop.metrics import read_metrics
from training.loop.run_state import STATE_FILE
from training.methods.method import WARMUP_DIR

SMALL = ("--draft-vocab-size", "100", "--num-heads", "2", "--batch-size", "32", "--epochs", "12")
MEDUSA2 = (
    *("--method", "medusa2", "--lora-rank", "4", "--divergence-weight", "5"),
    *("--learning-rate", "0.005", "--lora-learning-rate", "0.003"),
)


@pytest.fixture(scope="module")
def heads_dir(
    distilled_file: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("medusa2") / "heads"
    assert train(distilled_file, directory, model_dir, *SMALL, *MEDUSA2) == 0
    return directory


def test_the_result_serves_as_base_adapter_and_heads(heads_dir: Path, model_dir: Path) -> None:
    loaded = load_model(str(model_dir), "cpu", "float32", heads_dir)
    assert loaded.adapter_sha256 is not None
    found = load_draft_heads(heads_dir, loaded)
    assert isinstance(found.heads, MedusaHeads)
    assert found.profile is not None
    plain = load_model(str(model_dir), "cpu", "float32")
    ids_1T = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        differ = loaded.model(input_ids=ids_1T).logits - plain.model(input_ids=ids_1T).logits
    assert float(differ.abs().max()) > 1e-3
    assert not (heads_dir / STATE_FILE).exists()
    assert [line["further_losses"] for line in read_metrics(heads_dir)][-1]["divergence"] > 0.0


def files(directory: Path) -> dict[str, bytes]:
    names = ("heads.safetensors", "adapter/adapter_model.safetensors")
    return {name: (directory / name).read_bytes() for name in names}


def test_evaluation_compares_the_base_with_and_without_its_adapter(
    heads_dir: Path,
    distilled_file: Path,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(heads_dir)
    assert evaluate(heads_dir, distilled_file, model_dir) == 0
    found = result(capsys)["perplexity"]
    assert found["plain"] > 1.0
    assert found["adapted"] != found["plain"]
    assert found["ratio"] == pytest.approx(found["adapted"] / found["plain"], rel=1e-3)
    assert files(heads_dir) == before


def test_the_divergence_keeps_the_base_where_it_is(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distance = []
    for weight in ("0", "1000"):
        more = (*SMALL, *MEDUSA2, "--divergence-weight", weight, "--lora-learning-rate", "0.01")
        assert train(distilled_file, tmp_path / weight, model_dir, *more) == 0
        distance.append(read_metrics(tmp_path / weight)[-1]["further_losses"]["divergence"])
        assert "perplexity" in result(capsys)
    assert distance[1] < 0.1 * distance[0]


def test_a_killed_run_ends_as_one_that_was_not(
    heads_dir: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    """Killed once in the warm-up and once behind it."""
    output, more = tmp_path / "killed", (*SMALL, *MEDUSA2, "--save-interval", "1")
    argv = train_argv(distilled_file, output, model_dir, *more)
    for state in (output / WARMUP_DIR / STATE_FILE, output / STATE_FILE):
        kill_when_exists(argv, state)
    assert train(distilled_file, output, model_dir, *more) == 0
    assert files(output) == files(heads_dir)


def test_two_processes_take_the_steps_of_one(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    small = ("--draft-vocab-size", "100", "--num-heads", "2", "--batch-size", "32", "--epochs", "2")
    more = ("--log-interval", "1", "--num-threads", "1", *small, *MEDUSA2)
    assert train(distilled_file, tmp_path / "alone", model_dir, *more) == 0
    argv = train_argv(distilled_file, tmp_path / "two", model_dir, *more)
    launched = launch(argv, tmp_path / "logs")
    assert launched.wait() == [0, 0], launched.text(0)
    pairs = zip(*(read_metrics(tmp_path / name) for name in ("two", "alone")), strict=True)
    for ours, expected in pairs:
        for name in ("loss", "loss_per_head", "further_losses", "gradient_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)


def test_heads_to_begin_with_skip_the_warm_up(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(distilled_file, first, model_dir, *SMALL) == 0
    assert "perplexity" not in result(capsys)
    still = ("--learning-rate", "1e-12", "--lora-learning-rate", "0", "--init-heads", str(first))
    argv = (*SMALL, "--method", "medusa2", *still)
    assert train(distilled_file, second, model_dir, *argv) == 0
    assert not (second / WARMUP_DIR).exists()
    assert result(capsys)["perplexity"]["ratio"] == 1.0
    weights, expected = (load_file(d / "heads.safetensors") for d in (second, first))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)


def test_medusa_goes_on_from_heads_too(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(distilled_file, first, model_dir, *SMALL) == 0
    assert train(distilled_file, second, model_dir, *SMALL, "--init-heads", str(first)) == 0
    ends = [read_metrics(directory)[-1]["loss"] for directory in (first, second)]
    assert read_metrics(second)[0]["loss"] < 0.5 * (ends[0] + read_metrics(first)[0]["loss"])
    assert ends[1] < ends[0]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--lora-rank", "8"), "--lora-rank is an option of --method medusa2"),
        (("--lora-targets", "q_proj"), "--lora-targets is an option of --method medusa2"),
        (("--method", "mtp", "--init-heads", "x"), "--method medusa or medusa2"),
        (("--method", "mtp", "--divergence-weight", "1"), "--method medusa2"),
        (("--method", "medusa2", "--learning-rate", "0"), "give the heads a rate above 0"),
        (
            ("--method", "medusa2", "--warmup-epochs", "2", "--init-heads", "x"),
            "leave out one of --warmup-epochs and --init-heads",
        ),
        (("--method", "medusa2", "--lora-targets", "nothing"), "lora targets are nothing"),
    ],
)
def test_options_that_do_not_go_together_are_an_error(
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    match: str,
) -> None:
    assert train(distilled_file, tmp_path / "heads", model_dir, *more) == 2
    assert match in error_text(capsys)


def test_heads_to_begin_with_must_fit(
    heads_dir: Path,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = tmp_path / "first"
    assert train(distilled_file, first, model_dir, *SMALL, "--learning-rate", "0") == 0
    capsys.readouterr()
    other = ("--init-heads", str(first), "--num-heads", "3")
    assert train(distilled_file, tmp_path / "second", model_dir, *other) == 2
    assert "num_heads is 3, but the heads in" in error_text(capsys)
    adapted = ("--init-heads", str(heads_dir))
    assert train(distilled_file, tmp_path / "third", model_dir, *adapted) == 2
    assert "loaded with the adapter None" in error_text(capsys)


def test_heads_with_matrices_of_their_own_are_no_beginning(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(str(model_dir), "cpu", "float32")
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=2, own_unembedding=True)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    save_heads(tmp_path / "own", heads, loaded.fingerprint, "tiny", None)
    argv = ("--init-heads", str(tmp_path / "own"))
    assert train(distilled_file, tmp_path / "heads", model_dir, *argv) == 2
    assert "vocabulary matrices of their own" in error_text(capsys)


def test_a_loss_that_is_no_number_is_reported_before_anything_is_saved(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = Path(shutil.copytree(model_dir, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.embed_tokens.weight"][200] = math.nan
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    line = {"id": "a", "turns": [{"prompt_token_ids": [1, 200], "token_ids": [5, 6, 7]}]}
    data = write_lines(tmp_path / "data.jsonl", [line])
    argv = ("--held-out", "0", *MEDUSA2)
    assert train(data, tmp_path / "heads", spoilt, *argv) in (2, 3)
    assert not (tmp_path / "heads" / "config.json").exists()
    capsys.readouterr()
