"""Benchmark prompts: conversations, and an even sample of them.

Files are those that `training distill` takes (`training.data.prompts`), except that answers in
`messages` are left out, because the model's own answers take their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heads.files import file_sha256
from training.data.jsonl import Row, read_rows
from training.data.prompts import read_prompts

SAMPLE_PATH = Path(__file__).parents[1] / "prompts" / "sample.jsonl"
UNCATEGORISED = "uncategorised"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The user's side of a dialogue.

    Attributes:
        line: Line in the file, from 1; identifies the conversation.
        turns: User messages in order, at least one.
        system: System message that opens the dialogue, or None.
    """

    line: int
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
        DataError: If the file is wrong.
    """
    prompts = read_prompt_set(data or SAMPLE_PATH)
    return Workload(prompts, tuple(sample_evenly(prompts.conversations, limit)))


def read_prompt_set(path: Path) -> PromptSet:
    """Read a file of conversations, gzip-compressed or not.

    Raises:
        DataError: If the file cannot be read or a line is no conversation; names the line.
    """
    rows = list(read_rows(path))
    conversations = tuple(
        Conversation(row.number, prompts.category or UNCATEGORISED, prompts.turns, prompts.system)
        for row, prompts in zip(rows, read_prompts(map(_without_answers, rows)), strict=True)
    )
    return PromptSet(path.name, file_sha256(path), conversations)


def _without_answers(row: Row) -> Row:
    messages = row.value.get("messages")
    if not isinstance(messages, list):
        return row
    kept = [m for m in messages if not (isinstance(m, dict) and m.get("role") == "assistant")]
    return replace(row, value={**row.value, "messages": kept})


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
