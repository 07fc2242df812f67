import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heads.files import file_sha256
from heads.medusa import MedusaHeads
from server.model.draft_heads import DraftHeads, load_draft_heads
from server.model.loading import LoadedModel, load_model
from tests.support.tiny_adapters import save_adapted_heads, save_tiny_adapter
from tests.support.tiny_models import save_tiny_model
from tests.training import running
from tests.training.corpora import document, write_lines
from tests.training.running import error_text, evaluate, kill_when_exists, result, train_argv
from training.__main__ import PROGRAM, main
from training.data.answers import data_sha256
from training.data.data_source import open_data
from training.data.dataset import Corpus, split
from training.data.distilled import Manifest, manifest_path
from training.loop.metrics import read_metrics
from training.loop.run_state import STATE_FILE
from training.measure.acceptance import load_acceptance
from training.measure.evaluate import TREE_SIZES

SMALL = ("--draft-vocab-size", "100", "--num-heads", "2", "--batch-size", "32", "--epochs", "30")


def train(data: Path, output: Path, model: Path, *more: str) -> int:
    return running.train(data, output, model, *SMALL, *more)


def checkpoint(directory: Path, loaded: LoadedModel) -> DraftHeads:
    return load_draft_heads(directory, loaded)


@pytest.fixture(scope="module")
def heads_dir(
    distilled_file: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("train") / "heads"
    assert train(distilled_file, directory, model_dir) == 0
    return directory


def test_the_heads_can_be_loaded_for_their_base_with_a_profile(
    heads_dir: Path, loaded: LoadedModel
) -> None:
    found = checkpoint(heads_dir, loaded)
    assert isinstance(found.heads, MedusaHeads)
    assert found.heads.config.num_heads == 2
    assert found.heads.config.draft_vocab_size == 100
    assert found.profile is not None
    assert found.profile.max_depth == 2


def test_a_finished_run_leaves_metrics_and_no_state(heads_dir: Path) -> None:
    assert not (heads_dir / STATE_FILE).exists()
    lines = read_metrics(heads_dir)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"step", "epoch", "loss_per_head", "learning_rate"} <= set(lines[0])


def test_a_run_says_what_it_took(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(distilled_file, tmp_path / "heads", model_dir) == 0
    found = result(capsys)
    assert list(found["seconds"]) == ["hidden_states", "steps", "measuring"]
    assert 0.0 < found["examples_per_s"] < found["answer_tokens_per_s"]
    assert found["answer_tokens_per_s"] < found["document_tokens_per_s"]
    lines = read_metrics(tmp_path / "heads")
    seen = lines[-1]["num_examples"] / found["seconds"]["steps"]
    assert found["examples_per_s"] == pytest.approx(seen, rel=0.05)
    # Linux counts by pages of each thread, and adds up late.
    assert 2**20 < lines[-1]["peak_memory_bytes"] <= found["peak_memory_bytes"] * 1.01
    assert train(distilled_file, tmp_path / "streamed", model_dir, "--no-cache") == 0
    assert list(result(capsys)["seconds"]) == ["steps", "measuring"]


def test_the_options_of_a_run_lie_next_to_the_heads_and_begin_it_again(
    heads_dir: Path, distilled_file: Path, model_dir: Path, tmp_path: Path, loaded: LoadedModel
) -> None:
    config = heads_dir / "train.toml"
    arguments = PROGRAM.parse(["train", "--config", str(config)]).arguments
    options = arguments["options"]
    assert (options.data, options.output) == ((distilled_file,), heads_dir)
    assert (options.held_out, options.model) == (0.4, str(model_dir))
    assert (arguments["config"].epochs, arguments["method"].num_heads) == (30, 2)
    before = config.read_bytes()
    # Refused, because the heads are there: the file still says how they were made.
    assert main(["train", "--config", str(config), "--epochs", "1"]) == 2
    assert config.read_bytes() == before
    assert main(["train", "--config", str(config), "--output", str(tmp_path / "again")]) == 0
    ours, theirs = (checkpoint(d, loaded).heads for d in (tmp_path / "again", heads_dir))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trained_heads_draft_what_they_learned_better_than_untrained_ones(
    heads_dir: Path,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(distilled_file, tmp_path / "raw", model_dir, "--learning-rate", "0") == 0
    capsys.readouterr()
    lengths = []
    for directory in (tmp_path / "raw", heads_dir):
        assert evaluate(directory, distilled_file, model_dir, "--no-save") == 0
        lengths.append(result(capsys)["mean_acceptance_length"]["32"])
    assert lengths[1] > lengths[0] + 0.1


def test_heads_that_are_there_are_not_overwritten_unasked(
    heads_dir: Path, distilled_file: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (heads_dir / "heads.safetensors").read_bytes()
    assert train(distilled_file, heads_dir, model_dir) == 2
    assert "holds heads already; give another --output or --overwrite" in error_text(capsys)
    assert (heads_dir / "heads.safetensors").read_bytes() == before


def test_the_same_run_gives_the_same_heads_and_needs_no_cache(
    heads_dir: Path, distilled_file: Path, model_dir: Path, tmp_path: Path, loaded: LoadedModel
) -> None:
    assert train(distilled_file, tmp_path / "again", model_dir) == 0
    ours, theirs = (checkpoint(d, loaded).heads for d in (tmp_path / "again", heads_dir))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert train(distilled_file, tmp_path / "streamed", model_dir, "--no-cache") == 0
    streamed = checkpoint(tmp_path / "streamed", loaded).heads
    assert torch.equal(streamed.draft_vocab_ids, ours.draft_vocab_ids)


def test_overwriting_starts_over(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "heads"
    assert train(distilled_file, output, model_dir, "--num-heads", "3") == 0
    first = result(capsys)
    assert train(distilled_file, output, model_dir, "--overwrite") == 0
    assert len(result(capsys)["accept_rates"]) == 2
    assert len(first["accept_rates"]) == 3


def test_a_killed_run_is_resumed_with_the_same_options_only(
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    loaded: LoadedModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, more = tmp_path / "killed", ("--epochs", "200", "--save-interval", "5")
    argv = train_argv(distilled_file, output, model_dir, *SMALL, *more, "--num-threads", "1")
    kill_when_exists(argv, output / STATE_FILE)
    assert train(distilled_file, output, model_dir, *more, "--learning-rate", "0.5") == 2
    assert "learning_rate 0.002, but now it is 0.5" in error_text(capsys)
    assert train(distilled_file, output, model_dir, *more, "--num-threads", "1") == 0
    assert "goes on after step" in error_text(capsys)
    assert train(distilled_file, tmp_path / "whole", model_dir, *more) == 0
    ours, expected = (checkpoint(d, loaded).heads for d in (output, tmp_path / "whole"))
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_no_number_has_an_exit_status_of_its_own(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = Path(shutil.copytree(model_dir, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.embed_tokens.weight"][200] = math.nan
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    line = {"id": "a", "turns": [{"prompt_token_ids": [1, 200], "token_ids": [5, 6, 7]}]}
    data = write_lines(tmp_path / "data.jsonl", [line])
    assert train(data, tmp_path / "heads", spoilt, "--held-out", "0") == 3
    assert "step 1: the loss is nan" in error_text(capsys)


def test_several_files_train_and_measure_as_one(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    lines = distilled_file.read_text().splitlines(keepends=True)
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for index, part in enumerate(parts):
        part.write_text("".join(lines[index::2]))
    output, second = tmp_path / "heads", ("--data", str(parts[1]))
    assert train(parts[0], output, model_dir, *second) == 0
    digest = load_acceptance(output)["data_sha256"]
    assert digest == data_sha256([open_data(part) for part in parts])
    assert evaluate(output, parts[0], model_dir, *second) == 0
    assert load_acceptance(output)["data_sha256"] == digest


def test_when_all_is_held_out_nothing_is_left_to_train_on(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"prompt_token_ids": [1], "token_ids": [5, 6, 7]}]
    names = (f"c{i}" for i in range(100))
    held_out = (
        n for n in names if split(Corpus((document(6, (2, 5), name=n),)), 0.4).held_out.documents
    )
    data = write_lines(tmp_path / "d.jsonl", [{"id": next(held_out), "turns": turns}])
    assert train(data, tmp_path / "heads", model_dir) == 2
    assert "every answer is held out" in error_text(capsys)


def test_without_held_out_conversations_the_heads_have_no_profile(
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    loaded: LoadedModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "heads"
    assert train(distilled_file, output, model_dir, "--held-out", "0") == 0
    assert "nothing was held out" in error_text(capsys)
    assert checkpoint(output, loaded).profile is None


def test_evaluation_writes_the_profile_and_keeps_the_weights(
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    loaded: LoadedModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "heads"
    assert train(distilled_file, output, model_dir, "--held-out", "0") == 0
    before = (output / "heads.safetensors").read_bytes()
    capsys.readouterr()
    assert evaluate(output, distilled_file, model_dir, "--num-ranks", "5") == 0
    printed = result(capsys)
    profile = checkpoint(output, loaded).profile
    assert profile is not None
    assert [len(rates_R) for rates_R in profile.accept_rates_KR] == [5, 5]
    assert profile.accept_rates_KR[0][0] == pytest.approx(printed["accept_rates"][0][0], abs=1e-4)
    assert (output / "heads.safetensors").read_bytes() == before
    assert set(printed["mean_acceptance_length"]) == set(map(str, TREE_SIZES))
    assert printed["mean_acceptance_length"]["1"] == 1.0
    saved = load_acceptance(output)
    assert saved["accept_rates"] == printed["accept_rates"]
    options = PROGRAM.parse(["evaluate", "--config", str(output / "evaluate.toml")]).arguments[
        "options"
    ]
    assert (options.heads, options.num_ranks) == (output, 5)
    assert saved["data_sha256"] == file_sha256(distilled_file)


def test_data_of_another_base_is_an_error_with_both_names(
    distilled_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model("llama", tmp_path / "other", seed=9)
    assert train(distilled_file, tmp_path / "heads", other) == 2
    message = error_text(capsys)
    assert "sampled weights differ" in message
    assert str(other) in message


def test_heads_of_another_base_are_an_error(
    heads_dir: Path, distilled_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model("llama", tmp_path / "other", seed=9)
    data = tmp_path / "data.jsonl"
    data.write_bytes(distilled_file.read_bytes())
    assert evaluate(heads_dir, data, other) == 2
    assert "another one" in error_text(capsys)


def test_data_without_manifest_is_trained_on_with_a_note(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(distilled_file.read_bytes())
    assert train(data, tmp_path / "heads", model_dir) == 0
    assert "has no manifest" in error_text(capsys)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a", "messages": []}], "line 1: messages is []"),
        ([{"prompt": "Hi"}], "line 1: has no answer"),
        ([], "has no rows"),
        (
            [{"id": "a", "turns": [{"prompt_token_ids": [1], "token_ids": [5]}]}],
            "no answer has two tokens",
        ),
        (
            [{"id": "a", "turns": [{"prompt_token_ids": [1], "token_ids": [5, 999]}]}],
            "'a' has token id 999",
        ),
    ],
)
def test_unusable_data_is_an_error_of_both_commands(
    lines: list[object],
    message: str,
    heads_dir: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_lines(tmp_path / "data.jsonl", lines)
    assert train(data, tmp_path / "heads", model_dir, "--held-out", "0") == 2
    assert message in error_text(capsys)
    assert evaluate(heads_dir, data, model_dir) == 2
    assert message in error_text(capsys)


def test_heads_that_are_not_there_are_an_error(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "absent", distilled_file, model_dir) == 2
    assert "give the directory of a heads checkpoint" in error_text(capsys)


def test_a_damaged_manifest_is_an_error(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(distilled_file.read_bytes())
    manifest = Manifest.load(distilled_file)
    assert manifest is not None
    replace(manifest, num_tokens=1).save(data)
    assert train(data, tmp_path / "heads", model_dir) == 0
    manifest_path(data).write_text("{}")
    assert train(data, tmp_path / "more", model_dir) == 2
    assert "is no manifest" in error_text(capsys)


def test_measured_heads_keep_their_adapter(
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
) -> None:
    adapter = save_tiny_adapter(model_dir, tmp_path / "adapter")
    heads = save_adapted_heads(model_dir, tmp_path / "heads", adapter)
    assert evaluate(heads, distilled_file, model_dir) == 0
    merged = load_model(str(model_dir), "cpu", "float32", heads)
    found = load_draft_heads(heads, merged)
    assert found.profile is not None
    assert found.adapter == adapter
