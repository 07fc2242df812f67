import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heads.files import file_sha256
from server.model.loading import LoadedModel
from tests.support.log_lines import LogLines
from tests.support.tiny_models import MAX_MODEL_LEN
from tests.training.corpora import write_lines
from training.data.answers import check_base, data_sha256, load_answers
from training.data.data_source import open_data
from training.data.distilled import Manifest, Sampling, Shard, manifest_path, read_distilled
from training.errors import DataError


def two_parts(distilled_file: Path, directory: Path) -> tuple[Path, Path]:
    """The file's lines in two files, each with a manifest of its own shard."""
    lines = distilled_file.read_text().splitlines(keepends=True)
    manifest = Manifest.load(distilled_file)
    assert manifest is not None
    paths = (directory / "0.jsonl", directory / "1.jsonl")
    for index, path in enumerate(paths):
        path.write_text("".join(lines[index::2]))
        replace(manifest, shard=Shard(index, 2)).save(path)
    return paths


def test_files_are_read_one_after_the_other(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    paths = two_parts(distilled_file, tmp_path)
    found = load_answers(paths, loaded)
    expected = [c.id for path in paths for c in read_distilled(path)]
    assert list(dict.fromkeys(d.conversation_id for d in found.corpus.documents)) == expected
    whole = load_answers([distilled_file], loaded)
    assert found.corpus.num_answer_tokens == whole.corpus.num_answer_tokens


def test_the_limit_counts_over_all_files(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    paths = two_parts(distilled_file, tmp_path)
    num_first = len(list(read_distilled(paths[0])))
    for limit in (2, num_first + 1):
        found = load_answers(paths, loaded, limit)
        assert len({d.conversation_id for d in found.corpus.documents}) == limit


def test_one_file_has_its_own_digest_and_several_that_of_all_in_order(
    distilled_file: Path, tmp_path: Path
) -> None:
    a, b = two_parts(distilled_file, tmp_path)
    first, second = open_data(a), open_data(b)
    assert data_sha256([first]) == file_sha256(a)
    both = file_sha256(a) + file_sha256(b)
    assert data_sha256([first, second]) == hashlib.sha256(both.encode()).hexdigest()
    assert data_sha256([second, first]) != data_sha256([first, second])


def test_a_conversation_that_is_there_twice_is_an_error_with_both_places(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    a, b = two_parts(distilled_file, tmp_path)
    b.write_text(b.read_text() + a.read_text().splitlines(keepends=True)[1])
    num_lines = len(b.read_text().splitlines())
    name = list(read_distilled(a))[1].id
    with pytest.raises(DataError) as error:
        load_answers([a, b], loaded)
    assert str(error.value).startswith(f"{b}, line {num_lines}: conversation {name!r} is also at ")
    assert f"{a}, line 2;" in str(error.value)


def test_the_same_file_twice_is_an_error(distilled_file: Path, loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match=r"line 1: conversation .* is also at .*line 1; give each"):
        load_answers([distilled_file, distilled_file], loaded)


def test_every_file_must_be_of_the_base_model(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    a, b = two_parts(distilled_file, tmp_path)
    manifest = Manifest.load(b)
    assert manifest is not None
    other = replace(manifest.fingerprint, num_layers=9)
    replace(manifest, model="big", fingerprint=other).save(b)
    with pytest.raises(DataError, match=r"1\.jsonl holds answers of big, not of .*num_layers"):
        load_answers([a, b], loaded)


def test_files_of_different_prompts_and_sampling_may_be_joined(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    a, b = two_parts(distilled_file, tmp_path)
    manifest = Manifest.load(b)
    assert manifest is not None
    replace(manifest, sampling=Sampling(seed=5), prompts_sha256="1" * 64).save(b)
    assert load_answers([a, b], loaded).corpus.num_examples


def test_answers_too_short_to_learn_from_are_an_error_that_names_the_files(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    line = {"id": "a", "turns": [{"prompt_token_ids": [1], "token_ids": [5]}]}
    a = write_lines(tmp_path / "a.jsonl", [line])
    b = write_lines(tmp_path / "b.jsonl", [line | {"id": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl, .*b\.jsonl: no answer has two tokens"):
        load_answers([a, b], loaded)


def test_a_copy_without_manifest_gives_the_same_answers(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(distilled_file, tmp_path / "copy.jsonl"))
    assert not manifest_path(copy).exists()
    ours, expected = (load_answers([path], loaded) for path in (copy, distilled_file))
    assert ours.sha256 == expected.sha256
    assert ours.corpus.num_examples == expected.corpus.num_examples


SUPERVISED: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"prompt": "How many arms?", "completion": "Eight.", "id": "arms"},
]


def test_each_line_shows_by_its_fields_who_answered(
    distilled_file: Path, loaded: LoadedModel, tmp_path: Path, log: LogLines
) -> None:
    supervised = write_lines(tmp_path / "s.jsonl", SUPERVISED)
    alone = load_answers([supervised], loaded).corpus
    assert "manifest" not in " ".join(log.take())
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(supervised.read_bytes() + distilled_file.read_bytes())
    distilled = load_answers([distilled_file], loaded).corpus
    found = load_answers([mixed], loaded).corpus
    assert found.num_answer_tokens == alone.num_answer_tokens + distilled.num_answer_tokens
    assert " ".join(log.take()).split().count("manifest:") == 1
    eos = loaded.tokenizer.encode("Eight.<|endoftext|>")
    document = alone.documents[1]
    assert document.conversation_id == "arms"
    assert document.token_ids_T[document.spans[0].start :].tolist() == eos


def test_ids_are_unique_over_both_kinds_but_equal_lines_without_id_are_fine(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    twice = write_lines(tmp_path / "twice.jsonl", [SUPERVISED[0], SUPERVISED[0]])
    first, second = load_answers([twice], loaded).corpus.documents
    assert first.conversation_id == second.conversation_id
    turns = [{"prompt_token_ids": [1], "token_ids": [5, 6]}]
    lines = [SUPERVISED[1], {"id": "arms", "turns": turns}]
    with pytest.raises(DataError, match=r"line 2: conversation 'arms' is also at .*line 1"):
        load_answers([write_lines(tmp_path / "clash.jsonl", lines)], loaded)


def test_conversations_longer_than_the_context_are_left_out_and_named(
    loaded: LoadedModel, tmp_path: Path, log: LogLines
) -> None:
    long = {"prompt": "word " * 900, "completion": "Too long."}
    few = write_lines(tmp_path / "few.jsonl", [long, *SUPERVISED, long])
    assert len(load_answers([few], loaded).corpus.documents) == 2
    noted = " ".join(log.take())
    assert f"left out 2 conversations longer than the context of {MAX_MODEL_LEN} tokens" in noted
    assert "few.jsonl, line 1 (" in noted
    assert "few.jsonl, line 4 (" in noted
    many = write_lines(tmp_path / "many.jsonl", [SUPERVISED[0], *[long] * 7])
    load_answers([many], loaded)
    noted = " ".join(log.take())
    assert noted.count("many.jsonl") == 5
    assert noted.endswith("and so on")
    with pytest.raises(DataError, match="fits the context of 512"):
        load_answers([write_lines(tmp_path / "none.jsonl", [long])], loaded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"prompt": "Hi", "completion": "x y z"}\n{"prompt": ', "line 2: no valid JSON"),
        ('{"prompt": "Hi", "completion": "x y z"}\n[]', "line 2: expected an object"),
    ],
)
def test_a_broken_file_is_an_error_with_file_and_line(
    content: str, message: str, loaded: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=f"broken.jsonl.*{message}"):
        load_answers([path], loaded)


def test_data_of_the_same_base_passes_whatever_its_name(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    Manifest("another/name", loaded.fingerprint, Sampling(), "0").save(data)
    check_base(data, loaded)


def test_data_of_another_base_is_an_error_that_says_what_differs(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    Manifest("big", replace(loaded.fingerprint, num_layers=9), Sampling(), "0").save(data)
    with pytest.raises(DataError, match=r"answers of big, not of .*num_layers is 9"):
        check_base(data, loaded)
