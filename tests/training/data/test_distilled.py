import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heads.checkpoint import BaseFingerprint
from tests.training.corpora import write_lines
from training.data.distilled import (
    WHOLE,
    AssistantTurn,
    DistilledConversation,
    Manifest,
    Sampling,
    Shard,
    manifest_path,
    read_distilled,
)
from training.errors import DataError

BASE = BaseFingerprint("llama", 2, 8, 32, (0.5, -0.25))
MANIFEST = Manifest(
    "tiny", BASE, Sampling(), "0" * 64, "a", Shard(1, 2), {"chat": 7}, num_conversations=3
)
TURN = {"prompt_token_ids": [1, 2], "token_ids": [3]}


def conversation(system: str | None = None) -> DistilledConversation:
    return DistilledConversation(
        "c1",
        "chat",
        system,
        ("hello", "and?", "unanswered"),
        (
            AssistantTurn((1, 5), (6, 7, 2), "hi", "stop"),
            AssistantTurn((1, 5, 6, 7, 2, 8), (9,), "yes", "length"),
        ),
    )


def test_a_conversation_comes_back_with_its_exact_tokens(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [conversation().to_json()])
    (found,) = read_distilled(path)
    assert (found.id, found.category, found.num_tokens) == ("c1", "chat", 4)
    assert found.turns == (([1, 5], [6, 7, 2]), ([1, 5, 6, 7, 2, 8], [9]))


def test_messages_hold_the_answered_part_of_the_dialogue() -> None:
    roles = [message["role"] for message in conversation("be nice").to_json()["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation().to_json()["messages"][-1] == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x", "messages": []}, "has the fields id, messages, but distilled data"),
        ({"turns": [TURN]}, "has the fields turns"),
        ({"id": "x", "turns": []}, r"turns is \[\]"),
        ({"id": "x", "turns": ["text"]}, "a turn is 'text'"),
        ({"id": "x", "turns": [{"token_ids": [3]}]}, "prompt_token_ids is None"),
        ({"id": "x", "turns": [TURN | {"token_ids": []}]}, r"token_ids is \[\]"),
        ({"id": "x", "turns": [TURN | {"token_ids": [-1]}]}, r"token_ids is \[-1\]"),
        ({"id": "x", "turns": [TURN | {"token_ids": [True]}]}, r"token_ids is \[True\]"),
    ],
)
def test_a_line_of_another_format_is_an_error_with_line_and_value(
    tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"line 1: {message}"):
        list(read_distilled(write_lines(tmp_path / "d.jsonl", [line])))


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path / "d.jsonl")
    assert Manifest.load(tmp_path / "d.jsonl") == MANIFEST


def test_a_manifest_from_before_there_were_shards_is_of_the_whole_file(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path / "d.jsonl")
    path = manifest_path(tmp_path / "d.jsonl")
    content = json.loads(path.read_text())
    del content["shard"]
    path.write_text(json.dumps(content))
    assert Manifest.load(tmp_path / "d.jsonl") == replace(MANIFEST, shard=WHOLE)


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path / "d.jsonl") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other", "format_version": 1}'])
def test_a_damaged_manifest_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    manifest_path(tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"d\.jsonl\.manifest\.json is no manifest"):
        Manifest.load(tmp_path / "d.jsonl")


def test_an_unknown_field_in_a_manifest_is_an_error(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path / "d.jsonl")
    path = manifest_path(tmp_path / "d.jsonl")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1}))
    with pytest.raises(DataError, match="surprise"):
        Manifest.load(tmp_path / "d.jsonl")


def test_counts_do_not_keep_two_runs_apart() -> None:
    assert MANIFEST.difference(replace(MANIFEST, num_tokens=9, is_finished=True)) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            replace(MANIFEST, sampling=Sampling(temperatures=(0.5,))),
            r"temperatures: \(0.0,\) against \(0.5,\)",
        ),
        (replace(MANIFEST, sampling=Sampling(max_new_tokens=8)), "max_new_tokens: 256 against 8"),
        (replace(MANIFEST, shard=Shard(0, 2)), "the shard: 1/2 against 0/2"),
        (replace(MANIFEST, prompts_sha256="1" * 64), "the prompts: sha256"),
        (replace(MANIFEST, chat_template_sha256="b"), "the chat template: sha256 a against b"),
        (
            replace(MANIFEST, model="big", fingerprint=replace(BASE, hidden_size=16)),
            "the base model: tiny against big .*hidden_size is 8 against 16",
        ),
    ],
)
def test_what_keeps_two_runs_apart_is_named(other: Manifest, message: str) -> None:
    difference = MANIFEST.difference(other)
    assert difference is not None
    assert re.search(message, difference)
