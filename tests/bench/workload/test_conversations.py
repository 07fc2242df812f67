import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workload.conversations import (
    SAMPLE_PATH,
    UNCATEGORISED,
    Conversation,
    load_workload,
    read_prompt_set,
    sample_evenly,
)
from tests.bench.traces import make_conversation
from training.errors import DataError


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path: Path, row: Any) -> Conversation:
    return read_prompt_set(write_rows(tmp_path / "rows.jsonl", row)).conversations[0]


def test_spec_bench_rows_keep_their_turns_and_category(tmp_path: Path) -> None:
    row = {"question_id": 81, "category": "writing", "turns": ["One.", "Two."], "reference": []}
    assert read_one(tmp_path, row) == Conversation(1, "writing", ("One.", "Two."))


def test_user_messages_are_the_turns_and_the_models_answers_are_left_out(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Answer."},
        {"role": "user", "content": "Two."},
    ]
    found = read_one(tmp_path, {"id": "x-1", "messages": messages})
    assert found == Conversation(1, UNCATEGORISED, ("One.", "Two."), "Be brief.")


def test_a_prompt_is_a_single_turn(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"prompt": "def f():"}).turns == ("def f():",)


def test_a_row_with_two_sets_of_turns_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this line has turns and prompt"):
        read_one(tmp_path, {"prompt": "b", "turns": ["a"]})


def test_compressed_files_are_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.data"
    path.write_bytes(gzip.compress(b'{"prompt": "hello"}\n'))
    assert read_prompt_set(path).conversations[0].turns == ("hello",)


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b"}')
    assert [c.line for c in read_prompt_set(path).conversations] == [2, 4]


def test_line_separators_inside_a_text_do_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read_prompt_set(path).conversations[0].turns == ("a\u2028b\u0085c",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected an object, got [1]"),
        ({"question": "?"}, "this line has none of them but question"),
        ({"turns": []}, "turns is []; give at least one user turn"),
        ({"turns": "hello"}, "turns is 'hello'; give at least one user turn"),
        ({"turns": ["ok", "  "]}, "turns holds '  '"),
        ({"turns": [3]}, "turns holds 3"),
        ({"prompt": None}, "prompt holds None"),
        ({"prompt": "a", "category": 7}, "category is 7"),
        ({"messages": "hello"}, "messages is 'hello'; give a list of objects"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 has role 'tool'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "message 1 has role 'system'",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "give at least one user turn"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages holds ["),
    ],
)
def test_a_bad_row_is_rejected_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(DataError) as error_info:
        read_prompt_set(path)
    assert str(error_info.value).startswith(f"{path}, line 2: ")
    assert message in str(error_info.value)


def test_broken_json_is_rejected_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(DataError, match="line 2: no valid JSON"):
        read_prompt_set(path)


def test_bytes_that_are_no_text_are_rejected_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="line 1: no valid JSON"):
        read_prompt_set(path)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="has no rows"):
        read_prompt_set(path)


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_prompt_set(tmp_path / "none.jsonl")


def test_a_damaged_compressed_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "hello"}\n' * 50)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_prompt_set(path)


def test_the_shipped_prompts_cover_eight_categories_evenly() -> None:
    prompts = read_prompt_set(SAMPLE_PATH)
    counts = Counter(c.category for c in prompts.conversations)
    assert len(prompts.conversations) == 24
    assert set(counts.values()) == {3}
    assert sum(len(c.turns) > 1 for c in prompts.conversations) == 3
    assert len({c.turns for c in prompts.conversations}) == 24


def test_the_shipped_prompts_are_the_default() -> None:
    workload = load_workload(None, limit=8)
    described = workload.describe()
    assert (described["data"], described["num_rows"], described["num_prompts"]) == (
        "sample.jsonl",
        24,
        8,
    )
    assert len({c.category for c in workload.conversations}) == 8


def test_a_workload_names_its_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "b"})
    described = load_workload(path, None).describe()
    assert (described["data"], described["num_prompts"]) == ("rows.jsonl", 2)
    assert len(described["data_sha256"]) == 64


def rows_of(**counts: int) -> list[Conversation]:
    rows: list[Conversation] = []
    for category, count in counts.items():
        for _ in range(count):
            line = len(rows) + 1
            rows.append(make_conversation(f"text {line}", line=line, category=category))
    return rows


def test_without_a_limit_everything_is_taken() -> None:
    rows = rows_of(a=3, b=1)
    assert sample_evenly(rows, None) == rows
    assert sample_evenly(rows, 9) == rows


def test_a_sample_keeps_each_categorys_share() -> None:
    sample = sample_evenly(rows_of(a=56, b=56, c=28), 10)
    assert Counter(c.category for c in sample) == {"a": 4, "b": 4, "c": 2}


def test_a_sample_takes_the_middle_of_equal_stretches() -> None:
    assert [c.line for c in sample_evenly(rows_of(a=12), 3)] == [3, 7, 11]


def test_interleaved_categories_are_sampled_as_if_sorted() -> None:
    rows = rows_of(a=6, b=6)
    mixed = [row for pair in zip(rows[:6], rows[6:], strict=True) for row in pair]
    assert Counter(c.category for c in sample_evenly(mixed, 4)) == {"a": 2, "b": 2}


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), limit=st.integers(1, 40))
def test_a_sample_is_distinct_in_file_order_and_fair(counts: list[int], limit: int) -> None:
    rows = rows_of(**{f"c{index}": count for index, count in enumerate(counts)})
    sample = sample_evenly(rows, limit)
    lines = [c.line for c in sample]
    assert lines == sorted(set(lines))
    assert len(sample) == min(limit, len(rows))
    taken = Counter(c.category for c in sample)
    for index, count in enumerate(counts):
        share = count * len(sample) / len(rows)
        assert abs(taken[f"c{index}"] - share) < 1
