"""Benchmark prompts: reads JSON lines and samples them evenly.

A row is a conversation. Its user turns come from the first of these fields that it has:

    turns      list of strings (Spec-Bench, MT-bench)
    messages   list of {"role", "content"}: user messages are the turns and a leading system
               message is kept; assistant messages are left out, because the model's own answers
               take their place
    prompt     one string

`category` is optional, and `question_id` or `id` names the row.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError

SAMPLE_PATH = Path(__file__).parents[1] / "prompts" / "sample.jsonl"
UNCATEGORISED = "uncategorised"
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The user's side of a dialogue.

    Attributes:
        line: Line in the file, from 1; identifies the conversation.
        name: The row's own id, or its line.
        turns: User messages in order, at least one.
        system: System message that opens the dialogue, or None.
    """

    line: int
    name: str
    category: str
    turns: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """All conversations of a file.

    Attributes:
        file_name: Name of the file, without its directory.
        sha256: Hex digest of the file as it lies on disk.
    """

    file_name: str
    sha256: str
    conversations: tuple[Conversation, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt file and the part of it that a bench runs."""

    prompts: PromptSet
    conversations: tuple[Conversation, ...]

    def describe(self) -> dict[str, Any]:
        """Fields of the report: rows of the file, prompts sampled."""
        return {
            "data": self.prompts.file_name,
            "data_sha256": self.prompts.sha256,
            "num_rows": len(self.prompts.conversations),
            "num_prompts": len(self.conversations),
        }


def load_workload(data: Path | None, limit: int | None) -> Workload:
    """Read and sample prompts.

    Args:
        data: JSON lines; None takes the prompts that ship with the package.
        limit: Number of conversations to sample; None takes all.

    Raises:
        BenchError: If the file is wrong.
    """
    prompts = read_prompts(data or SAMPLE_PATH)
    return Workload(prompts, tuple(sample_evenly(prompts.conversations, limit)))


def read_prompts(path: Path) -> PromptSet:
    """Read a file of conversations, gzip-compressed or not.

    Raises:
        BenchError: If the file cannot be read or a line is no conversation; names the line.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data
    except (OSError, EOFError, zlib.error) as error:
        raise BenchError(f"cannot read {path}: {error}; give a JSON lines file") from error
    conversations = tuple(
        _conversation(line, f"{path.name}, line {number}", number)
        for number, line in enumerate(text.split(b"\n"), start=1)
        if line.strip()
    )
    if not conversations:
        raise BenchError(f"{path} has no rows; give a JSON lines file with at least one")
    return PromptSet(path.name, hashlib.sha256(data).hexdigest(), conversations)


def sample_evenly(conversations: Sequence[Conversation], limit: int | None) -> list[Conversation]:
    """Take `limit` conversations so that each category keeps its share; no randomness.

    The conversations are ordered by category (categories by first appearance, file order inside),
    cut into `limit` equal stretches, and the middle one of each stretch is taken. The sample comes
    back in file order.
    """
    if limit is None or limit >= len(conversations):
        return list(conversations)
    rank: dict[str, int] = {}
    for conversation in conversations:
        rank.setdefault(conversation.category, len(rank))
    ordered = sorted(conversations, key=lambda c: rank[c.category])
    chosen = [ordered[(2 * i + 1) * len(ordered) // (2 * limit)] for i in range(limit)]
    return sorted(chosen, key=lambda c: c.line)


def _conversation(line: bytes, where: str, number: int) -> Conversation:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BenchError(f"{where}: no valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise BenchError(f"{where}: expected an object, got {type(row).__name__}")
    category = row.get("category", UNCATEGORISED)
    if not isinstance(category, str):
        raise BenchError(f"{where}: category is {category!r}; give a string or leave it out")
    system, turns = _user_side(row, where)
    name = row.get("question_id", row.get("id", number))
    return Conversation(number, str(name), category, turns, system)


def _user_side(row: dict[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
    """The system message and the user turns of a row."""
    if "turns" in row:
        return None, _checked_texts(row["turns"], "turns", where)
    if "messages" in row:
        return _from_messages(row["messages"], where)
    if "prompt" in row:
        return None, _checked_texts([row["prompt"]], "prompt", where)
    raise BenchError(
        f"{where}: has none of turns, messages and prompt (fields: {', '.join(row) or 'none'})"
    )


def _from_messages(messages: Any, where: str) -> tuple[str | None, tuple[str, ...]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BenchError(f"{where}: messages must be a list of objects with role and content")
    system: str | None = None
    turns: list[Any] = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role == "system" and index == 0:
            system = _checked_texts([content], "messages", where)[0]
        elif role == "user":
            turns.append(content)
        elif role != "assistant":
            raise BenchError(
                f"{where}: message {index} has role {role!r}; give user or assistant, and system "
                "only first"
            )
    return system, _checked_texts(turns, "messages", where)


def _checked_texts(texts: Any, field: str, where: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not texts:
        raise BenchError(f"{where}: {field} holds no user text; give at least one")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise BenchError(f"{where}: {field} holds {text!r}; give non-empty strings")
    return tuple(texts)
