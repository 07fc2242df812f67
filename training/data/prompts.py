"""Training prompts: the user's side of conversations, without answers.

A line is a JSON object with one of these fields:

    messages   list of {"role": "user", "content"}: the successive user turns of one conversation;
               a system message may come first
    turns      list of strings: the user turns
    prompt     one string: the only user turn

`id` (or `question_id`, or `task_id`) names the conversation; without it the line number does.
`category` is optional.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from training.data.jsonl import Row

_ID_FIELDS = ("id", "question_id", "task_id")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The user's side of one conversation.

    Attributes:
        id: Unique in its file.
        turns: User messages in order, at least one.
        system: Message that opens the conversation, or None.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    system: str | None = None


def read_prompts(rows: Iterable[Row]) -> Iterator[Prompts]:
    """Read prompts one conversation at a time.

    Raises:
        DataError: If a line holds no prompts, or two lines share an id.
    """
    lines: dict[str, int] = {}
    for row in rows:
        prompts = _prompts(row)
        if prompts.id in lines:
            raise row.error(
                f"id {prompts.id!r} is also that of line {lines[prompts.id]}; make ids unique"
            )
        lines[prompts.id] = row.number
        yield prompts


def _prompts(row: Row) -> Prompts:
    given = [name for name in ("messages", "turns", "prompt") if name in row.value]
    if len(given) != 1:
        found = " and ".join(given) or f"none of them but {', '.join(row.value) or 'no field'}"
        raise row.error(f"give one of messages, turns and prompt; this line has {found}")
    system: str | None = None
    value = row.value[given[0]]
    if given[0] == "messages":
        system, value = _from_messages(value, row)
    texts = [value] if given[0] == "prompt" else value
    if not isinstance(texts, list) or not texts:
        raise row.error(f"{given[0]} is {value!r}; give at least one user turn")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise row.error(f"{given[0]} holds {text!r}; give non-empty strings")
    name = given_id(row) or f"line-{row.number}"
    return Prompts(name, category_of(row), tuple(texts), system)


def category_of(row: Row) -> str:
    """Return a line's category; empty if it has none."""
    category = row.value.get("category", "")
    if not isinstance(category, str):
        raise row.error(f"category is {category!r}; give a string or leave it out")
    return category


def given_id(row: Row) -> str | None:
    """Return the id that a line has under any of the names for it; None if it has none."""
    for name in _ID_FIELDS:
        if name in row.value:
            value = row.value[name]
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                raise row.error(f"{name} is {value!r}; give a string or a whole number")
            return str(value)
    return None


def _from_messages(messages: Any, row: Row) -> tuple[str | None, list[Any]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise row.error(f"messages is {messages!r:.80}; give a list of objects")
    system: str | None = None
    turns = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role == "system" and index == 0 and isinstance(content, str):
            system = content
        elif role == "user":
            turns.append(content)
        else:
            raise row.error(
                f"message {index} has role {role!r}; give user messages only, and a system "
                "message only first: the model writes the answers itself"
            )
    return system, turns
