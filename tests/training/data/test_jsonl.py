import gzip
import json
from pathlib import Path

import pytest

from tests.training.corpora import write_lines
from training.data.jsonl import LineAppender, drop_torn_line, read_rows, replace_file
from training.errors import DataError, RunError


def test_rows_come_in_order_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"b": "ü"}')
    rows = list(read_rows(path))
    assert [(row.number, row.value) for row in rows] == [(1, {"a": 1}), (4, {"b": "ü"})]


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert [row.value for row in read_rows(path)] == [{"a": 1}]


def test_a_broken_line_is_named_with_an_excerpt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": oops}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: no valid JSON .*oops"):
        list(read_rows(path))


def test_a_line_that_is_no_object_is_named_with_its_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: expected an object, got \[1, 2\]"):
        list(read_rows(write_lines(tmp_path / "rows.jsonl", [[1, 2]])))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="has no rows"):
        list(read_rows(path))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        list(read_rows(tmp_path / "absent.jsonl"))


def test_a_truncated_gzip_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", b""),
        (b"one\n", b"one\n"),
        (b"one\ntw", b"one\n"),
        (b"torn", b""),
        (b"one\n" + b"x" * 200_000, b"one\n"),
        (b"x" * 200_000 + b"\n" + b"y" * 70_000, b"x" * 200_000 + b"\n"),
    ],
    ids=["empty", "whole", "torn", "only-torn", "long-torn", "long-both"],
)
def test_only_an_unfinished_last_line_is_dropped(
    tmp_path: Path, content: bytes, expected: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert drop_torn_line(path) == len(content) - len(expected)
    assert path.read_bytes() == expected


def test_appended_lines_are_whole_and_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    for value in ({"text": "a\nb"}, {"text": "ü"}):
        with LineAppender(path) as file:
            file.append(value)
            assert path.read_bytes().endswith(b"\n")
            file.sync()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"text": "a\nb"},
        {"text": "ü"},
    ]


def test_replacing_a_file_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_a_full_disk_is_named_with_the_remedy() -> None:
    with (
        LineAppender(Path("/dev/full")) as file,
        pytest.raises(RunError, match=r"/dev/full cannot be written: No space left.*make room"),
    ):
        file.append({"a": 1})


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    with pytest.raises(RunError, match="directory cannot be written: Is a directory"):
        replace_file(path, b"data")
    assert list(tmp_path.iterdir()) == [path]
