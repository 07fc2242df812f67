import itertools
from dataclasses import MISSING
from pathlib import Path

import pytest

import euryale
from bench.__main__ import PROGRAM as BENCH
from server.cli.declarations import Option
from server.cli.program import PROGRAM as EURYALE
from tests.docs.pages import IDS, PAGES, code, code_lines, flags, page, prose, spans, table
from training.__main__ import PROGRAM as TRAINING

COMMANDS = {
    program: {command.name: command for command in commands.commands}
    for program, commands in {"euryale": EURYALE, "training": TRAINING, "bench": BENCH}.items()
}
SERVE_TABLES = ("engine", "api", "server")
TRAINING_TABLES = ("distill", "train", "evaluate")
# Options of other programs that pages name.
FOREIGN = {"--gpus", "--no-", "--strict", "--use"}


def options(program: str, command: str) -> dict[str, Option]:
    """Options of a command by the names that are typed."""
    return {option.flag: option for option in COMMANDS[program][command].options().values()}


def typed(program: str, command: str) -> set[str]:
    """All that may be typed for a command, `--no-...` too."""
    names = options(program, command)
    return {"--help", "--config", *names, *(f"--no-{name[2:]}" for name in names)}


def says_default(cell: str, option: Option) -> bool:
    """Whether a table's cell says the default; where there is none it may be any words."""
    shown, default = code(cell), option.default
    if default is MISSING or shown == "required":
        return default is MISSING and shown == "required"
    if default in (None, (), {}):
        return bool(shown)
    if isinstance(default, bool):
        return shown == ("on" if default else "off")
    if isinstance(default, int | float):
        return float(shown) == default
    if isinstance(default, tuple):
        return shown == ",".join(str(part).removesuffix(".0") for part in default)
    return shown == str(default)


def commands_in(line: str) -> list[tuple[str, str, str]]:
    """Commands of ours in a line of shell: program, command and the rest of the line."""
    words = line.split()
    pairs = [(Path(word).name, command) for word, command in itertools.pairwise(words)]
    return [
        (program, command, " ".join(words[index:]))
        for index, (program, command) in enumerate(pairs)
        if command in COMMANDS.get(program, ())
    ]


def test_the_tables_of_serving_have_the_options_of_the_command() -> None:
    text = page("serving.md")
    rows = [row for name in SERVE_TABLES for row in table(text, f"options: {name}")]
    known = options("euryale", "serve")
    assert sorted(code(row["option"]) for row in rows) == sorted(known)
    for row in rows:
        option = known[code(row["option"])]
        assert code(row["environment"]) == option.variable("EURYALE")
        assert says_default(row["default"], option), row["option"]
        assert row["meaning"]


def test_the_options_of_the_engine_are_those_of_generate_too() -> None:
    names = {code(row["option"]) for row in table(page("serving.md"), "options: engine")}
    assert names <= set(options("euryale", "generate"))


@pytest.mark.parametrize("command", TRAINING_TABLES)
def test_the_tables_of_training_have_the_options_of_the_command(command: str) -> None:
    text = page("training.md")
    rows = [*table(text, "options: common"), *table(text, f"options: {command}")]
    known = options("training", command)
    assert sorted(code(row["option"]) for row in rows) == sorted(known)
    for row in rows:
        assert says_default(row["default"], known[code(row["option"])]), row["option"]
        assert row["meaning"]


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_in_code_blocks_have_their_options(path: Path) -> None:
    for line in code_lines(path.read_text(encoding="utf-8")):
        for program, command, rest in commands_in(line):
            assert flags(rest) <= typed(program, command), line


def test_options_in_prose_are_options_of_some_command() -> None:
    known = {
        flag
        for program, commands in COMMANDS.items()
        for command in commands
        for flag in typed(program, command)
    }
    for path in PAGES:
        unknown = flags(prose(path.read_text(encoding="utf-8"))) - known - FOREIGN
        assert not unknown, path.name


def test_the_list_of_benches_is_complete() -> None:
    rows = table(page("benchmarks.md"), "benches")
    assert [code(row["command"]).split()[-1] for row in rows] == list(COMMANDS["bench"])


def test_the_quickstart_names_all_that_the_public_package_has() -> None:
    assert set(euryale.__all__) <= set(spans(page("quickstart.md")))
