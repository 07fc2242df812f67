"""Texts that may come in parts, as messages and predictions do."""

from typing import Any, Literal

from server.api.schemas.base import RequestBody, invalid_value, unsupported_value


class TextPart(RequestBody):
    """A part of a text."""

    type: Literal["text"]
    text: str


def joined_text(value: Any) -> Any:
    """Join a list of text parts as they stand; anything else is left to its own validation."""
    if not isinstance(value, list):
        return value
    return "".join(_text(part) for part in value)


def _text(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text), **rest} if not rest:
            return text
        case {"type": str(kind)} if kind != "text":
            raise unsupported_value(f"parts of type {kind!r} are not supported; give text parts")
        case _:
            raise invalid_value('give a string or a list of parts {"type": "text", "text": "..."}')
