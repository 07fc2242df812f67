"""Values of options: how a type is read from the text of a command line or from TOML, and written.

bool                               true or false; the environment also has yes, no, on, off, 1, 0
int, float, str, Path
Literal["a", "b"]                  one of these words
A | B                              the first that fits; None is no value, only a default
tuple[A, ...]                      a list; as text separated by commas
Annotated[tuple[A, ...], REPEATED] a list; on the command line the option is given several times
Mapping[str, A]                    a table; as text NAME=VALUE,NAME=VALUE
Annotated[A, Between(0, 1)]        a number in an interval
Annotated[A, ReadBy(f, "I/N")]     what the function `f` makes of a string
Annotated[A, POSITIONAL]           an argument of the command line without a name
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

REPEATED = "repeated"
POSITIONAL = "positional"
_TRUE, _FALSE = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")
_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
}
_METAVARS: Mapping[Any, str] = {bool: "BOOL", int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True, slots=True)
class Between:
    """An interval that a number has to lie in.

    Attributes:
        low: Smallest number.
        high: Largest number; infinity itself is never taken.
        excludes_low: Whether `low` itself is too small.
    """

    low: float
    high: float = math.inf
    excludes_low: bool = False

    def allows(self, number: float) -> bool:
        """Whether a number lies in the interval; NaN does not."""
        is_above = number > self.low if self.excludes_low else number >= self.low
        return is_above and number <= self.high and math.isfinite(number)

    def __str__(self) -> str:
        low = f"{'above' if self.excludes_low else 'from'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} {'and at most' if self.excludes_low else 'to'} {self.high:g}"


@dataclass(frozen=True, slots=True)
class ReadBy:
    """A function that reads strings of a syntax of its own; `str()` of its result writes them.

    Attributes:
        read: Called with the string; raises ValueError or an error of ours that says the remedy.
        metavar: Placeholder in help, such as `I/N`.
    """

    read: Callable[[str], Any]
    metavar: str


Count = Annotated[int, Between(1)]
Whole = Annotated[int, Between(0)]


def read_value(hint: Any, value: Any, is_text: bool) -> Any:
    """Read one option's value.

    Args:
        hint: The option's type, one of those that the module's docstring lists.
        value: A string of the command line or the environment, for a repeated option a list of
            them; or what TOML has.
        is_text: Whether `value` is from the command line or the environment, where a number is a
            string too.

    Raises:
        ValueError: If the value does not fit; the message says what to give.
        EuryaleError: If a `ReadBy` function raises one.
    """
    try:
        return _read(hint, value, is_text)
    except _Misfit:
        raise ValueError(f"give {describe(hint)}") from None


class _Misfit(Exception):
    """A value does not fit its type."""


def _read(hint: Any, value: Any, is_text: bool) -> Any:
    base, markers = _unwrapped(hint)
    origin, arguments = get_origin(base), get_args(base)
    if (reader := _reader(markers)) is not None:
        return reader.read(_typed(value, str))
    if origin in (Union, UnionType):
        return _read_union(base, value, is_text)
    if origin is tuple:
        return tuple(_read(arguments[0], item, is_text) for item in _items(value, is_text))
    if origin is Mapping:
        pairs = _pairs(value) if is_text else _typed(value, dict)
        return {name: _read(arguments[1], part, is_text) for name, part in pairs.items()}
    if origin is Literal:
        words = {str(word): word for word in arguments}
        if str(value) not in words or (not is_text and value not in arguments):
            raise _Misfit
        return words[str(value)]
    found = _from_text(base, value) if is_text else _from_toml(base, value)
    if any(isinstance(marker, Between) and not marker.allows(found) for marker in markers):
        raise _Misfit
    return found


def _read_union(hint: Any, value: Any, is_text: bool) -> Any:
    for member in _members(hint):
        with suppress(_Misfit):
            return _read(member, value, is_text)
    raise _Misfit


def _items(value: Any, is_text: bool) -> list[Any]:
    if is_text and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    items = value if isinstance(value, list) else [value]
    if not items or "" in items:
        raise _Misfit
    return items


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise _Misfit
    return {name.strip(): value.strip() for name, _, value in pairs}


def _from_text(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise _Misfit
        return text.lower() in _TRUE
    if kind is int and not re.fullmatch(r"[+-]?[0-9]+", text):
        raise _Misfit
    try:
        return kind(text)
    except ValueError as error:
        raise _Misfit from error


def _from_toml(kind: type, value: Any) -> Any:
    if kind is float:
        return float(_typed(value, int, float))
    return kind(_typed(value, str if kind is Path else kind))


def _typed(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _Misfit
    return value


def _reader(markers: tuple[Any, ...]) -> ReadBy | None:
    return next((marker for marker in markers if isinstance(marker, ReadBy)), None)


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its markers, and without None if only one type is left; and the markers."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[0], hint.__metadata__
    if get_origin(hint) in (Union, UnionType):
        members = _members(hint)
        if len(members) == 1:
            return _unwrapped(members[0])
    return hint, ()


def _members(hint: Any) -> list[Any]:
    return [member for member in get_args(hint) if member is not NoneType]


def has_marker(hint: Any, marker: str) -> bool:
    """Whether a type is marked as `REPEATED` or `POSITIONAL`."""
    return any(isinstance(found, str) and found == marker for found in _unwrapped(hint)[1])


def is_bool(hint: Any) -> bool:
    """Whether an option of this type is a switch."""
    return _unwrapped(hint)[0] is bool


def describe(hint: Any) -> str:
    """What to give for a type, in words, such as `a whole number from 1`."""
    base, markers = _unwrapped(hint)
    origin, arguments = get_origin(base), get_args(base)
    if (reader := _reader(markers)) is not None:
        return reader.metavar
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in _members(base))
    if origin is Literal:
        words = [str(word) for word in arguments]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is tuple:
        return f"{describe(arguments[0])}, or several of them"
    if origin is Mapping:
        return f"NAME=VALUE pairs, each value {describe(arguments[1])}"
    return " ".join([_NAMES[base], *(str(m) for m in markers if isinstance(m, Between))])


def metavar(hint: Any) -> str:
    """A type's placeholder in help, such as `N` or `auto|cpu|cuda`."""
    base, markers = _unwrapped(hint)
    origin, arguments = get_origin(base), get_args(base)
    if (reader := _reader(markers)) is not None:
        return reader.metavar
    if origin in (Union, UnionType):
        return "|".join(metavar(member) for member in _members(base))
    if origin is Literal:
        return "|".join(str(word) for word in arguments)
    if origin is tuple:
        item = metavar(arguments[0])
        return item if REPEATED in markers else f"{item},..."
    if origin is Mapping:
        return f"NAME={metavar(arguments[1])},..."
    return _METAVARS[base]


def to_toml(value: Any) -> str:
    """Write a value that is not None, so that `read_value` reads it again."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{to_toml(name)} = {to_toml(part)}" for name, part in value.items())
        return f"{{{', '.join(pairs)}}}"
    # A JSON string is a TOML string, but for this one character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
