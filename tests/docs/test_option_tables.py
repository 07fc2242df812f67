import dataclasses
from typing import Any

import pytest

from server.api.config import ApiConfig, ServerConfig
from server.config import EngineConfig
from tests.docs.pages import (
    IDS,
    PAGES,
    code,
    code_lines,
    flags,
    help_text,
    options_of,
    page,
    prose,
    table,
)
from training.options import DistillOptions, EvaluateOptions, HiddenCacheOptions, TrainOptions

SERVE_TABLES = {"engine": EngineConfig, "api": ApiConfig, "server": ServerConfig}
# On the command line, where somebody waits for the server anyhow, the default is another one.
COMMAND_LINE_DEFAULTS = {"--compile": "auto"}
TRAINING = {"distill": DistillOptions, "train": TrainOptions, "evaluate": EvaluateOptions}
TRAINING_COMMANDS = ("distill", "train", "evaluate", "report", "convert")
BENCHES = (
    "latency",
    "acceptance",
    "exactness",
    "quality",
    "quantization",
    "overhead",
    "serving",
    "prefill",
    "peers",
)


def flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def defaults_of(config_type: type) -> dict[str, Any]:
    return {
        flag(item.name): item.default
        for item in dataclasses.fields(config_type)
        if item.default is not dataclasses.MISSING
    }


def is_shown(default: object, cell: str) -> bool:
    """Whether a table's cell says what the default is; for None it may be any words."""
    cell = code(cell)
    if default is None:
        return bool(cell) and cell != "required"
    if isinstance(default, bool):
        return cell == ("on" if default else "off")
    if isinstance(default, int | float):
        return float(cell) == default
    if isinstance(default, tuple):
        return cell == ",".join(str(part).removesuffix(".0") for part in default)
    return cell == str(default)


def test_the_tables_of_serving_have_the_options_of_the_command() -> None:
    text = page("serving.md")
    rows = [row for name in SERVE_TABLES for row in table(text, f"options: {name}")]
    assert {code(row["option"]) for row in rows} == options_of("euryale", "serve")
    assert len(rows) == len({row["option"] for row in rows})


@pytest.mark.parametrize("name", SERVE_TABLES)
def test_the_tables_of_serving_have_the_defaults_of_the_dataclasses(name: str) -> None:
    defaults = defaults_of(SERVE_TABLES[name]) | {
        option: value
        for option, value in COMMAND_LINE_DEFAULTS.items()
        if option in defaults_of(SERVE_TABLES[name])
    }
    rows = table(page("serving.md"), f"options: {name}")
    assert [code(row["option"]) for row in rows] == list(defaults)
    for row in rows:
        assert is_shown(defaults[code(row["option"])], row["default"]), row["option"]
        assert row["meaning"]


@pytest.mark.parametrize("name", SERVE_TABLES)
def test_the_tables_of_serving_have_the_environment_variables(name: str) -> None:
    for row in table(page("serving.md"), f"options: {name}"):
        variable = code(row["environment"])
        assert variable == f"EURYALE_{code(row['option'])[2:].replace('-', '_').upper()}"
        assert variable in help_text("euryale", "serve")


@pytest.mark.parametrize("command", TRAINING)
def test_the_tables_of_training_have_the_options_of_the_command(command: str) -> None:
    rows = table(page("training.md"), f"options: {command}")
    common = table(page("training.md"), "options: common")
    names = [code(row["option"]) for row in [*common, *rows]]
    assert set(names) == options_of("training", command)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("command", [*TRAINING, "common"])
def test_the_tables_of_training_have_the_defaults_of_the_dataclasses(command: str) -> None:
    options = TRAINING.get(command, HiddenCacheOptions)
    defaults = defaults_of(options)
    for row in table(page("training.md"), f"options: {command}"):
        option = code(row["option"])
        if option in defaults:
            assert is_shown(defaults[option], row["default"]), option
        else:
            assert row["default"] == "required", option


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_in_code_blocks_have_their_options(path: Any) -> None:
    for line in code_lines(path.read_text(encoding="utf-8")):
        words = line.split()
        for index, word in enumerate(words[:-1]):
            command = words[index + 1]
            if word.endswith("euryale") and command in ("serve", "generate"):
                program = "euryale"
            elif word == "training" and command in TRAINING_COMMANDS:
                program = "training"
            elif word == "bench" and command in BENCHES:
                program = "bench"
            else:
                continue
            known = flags(help_text(program, command))
            assert flags(" ".join(words[index:])) <= known, line


def test_options_that_pages_name_in_prose_exist() -> None:
    known = {"--build-arg", "--gpus", "--use_fsdp"}
    for command in ("serve", "generate"):
        known |= flags(help_text("euryale", command))
    for command in TRAINING_COMMANDS:
        known |= flags(help_text("training", command))
    for command in BENCHES:
        known |= flags(help_text("bench", command))
    for path in PAGES:
        unknown = flags(prose(path.read_text(encoding="utf-8"))) - known - {"--no-", "--use"}
        assert not unknown, f"{path.name}: {unknown}"
