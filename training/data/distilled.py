"""The distilled format: conversations with the model's own answers, as exact token ids.

    FILE                  one JSON object per finished conversation: id, category, messages and,
                          for each assistant turn, its whole prompt and its answer as token ids
    FILE.manifest.json    which model wrote it, how it sampled, and how much there is

Text alone would not do: tokenising an answer again need not give the tokens that were drawn.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self

from heads.checkpoint import BaseFingerprint
from server.cli.values import Between, Count, Whole
from training.data.dataset import TokenizedConversation
from training.data.jsonl import Row, read_rows, replace_file
from training.errors import DataError

FORMAT = "euryale-distilled"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """One answer of the model.

    Attributes:
        prompt_token_ids: Everything before the answer, rendered by the chat template.
        token_ids: The answer; a token that ended it is included.
        text: The answer as text.
        finish_reason: `stop`, `length`, or `repeats` if it was cut because it went in circles.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class DistilledConversation:
    """A conversation with the model's answers.

    Attributes:
        system: Message that opens the conversation, or None.
        user_turns: User messages; as many as `turns`, or more where the conversation was cut short.
    """

    id: str
    category: str
    system: str | None
    user_turns: tuple[str, ...]
    turns: tuple[AssistantTurn, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(turn.token_ids) for turn in self.turns)

    def to_json(self) -> dict[str, Any]:
        """Return the line of this conversation as an object."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, turn in zip(self.user_turns, self.turns, strict=False):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": turn.text})
        turns = [
            {
                "prompt_token_ids": turn.prompt_token_ids,
                "token_ids": turn.token_ids,
                "finish_reason": turn.finish_reason,
            }
            for turn in self.turns
        ]
        return {"id": self.id, "category": self.category, "messages": messages, "turns": turns}


def read_distilled(path: Path) -> Iterator[TokenizedConversation]:
    """Read a distilled file one conversation at a time.

    Raises:
        DataError: If the file cannot be read or a line is not in the distilled format.
    """
    for row in read_rows(path):
        yield distilled_conversation(row)


def is_distilled(row: Row) -> bool:
    """Whether a line is in the distilled format, by its fields."""
    return "id" in row.value and "turns" in row.value


def distilled_conversation(row: Row) -> TokenizedConversation:
    """Read one line.

    Raises:
        DataError: If it is not in the distilled format.
    """
    if not is_distilled(row):
        raise row.error(
            f"has the fields {', '.join(row.value)}, but distilled data has id and turns; "
            "make it with `python -m training distill`"
        )
    turns = row.value["turns"]
    if not isinstance(turns, list) or not turns:
        raise row.error(f"turns is {turns!r:.80}; give at least one")
    category = str(row.value.get("category", ""))
    found = tuple(_turn(turn, row) for turn in turns)
    return TokenizedConversation(str(row.value["id"]), category, found, row.where)


def _turn(turn: Any, row: Row) -> tuple[list[int], list[int]]:
    if not isinstance(turn, dict):
        raise row.error(f"a turn is {turn!r:.80}; give objects with prompt_token_ids and token_ids")
    return _token_ids(turn, "prompt_token_ids", row), _token_ids(turn, "token_ids", row)


def _token_ids(turn: dict[str, Any], name: str, row: Row) -> list[int]:
    ids = turn.get(name)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise row.error(f"{name} is {ids!r:.80}; give a non-empty list of token ids")
    return ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Longest answer.
        temperatures: Each conversation has one of them, by its id; 0 is greedy.
        top_p: Probability mass of the nucleus.
        top_k: Most probable tokens that are kept; 0 keeps all.
        seed: Each answer's own seed derives from it.
        stop_repeats: Whether answers end that go in circles.
    """

    max_new_tokens: Count = 256
    temperatures: tuple[Annotated[float, Between(0, 2)], ...] = (0.0,)
    top_p: Annotated[float, Between(0, 1)] = 1.0
    top_k: Whole = 0
    seed: Whole = 0
    stop_repeats: bool = True


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `total`-th prompt from number `index` on, so that several runs share a file's work."""

    index: int = 0
    total: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.total}"


WHOLE = Shard()


def read_shard(text: str) -> Shard:
    """Read a shard as I/N, with I from 0.

    Raises:
        ValueError: If it is none.
    """
    index, slash, total = text.partition("/")
    if not (slash and index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise ValueError("give I/N with I from 0 and below N, such as 0/2")
    return Shard(int(index), int(total))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a distilled file holds and how it was made.

    Attributes:
        model: Name of the base model.
        fingerprint: Tells that base model from others.
        sampling: How the answers were drawn.
        prompts_sha256: Digest of the prompts file as it lies on disk, or of a data set's rows.
        chat_template_sha256: Digest of the template that rendered the prompts; empty if it was not
            recorded.
        shard: The part of the prompts that are answered in this file.
        tokens_by_category: Answer tokens of each category.
        prompts_origin: What is known of the data set of the prompts; empty if they were in a file.
        num_conversations: Conversations in the file.
        num_turns: Their answers.
        num_tokens: The tokens of these answers.
        num_skipped: Conversations whose first prompt does not fit the model's context.
        is_finished: Whether all prompts that were asked for are answered.
    """

    model: str
    fingerprint: BaseFingerprint
    sampling: Sampling
    prompts_sha256: str
    chat_template_sha256: str = ""
    shard: Shard = WHOLE
    tokens_by_category: Mapping[str, int] = field(default_factory=dict)
    prompts_origin: Mapping[str, str] = field(default_factory=dict)
    num_conversations: int = 0
    num_turns: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    is_finished: bool = False

    def difference(self, other: "Manifest") -> str | None:
        """Return None if answers of both may lie in one file, else what differs."""
        base = self.fingerprint.difference(other.fingerprint)
        if base is not None:
            return f"the base model: {self.model} against {other.model} ({base})"
        for item in fields(Sampling):
            mine, theirs = getattr(self.sampling, item.name), getattr(other.sampling, item.name)
            if mine != theirs:
                return f"{item.name}: {mine} against {theirs}"
        if self.shard != other.shard:
            return f"the shard: {self.shard} against {other.shard}"
        if self.prompts_sha256 != other.prompts_sha256:
            return f"the prompts: sha256 {self.prompts_sha256} against {other.prompts_sha256}"
        templates = (self.chat_template_sha256, other.chat_template_sha256)
        if all(templates) and templates[0] != templates[1]:
            return f"the chat template: sha256 {templates[0]} against {templates[1]}"
        return None

    def save(self, data: Path) -> None:
        """Write the manifest of a distilled file, whole or not at all."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        replace_file(manifest_path(data), (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, data: Path) -> Self | None:
        """Read the manifest of a distilled file; None if there is none.

        Raises:
            DataError: If it is damaged or of another format.
        """
        path = manifest_path(data)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_bytes())
            kind = (content.pop("format"), content.pop("format_version"))
            if kind != (FORMAT, FORMAT_VERSION):
                raise ValueError(f"format is {kind}, not {(FORMAT, FORMAT_VERSION)}")
            base = content["fingerprint"]
            content["fingerprint"] = BaseFingerprint(**base | {"samples": tuple(base["samples"])})
            sampling = content["sampling"]
            temperatures = tuple(sampling["temperatures"])
            content["sampling"] = Sampling(**sampling | {"temperatures": temperatures})
            content["shard"] = Shard(**content.get("shard", {}))
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no manifest of a distilled file ({error!r}); distill into a new file"
            ) from error


def manifest_path(data: Path) -> Path:
    """Where the manifest of a distilled file lies."""
    return data.with_name(f"{data.name}.manifest.json")
