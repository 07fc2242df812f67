from pathlib import Path

import pytest
import torch

from server.model.loading import LoadedModel
from tests.training.corpora import PROMPT_LINES, document
from training.__main__ import main
from training.data.dataset import Corpus, build_corpus
from training.data.distilled import AssistantTurn, DistilledConversation, read_distilled
from training.loop.metrics import read_metrics
from training.states.document_states import DocumentStates
from training.states.hidden_capture import HiddenCapture
from training.states.hidden_states import HiddenStateEncoder

# A step of the engine computes other tokens too, by another attention, and drops none.
TOLERANCE = 1e-3


def distill(prompts: Path, output: Path, model: Path, *more: str) -> int:
    argv = ["distill", "--data", str(prompts), "--output", str(output), "--model", str(model)]
    return main([*argv, "--device", "cpu", "--max-new-tokens", "24", *more])


def documents_of(path: Path, loaded: LoadedModel) -> Corpus:
    return build_corpus(read_distilled(path), loaded.vocab_size)


def assert_close(kept: DocumentStates, corpus: Corpus, encoder: HiddenStateEncoder) -> None:
    documents = corpus.documents
    for ours, expected in zip(kept.read(documents), encoder.encode_all(documents), strict=True):
        torch.testing.assert_close(ours.float(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--concurrency", "2"),
        ("--temperatures", "0,0.9", "--seed", "3"),
        # Random answers go in circles and are cut short.
        ("--max-new-tokens", "200"),
        ("--max-new-tokens", "1"),
    ],
    ids=["all-at-once", "two-at-once", "sampled", "circles", "one-token"],
)
def test_training_finds_the_states_of_all_answers_that_were_written(
    more: tuple[str, ...],
    prompts_file: Path,
    model_dir: Path,
    loaded: LoadedModel,
    encoder: HiddenStateEncoder,
    tmp_path: Path,
) -> None:
    output, states = tmp_path / "answers.jsonl", tmp_path / "states"
    argv = (*more, "--hidden-cache", str(states))
    assert distill(prompts_file, output, model_dir, *argv) == 0
    corpus = documents_of(output, loaded)
    assert len(corpus.documents) >= len(PROMPT_LINES)
    kept = DocumentStates(states, loaded)
    assert kept.missing(corpus.documents) == []
    assert_close(kept, corpus, encoder)


def test_the_answers_and_the_losses_are_those_without(
    distilled_file: Path,
    prompts_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, states = tmp_path / "answers.jsonl", tmp_path / "states"
    kept = ("--hidden-cache", str(states))
    assert distill(prompts_file, output, model_dir, *kept) == 0
    assert sorted(output.read_text().splitlines()) == sorted(
        distilled_file.read_text().splitlines()
    )
    assert f'hidden-cache = "{states}"' in (tmp_path / "answers.jsonl.toml").read_text()
    files = sorted(states.iterdir())
    losses = []
    for name, more in (("plain", ()), ("kept", kept)):
        argv = ["train", "--data", str(output), "--output", str(tmp_path / name)]
        argv += ["--model", str(model_dir), "--device", "cpu", "--log-interval", "1"]
        assert main([*argv, "--draft-vocab-size", "100", *more]) == 0
        losses.append(torch.tensor([line["loss"] for line in read_metrics(tmp_path / name)]))
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert "missing" not in capsys.readouterr().err
    assert sorted(states.iterdir()) == files


def test_a_run_that_goes_on_adds_the_states_of_what_it_writes(
    prompts_file: Path,
    model_dir: Path,
    loaded: LoadedModel,
    encoder: HiddenStateEncoder,
    tmp_path: Path,
) -> None:
    output = tmp_path / "answers.jsonl"
    kept = ("--hidden-cache", str(tmp_path / "states"), "--hidden-cache-dtype", "bfloat16")
    assert distill(prompts_file, output, model_dir, *kept, "--limit", "5") == 0
    assert distill(prompts_file, output, model_dir, *kept) == 0
    corpus = documents_of(output, loaded)
    states = DocumentStates(tmp_path / "states", loaded, "bfloat16")
    assert states.missing(corpus.documents) == []
    for ours, expected in zip(
        states.read(corpus.documents), encoder.encode_all(corpus.documents), strict=True
    ):
        torch.testing.assert_close(ours.float(), expected, rtol=2.0**-7, atol=TOLERANCE)
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_a_type_without_a_directory_is_an_error(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--hidden-cache-dtype", "float16")
    assert distill(prompts_file, tmp_path / "a.jsonl", model_dir, *more) == 2
    assert "there is no directory to keep hidden" in " ".join(capsys.readouterr().err.split())


def turns(*pairs: tuple[list[int], list[int]]) -> DistilledConversation:
    answers = (AssistantTurn(tuple(p), tuple(a), "", "stop") for p, a in pairs)
    return DistilledConversation("c", "x", None, (), tuple(answers))


def test_turns_that_share_a_document_are_kept_once_and_others_apart(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    capture, kept = HiddenCapture(), DocumentStates(tmp_path, loaded)
    pairs = [([1, 5], [6, 7]), ([1, 5, 6, 7, 8], [9]), ([1, 8], [3, 4])]
    for prompt, answer in pairs:
        length = len(prompt + answer) - 1
        capture.take(prompt + answer, torch.full((length, loaded.hidden_size), float(length)))
    capture.keep(turns(*pairs), kept)
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []
    capture.flush(kept)
    whole, other = document(6, (2, 4)), document(4, (2, 4))
    whole.token_ids_T.copy_(torch.tensor([1, 5, 6, 7, 8, 9]))
    other.token_ids_T.copy_(torch.tensor([1, 8, 3, 4]))
    assert kept.missing([whole, other]) == []
    assert [states_XD[0, 0].item() for states_XD in kept.read([whole, other])] == [5.0, 3.0]


def test_answers_whose_states_were_not_taken_are_left_to_training(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    capture, kept = HiddenCapture(), DocumentStates(tmp_path, loaded)
    capture.keep(turns(([1, 5], [6, 7])), kept)
    capture.flush(kept)
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_is_written_at_once(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.states.document_states._FILE_BYTES", 5 * loaded.hidden_size * 4)
    capture, kept = HiddenCapture(), DocumentStates(tmp_path, loaded)
    counts = []
    for first in range(6):
        capture.take([first, 5, 6, 7], torch.zeros(3, loaded.hidden_size))
        capture.keep(turns(([first, 5], [6, 7])), kept)
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [0, 1, 1, 2, 2, 3]
