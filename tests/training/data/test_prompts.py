from pathlib import Path
from typing import Any

import pytest

from tests.training.corpora import write_lines
from training.data.jsonl import read_rows
from training.data.prompts import Prompts, read_prompts
from training.errors import DataError


def read(tmp_path: Path, *lines: Any) -> list[Prompts]:
    return list(read_prompts(read_rows(write_lines(tmp_path / "prompts.jsonl", lines))))


def test_all_three_forms_give_user_turns(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    found = read(
        tmp_path,
        {"id": "m", "category": "x", "messages": user},
        {"question_id": 7, "turns": ["c"]},
        {"prompt": "d"},
    )
    assert found == [
        Prompts("m", "x", ("a", "b")),
        Prompts("7", "", ("c",)),
        Prompts("line-3", "", ("d",)),
    ]


def test_a_leading_system_message_is_kept(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert read(tmp_path, {"messages": messages})[0].system == "s"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x"}, "give one of messages, turns and prompt"),
        ({"prompt": "a", "turns": ["a"]}, "this line has turns and prompt"),
        ({"prompt": ""}, "prompt holds ''"),
        ({"prompt": 3}, "prompt holds 3"),
        ({"turns": []}, "at least one user turn"),
        ({"turns": "text"}, "turns is 'text'"),
        ({"turns": ["a", None]}, "turns holds None"),
        ({"messages": "hello"}, "give a list of objects"),
        ({"messages": []}, "at least one user turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "message 1 has role 'assistant'.*writes the answers itself",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "message 1 has role 'system'",
        ),
        ({"prompt": "a", "category": 1}, "category is 1"),
        ({"prompt": "a", "id": True}, "id is True"),
        ({"prompt": "a", "id": ""}, "id is ''"),
    ],
)
def test_a_wrong_line_is_an_error_that_names_line_and_value(
    tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s)prompts.jsonl, line 2: .*{message}"):
        read(tmp_path, {"prompt": "fine"}, line)


def test_two_lines_with_one_id_are_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3: id 'x' is also that of line 1"):
        read(tmp_path, {"id": "x", "prompt": "a"}, {"prompt": "b"}, {"id": "x", "prompt": "c"})
