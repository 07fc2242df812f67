"""Turns settings dataclasses into the options of a command line.

A field `like_this` is the option `--like-this` (a switch also has `--no-like-this`), the
environment variable `EURYALE_LIKE_THIS` for commands that ask for it, and the key `like-this` of a
TOML file that `--config` names. The first of these that has a value wins: command line,
environment, file, default. A field without default is a required option. An option's help is the
field's entry in the `Attributes:` section of the dataclass's docstring; `server.cli.values` lists
the types that a field may have.

    program = Program("euryale", "An LLM inference server.", [
        Command("serve", "Serve a model.", serve, {"config": Settings(EngineConfig)}, "EURYALE")
    ])
    program.parse(sys.argv[1:]).run()        # calls serve(config=EngineConfig(...))

What is wrong is a `ConfigError` with the value and the remedy; nothing here prints an error.
"""

import argparse
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from server.cli.declarations import Choice, Command, Option, Settings
from server.cli.values import (
    POSITIONAL,
    REPEATED,
    Between,
    Count,
    ReadBy,
    Whole,
    is_bool,
    metavar,
    read_value,
    to_toml,
)
from server.errors import ConfigError

__all__ = [
    "POSITIONAL",
    "REPEATED",
    "Between",
    "Choice",
    "Command",
    "Count",
    "Parsed",
    "Program",
    "ReadBy",
    "Settings",
    "Whole",
    "to_toml_file",
]

# Where argparse puts what is no field's value.
_COMMAND, _FILE = "COMMAND", "FILE"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a command line asks for.

    Attributes:
        command: One of the program's.
        arguments: Instances of the dataclasses, by the names in `command.settings`.
    """

    command: Command
    arguments: Mapping[str, Any]

    def run(self) -> Any:
        """Run the command; returns what its function returns."""
        return self.command.run(**self.arguments)


@dataclass(frozen=True, slots=True)
class Program:
    """A command line of several sub-commands.

    Attributes:
        name: As it is typed.
        summary: One line of help.
        commands: In the order of the help.
    """

    name: str
    summary: str
    commands: Sequence[Command]

    def parse(self, argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Parsed:
        """Read a command line with its environment and its file; `--help` prints and exits with 0.

        Args:
            argv: Arguments, without the program's name.
            environ: Environment variables; an empty one counts as not set.

        Raises:
            ConfigError: If an option or a key of the file is unknown, missing or wrong.
            EuryaleError: If a dataclass rejects its values.
        """
        parser = _Parser(prog=self.name, description=self.summary)
        subparsers = parser.add_subparsers(dest=_COMMAND, metavar=_COMMAND)
        for command in self.commands:
            _add_command(subparsers, command)
        namespace, rest = parser.parse_known_args(argv)
        texts: dict[str, Any] = vars(namespace)
        name, path = texts.pop(_COMMAND, None), texts.pop(_FILE, None)
        found = [command for command in self.commands if command.name == name]
        if not found:
            names = ", ".join(command.name for command in self.commands)
            raise ConfigError(f"no {_COMMAND} is given; give one of {names}, or --help")
        options = found[0].options()
        if rest:
            meant = _meant(rest[0].partition("=")[0], [option.flag for option in options.values()])
            raise ConfigError(
                f"unrecognized arguments: {' '.join(rest)}; {meant}{self.name} {name} --help lists "
                "all options"
            )
        given = {} if path is None else _from_file(options, Path(path))
        given |= _from_environment(options, found[0].environment, environ)
        for key, text in texts.items():
            is_switch = isinstance(text, bool)
            given[key] = _Given(options[key].flag, text, is_text=not is_switch)
        return Parsed(found[0], _arguments(found[0], given))


def to_toml_file(
    command: Command, arguments: Mapping[str, Any], leave_out: Collection[str] = ()
) -> str:
    """Write the options of a command as TOML that `--config` reads again.

    Args:
        command: Whose options they are.
        arguments: As `Parsed.arguments`; fields that are None are not written.
        leave_out: Further fields that are not written.
    """
    lines: list[str] = []
    for argument, member in command.settings.items():
        settings = arguments[argument]
        if isinstance(member, Choice):
            chosen = next(name for name, kind in member.kinds.items() if type(settings) is kind)
            lines.append(f"{member.chooser().key} = {to_toml(chosen)}\n")
            options = member.options(chosen)
        else:
            options = member.options()
        for name, option in options.items():
            value = getattr(settings, name)
            if value is not None and name not in leave_out:
                lines.append(f"{option.key} = {to_toml(value)}\n")
    return "".join(lines)


class _Parser(argparse.ArgumentParser):
    """Splits a command line into the texts of its options, and writes the help."""

    def __init__(self, **settings: Any) -> None:
        formatter: Any = partial(argparse.HelpFormatter, max_help_position=30)
        super().__init__(
            **settings,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=formatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ConfigError(f"{message}; {self.prog} --help lists what can be given")


def _add_command(subparsers: Any, command: Command) -> None:
    parser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
    usage = ["%(prog)s [OPTION]..."]
    for title, options in command.groups():
        group = parser.add_argument_group(title)
        for option in options:
            settings: dict[str, Any] = {"help": _help(option, command.environment)}
            if option.is_positional:
                usage.append(option.flag)
                group.add_argument(option.name, metavar=option.flag, nargs="?", **settings)
                continue
            if is_bool(option.hint):
                settings["action"] = argparse.BooleanOptionalAction
            else:
                settings["metavar"] = metavar(option.hint)
                settings["action"] = "append" if option.is_repeated else "store"
            group.add_argument(option.flag, dest=option.name, **settings)
    if command.settings:
        summary = "TOML file with these options; command line and environment win over it"
        parser.add_argument("--config", dest=_FILE, metavar=_FILE, help=summary)
    parser.usage = " ".join(usage)


def _help(option: Option, prefix: str | None) -> str:
    notes = []
    if option.default is MISSING:
        notes.append("required")
    elif option.default not in (None, (), {}):
        is_several = isinstance(option.default, tuple)
        default = ",".join(map(str, option.default)) if is_several else str(option.default)
        notes.append(f"default: {default.lower() if is_bool(option.hint) else default}")
    if (variable := option.variable(prefix)) is not None:
        notes.append(variable)
    text = f"{option.help} [{'; '.join(notes)}]" if notes else option.help
    return text.replace("%", "%%")


@dataclass(frozen=True, slots=True)
class _Given:
    """A value of one of the sources, not read yet.

    Attributes:
        where: What an error names.
        is_text: Whether it is a text of the command line or the environment.
        is_ambient: Whether it is from the environment.
    """

    where: str
    value: Any
    is_text: bool
    is_ambient: bool = False

    def read(self, hint: Any) -> Any:
        try:
            return read_value(hint, self.value, self.is_text)
        except ValueError as error:
            raise ConfigError(f"{self.where} is {self.value!r}; {error}") from error


def _from_file(options: Mapping[str, Option], path: Path) -> dict[str, _Given]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a TOML file") from error
    name_of = {option.key: name for name, option in options.items()}
    for key in values:
        if key not in name_of:
            meant = _meant(key, list(name_of))
            raise ConfigError(f"{path}: unknown key {key!r}; {meant}--help lists all options")
    found = {name_of[key]: _Given(f"{path}: {key}", v, False) for key, v in values.items()}
    for name, given in found.items():
        # A value that the command line replaces is checked all the same.
        given.read(options[name].hint)
    return found


def _from_environment(
    options: Mapping[str, Option], prefix: str | None, environ: Mapping[str, str]
) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for name, option in options.items():
        variable = option.variable(prefix)
        if variable is not None and environ.get(variable):
            text = environ[variable]
            value = [text] if option.is_repeated else text
            found[name] = _Given(variable, value, is_text=True, is_ambient=True)
    return found


def _meant(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _arguments(command: Command, given: Mapping[str, _Given]) -> dict[str, Any]:
    """Make the dataclasses of a command."""
    made: list[tuple[str, type, dict[str, Any]]] = []
    missing: list[str] = []
    for argument, member in command.settings.items():
        values: dict[str, Any] = {}
        if isinstance(member, Settings):
            kind, options = member.kind, member.options()
            values |= member.defaults
        else:
            chosen = _chosen(member, given)
            kind, options = member.kinds[chosen], member.options(chosen)
        for name, option in options.items():
            if name in given:
                values[name] = given[name].read(option.hint)
            elif option.default is MISSING:
                missing.append(option.flag)
        made.append((argument, kind, values))
    if missing:
        raise ConfigError(f"not given but required: {', '.join(missing)}; --help lists all options")
    return {argument: kind(**values) for argument, kind, values in made}


def _chosen(choice: Choice, given: Mapping[str, _Given]) -> str:
    """The value of an option that chooses; checks that no options of another value are given."""
    chooser = choice.chooser()
    if choice.option in given:
        chosen: str = given[choice.option].read(chooser.hint)
    elif choice.default is not None:
        chosen = choice.default
    else:
        raise ConfigError(f"not given but required: {chooser.flag}; give {metavar(chooser.hint)}")
    for name, owners in choice.owners().items():
        if name in given and chosen not in owners and not given[name].is_ambient:
            raise ConfigError(
                f"{given[name].where} is an option of {chooser.flag} {' or '.join(owners)}, not of "
                f"{chooser.flag} {chosen}; leave it out or choose differently"
            )
    return chosen
