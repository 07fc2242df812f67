"""Options in a TOML file: read to begin a run with, written to say how a run was made.

Keys are the options of the command line without the dashes before them, `learning-rate = 0.002`.
Values pass the same checks; where both name an option the command line wins. Paths are relative to
the working directory, as on the command line.

    switches          true or false
    several values    a list, or one value: data, temperatures, lora-targets
    pairs             a table: category-weights = {math = 2}
"""

import argparse
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from server.errors import ConfigError
from training.data.jsonl import replace_file

# It says what to do to a directory, not how a run is made; a saved one would drop its own run.
_NOT_SAVED = {"overwrite"}


class OptionParser(argparse.ArgumentParser):
    """The options of one command, by name, from the command line and from a file."""

    def __init__(self, **settings: Any) -> None:
        self._option_of: dict[str, argparse.Action] = {}
        super().__init__(**settings, allow_abbrev=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an option that a file may name too."""
        action = super().add_argument(*names, **settings)
        self._option_of[action.dest.replace("_", "-")] = action
        return action

    def add_config(self) -> None:
        """Add the option that names the file."""
        super().add_argument("--config", type=Path, metavar="TOML", help="file with these options")

    def read_config(self, path: Path, options: type) -> dict[str, Any]:
        """Read a file; its options are no longer required on the command line, and have no default.

        Args:
            path: Of the file.
            options: Dataclass with the types of the values.

        Returns:
            Values by the names of the dataclass's fields.

        Raises:
            ConfigError: If the file is no TOML, or a key or value is wrong.
        """
        type_of = get_type_hints(options)
        values: dict[str, Any] = {}
        for key, value in _read(path).items():
            action = self._option_of.get(key)
            if action is None or action.dest not in type_of:
                close = get_close_matches(key, self._option_of, n=3, cutoff=0.5)
                meant = f"did you mean {' or '.join(close)}? " if close else ""
                raise ConfigError(f"{path}: unknown key {key!r}; {meant}--help lists all options")
            try:
                values[action.dest] = _value(action, type_of[action.dest], value)
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise ConfigError(f"{path}: {key} is {value!r}: {error}") from error
            action.required, action.default = False, argparse.SUPPRESS
        return values


def config_path(argv: Sequence[str]) -> Path | None:
    """The file that a command line names, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path: Path | None = parser.parse_known_args(argv)[0].config
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a TOML file") from error


def _value(action: argparse.Action, kind: Any, value: Any) -> Any:
    """One option's value, through the converter of the command line.

    Raises:
        argparse.ArgumentTypeError: If it is of another type.
    """
    if get_origin(kind) is types.UnionType:
        kind = get_args(kind)[0]
    if kind is bool:
        return _typed(value, bool, "true or false")
    origin = get_origin(kind)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        texts = [_text(get_args(kind)[0], item) for item in items]
        # Sources of data are one argument of the command line each, other values are one together.
        if Path not in get_args(get_args(kind)[0]):
            return _converted(action, ",".join(texts))
        return tuple(_converted(action, text) for text in texts)
    if origin is Mapping and isinstance(value, dict):
        return _converted(action, ",".join(f"{k}={_text(float, v)}" for k, v in value.items()))
    return _converted(action, _text(kind, value))


def _text(kind: Any, value: Any) -> str:
    """A value as the command line would have it."""
    if kind is int:
        return str(_typed(value, int, "a whole number"))
    if kind is float:
        return repr(_typed(value, int | float, "a number"))
    text: str = _typed(value, str, "a string")
    return text


def _typed(value: Any, kind: Any, wanted: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise argparse.ArgumentTypeError(f"give {wanted}")
    return value


def _converted(action: argparse.Action, text: str) -> Any:
    value = action.type(text) if callable(action.type) else text
    if action.choices is not None and value not in action.choices:
        raise argparse.ArgumentTypeError(f"give one of {', '.join(action.choices)}")
    return value


def save_config(path: Path, command: str, options: Any) -> None:
    """Write all options of a run, so that `--config` reads them again.

    Args:
        path: Of the file; replaced whole.
        command: That the options are of.
        options: Dataclass; what is None is left out.

    Raises:
        RunError: If the file cannot be written.
    """
    lines = [f"# python -m training {command} --config {path.name}"]
    for item in fields(options):
        value = getattr(options, item.name)
        if value is not None and item.name not in _NOT_SAVED:
            lines.append(f"{item.name.replace('_', '-')} = {_toml(value)}")
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_toml(k)} = {_toml(v)}' for k, v in value.items())}}}"
    # A JSON string is a TOML string, but for this one character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
