"""Values of command lines: each function reads one kind of value or says what is wrong with it."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from training.data.distilled import Shard


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a whole number from 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give one from 0")
    return int(text)


def shard(text: str) -> Shard:
    """Which part of how many, as I/N with I from 0."""
    index, slash, total = text.partition("/")
    if not (slash and index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shard; give I/N with I from 0 and below N, such as 0/2"
        )
    return Shard(int(index), int(total))


def temperatures(text: str) -> tuple[float, ...]:
    """Temperatures from 0 to 2, apart by commas."""
    return tuple(between(0.0, 2.0)(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names, apart by commas."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; give NAME,NAME")
    return found


def weights(text: str) -> dict[str, float]:
    """Pairs NAME=WEIGHT, apart by commas."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is no weight; give NAME=WEIGHT")
        weights[name.strip()] = between(0.0, 1000.0)(value)
    return weights


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a reader of numbers of that interval, both ends included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {low:g} to {high:g}")
        return value

    return parse


def adder(
    parser: argparse.ArgumentParser, options: Any
) -> tuple[Callable[..., None], Mapping[str, Any]]:
    """Return an `add_argument` that asks a dataclass for an option's default, and all defaults.

    An option without a default is required.
    """
    default = {item.name: item.default for item in fields(options) if item.default is not MISSING}

    def add(name: str, **settings: Any) -> None:
        field_name = name.replace("-", "_")
        if field_name in default:
            settings["default"] = default[field_name]
        else:
            settings["required"] = True
        parser.add_argument(f"--{name}", **settings)

    return add, default


def add_switch(parser: argparse.ArgumentParser, name: str, default: bool, summary: str) -> None:
    """Add an option that `--no-` turns off."""
    parser.add_argument(
        f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=summary
    )
