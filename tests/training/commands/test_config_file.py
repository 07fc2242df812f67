import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from training.__main__ import main
from training.commands.config_file import save_config
from training.commands.options import (
    ConvertOptions,
    DistillOptions,
    EvaluateOptions,
    Options,
    ReportOptions,
    TrainOptions,
    parse_options,
)
from training.data.distilled import Shard

TRAIN = TrainOptions(data=(Path("a.jsonl"), Path("b.jsonl.gz")), output=Path("heads"))
DISTILL = DistillOptions(data=Path("p.jsonl"), output=Path("d.jsonl"))


def write(directory: Path, *lines: str) -> Path:
    path = directory / "run.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parse(command: str, path: Path, *more: str) -> Options:
    return parse_options([command, "--config", str(path), *more])


def test_a_file_may_hold_what_the_command_requires(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = ["a.jsonl", "b.jsonl.gz"]', 'output = "heads"')
    assert parse("train", path) == TRAIN
    assert parse_options(["train", f"--config={path}"]) == TRAIN


def test_one_file_of_data_needs_no_list(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = "a.jsonl"', 'output = "heads"')
    assert parse("train", path) == replace(TRAIN, data=(Path("a.jsonl"),))


def test_every_kind_of_value_arrives(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'data = "p.jsonl"',
        'output = "d.jsonl"',
        "limit = 5",
        'shard = "1/2"',
        "temperatures = [0, 0.7]",
        "top-p = 1",
        'method = "medusa"',
        "stop-repeats = false",
        "num-threads = 2",
        "[category-weights]",
        "math = 2",
        '"open qa" = 0.5',
    )
    assert parse("distill", path) == replace(
        DISTILL,
        limit=5,
        shard=Shard(1, 2),
        temperatures=(0.0, 0.7),
        top_p=1.0,
        method="medusa",
        stop_repeats=False,
        num_threads=2,
        category_weights={"math": 2.0, "open qa": 0.5},
    )
    path = write(tmp_path, 'data = "p.jsonl"', 'output = "d.jsonl"', "temperatures = 0.5")
    assert parse("distill", path) == replace(DISTILL, temperatures=(0.5,))


def test_the_command_line_wins_and_replaces_lists(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = ["a", "b"]', 'output = "x"', "cache = false", "epochs = 9")
    found = parse("train", path, "--data", "c", "--epochs", "3", "--cache")
    assert found == TrainOptions(data=(Path("c"),), output=Path("x"), epochs=3, cache=True)


def test_what_neither_names_is_still_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("train", write(tmp_path, 'output = "heads"'))
    assert "the following arguments are required: --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", TRAIN),
        (
            "train",
            replace(TRAIN, learning_rate=1e-05, max_grad_norm=0.0, cache=False, draft_vocab_size=0),
        ),
        ("distill", DISTILL),
        (
            "distill",
            replace(
                DISTILL,
                shard=Shard(2, 3),
                temperatures=(0.0, 0.0, 0.7),
                category_weights={"math": 2.0, "open qa": 0.5, 'quo"te': 0.0, "": 1.0},
                stop_repeats=False,
            ),
        ),
        ("evaluate", EvaluateOptions(heads=Path('odd "name\\ 你好\n\x7f'), data=(Path("d"),))),
        ("convert", ConvertOptions(source=Path("s"), output=Path("h"), model="m", device="cpu")),
        ("report", ReportOptions(heads=Path("h"), output=Path("p.html"))),
    ],
)
def test_saved_options_are_read_again_as_they_were(
    command: str, options: Options, tmp_path: Path
) -> None:
    path = tmp_path / "saved.toml"
    save_config(path, command, options)
    assert parse(command, path) == options


def test_a_saved_file_does_not_drop_the_run_that_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    save_config(path, "train", replace(TRAIN, overwrite=True))
    assert parse("train", path) == TRAIN
    assert path.read_text().startswith("# python -m training train --config train.toml\n")


def test_only_whole_names_of_options_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, 'data = "a"', 'output = "h"')
    with pytest.raises(SystemExit, match="2"):
        parse_options(["train", "--conf", str(path), "--data", "a", "--output", "h"])
    assert "unrecognized arguments: --conf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean epochs?"),
        ("learning_rate = 0.1", "unknown key 'learning_rate'; did you mean learning-rate"),
        ("no-cache = true", "unknown key 'no-cache'; did you mean cache"),
        ("zzz = 1", "unknown key 'zzz'; --help lists all options"),
        ("help = true", "unknown key 'help'"),
        ('config = "x"', "unknown key 'config'"),
        ("[train]", "unknown key 'train'"),
        ('epochs = "3"', "epochs is '3': give a whole number"),
        ("epochs = 3.0", r"epochs is 3\.0: give a whole number"),
        ("epochs = true", "epochs is True: give a whole number"),
        ("epochs = 0", "epochs is 0: '0' is no count"),
        ("epochs = [3]", r"epochs is \[3\]: give a whole number"),
        ("learning-rate = 2", "learning-rate is 2: 2 is out of range; give 0 to 1"),
        ("learning-rate = nan", "learning-rate is nan: nan is out of range"),
        ("learning-rate = false", "learning-rate is False: give a number"),
        ("cache = 1", "cache is 1: give true or false"),
        ('overwrite = "yes"', "overwrite is 'yes': give true or false"),
        ("data = 7", "data is 7: give a string"),
        ('data = ["a", 7]', r"data is \['a', 7\]: give a string"),
        ('device = "tpu"', "device is 'tpu': give one of auto, cpu, cuda"),
        ("model = 1", "model is 1: give a string"),
        ("epochs 3", "cannot be read: Expected '='"),
        ("epochs = 3\nepochs = 4", "cannot be read: Cannot overwrite a value"),
    ],
)
def test_a_wrong_file_is_refused_by_file_key_and_value(
    line: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"run.toml:? {message}"):
        parse("train", write(tmp_path, line), "--data", "a", "--output", "h")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temperatures = [0, 3.0]", r"3\.0 is out of range; give 0 to 2"),
        ("temperatures = []", "'' is no number"),
        ("temperatures = [true]", "give a number"),
        ("category-weights = {math = -1}", "-1 is out of range"),
        ("category-weights = {math = 'x'}", "give a number"),
        ("category-weights = 3", "give a string"),
        ('shard = "2/2"', "'2/2' is no shard"),
        ('method = "magic"', "give one of auto, none"),
    ],
)
def test_lists_tables_and_parts_pass_the_checks_of_the_command_line(
    line: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("distill", write(tmp_path, line), "--data", "a", "--output", "b")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_ends_the_command_with_a_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    assert main(["train", "--config", str(path)]) == 2
    noted = " ".join(capsys.readouterr().err.split())
    assert "error: " in noted
    assert "run.toml cannot be read" in noted


def test_the_written_file_is_plain_toml(tmp_path: Path) -> None:
    path = tmp_path / "saved.toml"
    save_config(path, "train", TRAIN)
    values: dict[str, Any] = tomllib.loads(path.read_text())
    assert values["data"] == ["a.jsonl", "b.jsonl.gz"]
    assert values["head-decay"] == TRAIN.head_decay
    assert "learning-rate" not in values
    assert "limit" not in values
