import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.medusa import MedusaConfig, MedusaHeads
from heads.tree_search import best_tree
from server.model.loading import LoadedModel
from tests.training.corpora import corpus, document
from tests.training.launched import launch
from tests.training.running import error_text, kill_when_exists, train_argv
from training.__main__ import main
from training.data.dataset import Corpus, Document
from training.loop.metrics import read_metrics
from training.loop.run_state import STATE_FILE
from training.measure.acceptance import NUM_RANKS
from training.measure.calibration import CalibrationCounter
from training.measure.evaluate import evaluate, walk
from training.measure.ranking import rank_answers
from training.measure.validation import TREE_SIZE, acceptance_length, sample
from training.methods.drafts import MedusaDrafts
from training.states.hidden_states import HiddenStateEncoder, KeptStates

SMALL = ("--draft-vocab-size", "100", "--epochs", "40", "--num-threads", "1")
STOPPING = ("--early-stopping", "2", "--validation-interval", "3", "--save-interval", "4")


def argv_of(data: Path, output: Path, model: Path, *more: str) -> list[str]:
    return train_argv(data, output, model, *SMALL, *more)


def medusa(*more: str) -> tuple[str, ...]:
    return ("--num-heads", "2", "--batch-size", "32", *STOPPING, *more)


def validations(directory: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["validation"]["mean_acceptance_length"])
        for line in read_metrics(directory)
        if line["validation"]
    ]


def test_a_sample_depends_on_ids_and_ends_before_so_many_tokens() -> None:
    whole = corpus(40)
    found = sample(whole, max_tokens=100)
    num_tokens = sum(len(doc.token_ids_T) for doc in found.documents)
    assert 50 < num_tokens <= 100
    backwards = Corpus(tuple(reversed(whole.documents)))
    assert sample(backwards, 100).documents == found.documents
    # Not simply the first ones.
    assert found.documents != whole.documents[: len(found.documents)]


def test_a_sample_has_a_document_with_examples_if_there_is_any() -> None:
    short, long = document(8, (5, 6), name="short"), document(90, (5, 80), name="long")
    assert sample(Corpus((short, long)), max_tokens=10).documents == (long,)
    assert sample(Corpus((short,))).documents == ()
    assert sample(Corpus(())).documents == ()


class Counted:
    """An encoder that notes what it was asked for."""

    def __init__(self, encoder: HiddenStateEncoder) -> None:
        self.dtype = encoder.dtype
        self.asked: list[str] = []
        self._encoder = encoder

    def encode(self, documents: Sequence[Document]) -> list[torch.Tensor]:
        self.asked += [document.conversation_id for document in documents]
        return self._encoder.encode(documents)

    def encode_all(self, documents: Sequence[Document]) -> list[torch.Tensor]:
        self.asked += [f"all {document.conversation_id}" for document in documents]
        return self._encoder.encode_all(documents)

    def encode_answers(self, documents: Sequence[Document]) -> list[torch.Tensor]:
        return self._encoder.encode_answers(documents)


def test_kept_states_are_computed_once_and_are_the_encoders(encoder: HiddenStateEncoder) -> None:
    counted, documents = Counted(encoder), corpus(4).documents
    kept = KeptStates(counted)
    for chosen in (documents[:2], documents[::-1], documents):
        for ours, theirs in (
            (kept.encode(chosen), encoder.encode(chosen)),
            (kept.encode_all(chosen), encoder.encode_all(chosen)),
            (kept.encode_answers(chosen), encoder.encode_answers(chosen)),
        ):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)
    names = [document.conversation_id for document in documents]
    assert sorted(counted.asked) == sorted(names + [f"all {name}" for name in names])


def test_the_length_is_that_of_an_evaluation_with_as_many_nodes(
    loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=3)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    drafts, answers = MedusaDrafts(encoder, heads), corpus(30)
    found = acceptance_length(answers, drafts)
    ranked = rank_answers(answers, drafts, CalibrationCounter(3), lambda _: None)
    tree = best_tree(evaluate(ranked, NUM_RANKS).profile, TREE_SIZE)
    # The profile of an evaluation is refined with a larger tree.
    assert found == pytest.approx(walk(ranked, tree).mean_acceptance_length, rel=0.02)
    assert found > 1.0


@pytest.fixture(scope="module")
def stopped(
    distilled_file: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("stopping") / "whole"
    assert main(argv_of(distilled_file, output, model_dir, *medusa())) == 0
    return output


def test_a_run_is_measured_on_the_way_and_its_best_heads_are_saved(
    stopped: Path, distilled_file: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = validations(stopped)
    best = max(length for _, length in found)
    steps = [step for step, length in found if length == best]
    assert found[-1][0] - steps[0] == 6
    assert all(step % 3 == 0 for step, _ in found)


def test_a_run_of_two_processes_that_is_killed_stops_with_the_same_heads(
    stopped: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    argv = argv_of(distilled_file, output, model_dir, *medusa())
    first = launch(argv, tmp_path / "first")
    while not (output / STATE_FILE).exists():
        assert first.processes[0].is_alive(), first.text(0)
        time.sleep(0.001)
    first.kill()
    again = launch(argv, tmp_path / "again")
    assert again.wait() == [0, 0], again.text(0)
    assert "goes on after step" in again.text(0)
    assert "best after step" in again.text(0)
    # Rounding may move a candidate by a rank.
    ours, theirs = dict(validations(output)), dict(validations(stopped))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_a_killed_run_ends_with_the_heads_of_one_that_was_not(
    stopped: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    argv = argv_of(distilled_file, output, model_dir, *medusa())
    kill_when_exists(argv, output / STATE_FILE)
    assert main(argv) == 0
    assert validations(output) == validations(stopped)
    ours, theirs = ((path / "heads.safetensors").read_bytes() for path in (output, stopped))
    assert ours == theirs


@pytest.mark.parametrize("method", ["mtp", "medusa2"])
def test_other_methods_stop_early_too(
    method: str,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"mtp": ("--batch-tokens", "200"), "medusa2": ("--batch-size", "100")}[method]
    argv = argv_of(distilled_file, tmp_path, model_dir, "--method", method, *sizes, *STOPPING)
    assert main(argv) == 0
    printed = capsys.readouterr()
    found: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    lengths = validations(tmp_path)
    assert found["num_steps"] == lengths[-1][0]
    assert found["seconds"]["validation"] > 0.0
    best = max(length for _, length in lengths)
    assert f"{best:.4f} tokens per step" in " ".join(printed.err.split())


def test_early_stopping_needs_something_to_measure_on(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = argv_of(distilled_file, tmp_path, model_dir, *medusa("--held-out", "0"))
    assert main(argv) == 2
    message = "early_stopping is 2, but nothing is held out to measure on; give a larger --held-out"
    assert message in error_text(capsys)


def test_an_interval_without_early_stopping_is_an_error(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = argv_of(distilled_file, tmp_path, model_dir, "--validation-interval", "7")
    assert main(argv) == 2
    assert "validation_interval is 7, but without early_stopping" in error_text(capsys)
