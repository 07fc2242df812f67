import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from tests.training.corpora import PROMPT_LINES, write_lines
from training.__main__ import main
from training.data.data_source import (
    HubData,
    OpenData,
    check_columns,
    data_source,
    open_data,
    table_rows,
)
from training.data.distilled import Manifest, read_distilled
from training.errors import DataError

pytestmark = pytest.mark.slow

NAME = "hf:someone/questions:hard@v2#train"


@dataclass
class Table:
    """What of the library's tables we call, over rows in memory: absent fields are null there."""

    values: Sequence[Mapping[str, Any]]
    _fingerprint: str = "f00d"
    column_names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.column_names = sorted({name for row in self.values for name in row})

    def select_columns(self, names: list[str]) -> Self:
        return type(self)([{n: r[n] for n in r if n in names} for r in self.values])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({name: row.get(name) for name in self.column_names} for row in self.values)


class Library(SimpleNamespace):
    """Stands where the `datasets` library is imported from."""

    def __init__(self, *rows: Mapping[str, Any], version: str = "4.0.0") -> None:
        super().__init__(__version__=version, rows=rows, calls=[])
        self.exceptions = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(self, *names: Any, **options: Any) -> Table:
        self.calls.append((names, options))
        if self.rows:
            return Table(self.rows)
        raise self.exceptions.DatasetsError("no such data set")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library(*PROMPT_LINES)
    monkeypatch.setitem(sys.modules, "datasets", found)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:owner/name#train", HubData("owner/name", "train")),
        ("hf:owner/name:en#test", HubData("owner/name", "test", "en")),
        ("hf:owner/name@main#test", HubData("owner/name", "test", None, "main")),
        (NAME, HubData("someone/questions", "train", "hard", "v2")),
        ("hf:o/n@refs/pr/1#train[:10%]", HubData("o/n", "train[:10%]", None, "refs/pr/1")),
        ("hf:./here#train", HubData("./here", "train")),
    ],
)
def test_a_data_set_is_named_in_one_word(text: str, expected: HubData) -> None:
    assert data_source(text) == expected
    assert str(expected) == text


def test_anything_else_is_a_file() -> None:
    assert data_source("a.jsonl") == Path("a.jsonl")
    assert data_source("hf/a#b.jsonl") == Path("hf/a#b.jsonl")


@pytest.mark.parametrize("text", ["hf:", "hf:owner/name", "hf:#train", "hf:o/n#", "hf:o:a:b#train"])
def test_a_broken_name_is_an_error_with_the_right_form(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="is no name of a data set; give hf:NAME"):
        data_source(text)
    assert main(["distill", "--data", text, "--output", "d.jsonl"]) == 2
    assert "give hf:NAME[:CONFIG][@REVISION]#SPLIT" in " ".join(capsys.readouterr().err.split())


def test_rows_are_those_of_a_file_without_what_is_null() -> None:
    messages = [{"role": "user", "content": "Hi", "name": None}]
    first, second = table_rows(
        [{"id": 3, "messages": messages, "prompt": None}, {"id": 4, "messages": []}], "hf:o/n#train"
    )
    assert first.value == {"id": 3, "messages": [{"role": "user", "content": "Hi"}]}
    assert (second.where, second.number) == ("hf:o/n#train, row 2", 2)
    assert messages[0]["name"] is None


def test_a_table_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="hf:o/n#train has no rows"):
        list(table_rows([], "hf:o/n#train"))


def test_columns_of_other_data_are_an_error_that_names_them() -> None:
    with pytest.raises(DataError, match="has the columns text, label; expected messages, turns or"):
        check_columns(["text", "label"], "hf:o/n#train")
    check_columns(["text", "prompt"], "hf:o/n#train")


def test_the_digest_is_of_what_the_rows_say() -> None:
    def digest(*rows: Mapping[str, Any]) -> str:
        return OpenData(HubData("o/n", "train"), {}, rows).sha256()

    a, b = {"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}
    assert digest(a, b) == digest({"id": 1, "prompt": "a", "turns": None}, b)
    assert len({digest(a, b), digest(b, a), digest(a), digest(a, {**b, "prompt": "c"})}) == 4


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'euryale\[datasets\]'"):
        open_data(HubData("o/n", "train"))


def test_a_library_that_runs_code_of_data_sets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Library(version="3.6.0"))
    with pytest.raises(DataError, match="is installed, which runs code of data sets"):
        open_data(HubData("o/n", "train"))


def test_a_data_set_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Library())
    with pytest.raises(DataError, match="hf:o/n#train cannot be read: no such data set; check"):
        open_data(HubData("o/n", "train"))


def test_the_library_is_asked_for_what_was_named_and_for_known_columns(library: Library) -> None:
    library.rows = ({"prompt": "a", "picture": object()},)
    opened = open_data(data_source(NAME))
    assert library.calls == [
        (("someone/questions", "hard"), {"split": "train", "revision": "v2"}),
    ]
    assert [row.value for row in opened.rows()] == [{"prompt": "a"}]
    assert opened.origin == {
        "dataset": "someone/questions",
        "config": "hard",
        "revision": "v2",
        "split": "train",
        "fingerprint": "f00d",
    }


def distill(data: str, output: Path, model: Path) -> int:
    argv = ["distill", "--data", data, "--output", str(output), "--model", str(model)]
    return main([*argv, "--device", "cpu", "--max-new-tokens", "24"])


def test_prompts_of_a_data_set_are_answered_like_those_of_a_file(
    library: Library,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "answers.jsonl"
    assert distill(NAME, output, model_dir) == 0
    ours, theirs = ({c.id: c.turns for c in read_distilled(p)} for p in (output, distilled_file))
    assert ours == theirs
    manifest = Manifest.load(output)
    assert manifest is not None
    assert manifest.prompts_origin["dataset"] == "someone/questions"
    assert manifest.prompts_sha256 == open_data(data_source(NAME)).sha256()
    # Taken up again, it wants the same rows.
    library.rows = (*PROMPT_LINES[:-1], {"id": "new", "prompt": "Another?"})
    assert distill(NAME, output, model_dir) == 2
    assert "the prompts: sha256" in " ".join(capsys.readouterr().err.split())


def test_heads_learn_from_a_data_set_as_from_a_file(
    library: Library, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    pairs = [
        {"prompt": f"Which token is {i}?", "completion": f"Token {i} it is."} for i in range(6)
    ]
    library.rows = tuple(pairs)
    argv = ["--model", str(model_dir), "--device", "cpu", "--epochs", "1", "--held-out", "0"]
    argv += ["--num-threads", "1", "--data", str(distilled_file)]
    other = write_lines(tmp_path / "pairs.jsonl", pairs)
    for name, data in (("table", NAME), ("file", str(other))):
        assert main(["train", "--data", data, "--output", str(tmp_path / name), *argv]) == 0
    table, file = (tmp_path / name / "heads.safetensors" for name in ("table", "file"))
    assert table.read_bytes() == file.read_bytes()
    argv = ["--heads", str(tmp_path / "table"), "--model", str(model_dir), "--device", "cpu"]
    assert main(["evaluate", "--data", NAME, *argv]) == 0
    acceptance = json.loads((tmp_path / "table" / "acceptance.json").read_text())
    assert acceptance["num_answers"] == len(pairs)
