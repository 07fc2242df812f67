"""The options of all commands: on the command line, in a file and saved."""

import re
import tomllib
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError, EuryaleError
from tests.training.running import error_text
from training.__main__ import PROGRAM, main
from training.commands.common import ModelOptions, save_options
from training.commands.convert import ConvertOptions
from training.commands.distill import DistillOptions
from training.commands.evaluate import EvaluateOptions
from training.commands.report import ReportOptions
from training.commands.train import TRAIN as TRAIN_COMMAND
from training.commands.train_options import TrainOptions
from training.data.data_source import HubData
from training.data.distilled import Sampling, Shard
from training.errors import DataError, RunError
from training.loop.trainer import TrainConfig
from training.methods.medusa import Medusa
from training.methods.medusa2 import Medusa2
from training.methods.mtp import MTP
from training.methods.table import METHODS
from training.states.hidden_cache import HiddenCacheOptions

DISTILL = ["distill", "--data", "p.jsonl", "--output", "d.jsonl"]
TRAIN = ["train", "--data", "d.jsonl", "--output", "heads"]
EVALUATE = ["evaluate", "--heads", "heads", "--data", "d.jsonl"]
REPORT = ["report", "--heads", "heads"]
CONVERT = ["convert", "--source", "original", "--output", "heads"]
ALL = (DISTILL, TRAIN, EVALUATE, REPORT, CONVERT)
TRAIN_OPTIONS = TrainOptions(data=(Path("d.jsonl"),), output=Path("heads"))


def parsed(*argv: str) -> dict[str, Any]:
    return dict(PROGRAM.parse(argv, {}).arguments)


def write(directory: Path, *lines: str) -> Path:
    path = directory / "run.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_defaults_are_those_of_the_dataclasses() -> None:
    data, heads = Path("d.jsonl"), Path("heads")
    cache = HiddenCacheOptions()
    assert parsed(*DISTILL) == {
        "options": DistillOptions(data=Path("p.jsonl"), output=data),
        "sampling": Sampling(),
        "cache": cache,
    }
    train = {"options": TRAIN_OPTIONS, "config": TrainConfig(), "method": Medusa()}
    assert parsed(*TRAIN) == train
    assert parsed(*EVALUATE) == {
        "options": EvaluateOptions(heads=heads, data=(data,)),
        "cache": cache,
    }
    convert = ConvertOptions(source=Path("original"), output=heads)
    assert parsed(*CONVERT) == {"options": convert}
    assert parsed(*REPORT) == {"options": ReportOptions(heads=heads)}


@pytest.mark.parametrize("argv", ALL)
def test_every_field_is_an_option_with_help(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = list(parsed(*argv).values())
    if argv is TRAIN:
        arguments += [method() for method in METHODS.values()]
    with pytest.raises(SystemExit, match="0"):
        parsed(argv[0], "--help")
    text = capsys.readouterr().out
    names = {item.name.replace("_", "-") for settings in arguments for item in fields(settings)}
    assert names <= set(re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE))


def test_required_options_are_those_without_a_default() -> None:
    for argv in ALL:
        arguments = parsed(*argv).values()
        required = {f.name for each in arguments for f in fields(each) if f.default is MISSING}
        assert {f"--{name}" for name in required} == {a for a in argv if a.startswith("--")}
        for position in range(1, len(argv), 2):
            with pytest.raises(ConfigError, match=f"required: {argv[position]}"):
                parsed(*argv[:position], *argv[position + 2 :])


def test_options_arrive_where_they_are_used() -> None:
    more = ["--temperatures", "0,0.5", "--category-weights", "math=2,chat=0.5", "--seed", "3"]
    found = parsed(*DISTILL, *more, "--max-new-tokens", "9", "--no-stop-repeats", "--shard", "1/3")
    sampling = Sampling(max_new_tokens=9, temperatures=(0.0, 0.5), seed=3, stop_repeats=False)
    assert found["sampling"] == sampling
    assert found["options"].shard == Shard(1, 3)
    assert found["options"].category_weights == {"math": 2.0, "chat": 0.5}
    found = parsed(*TRAIN, "--epochs", "7", "--batch-size", "5", "--no-cache")
    assert found["config"] == TrainConfig(epochs=7)
    assert found["method"] == Medusa(batch_size=5)
    assert found["options"] == replace(TRAIN_OPTIONS, cache=False)


def test_a_method_has_its_own_options_and_defaults() -> None:
    found = parsed(*TRAIN, "--method", "mtp", "--batch-tokens", "9", "--seed", "3")
    assert found["method"] == MTP(batch_tokens=9)
    assert found["method"].learning_rate == 1e-3
    assert found["options"].seed == 3
    found = parsed(*TRAIN, "--method", "medusa2", "--lora-targets", "q_proj, v_proj")
    assert found["method"] == Medusa2(lora_targets=("q_proj", "v_proj"))
    assert parsed(*TRAIN)["method"].learning_rate == 2e-3


def test_data_may_be_given_several_times_and_keeps_its_order() -> None:
    for argv in (TRAIN, EVALUATE):
        found = parsed(*argv, "--data", "c.jsonl")["options"]
        assert found.data == (Path("d.jsonl"), Path("c.jsonl"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*DISTILL, "--limit", "0"], "--limit is '0'; give a whole number from 1"),
        ([*DISTILL, "--temperatures", "0,3"], "give a number from 0 to 2, or several of them"),
        ([*DISTILL, "--temperatures", "0,warm"], "'0,warm'; give a number"),
        ([*DISTILL, "--category-weights", "math"], "'math'; give NAME=VALUE pairs"),
        ([*DISTILL, "--category-weights", "math=-1"], "each value a number from 0 to 1000"),
        ([*DISTILL, "--shard", "2/2"], "'2/2'; give I/N with I from 0 and below N"),
        ([*DISTILL, "--shard", "0/0"], "'0/0'; give I/N"),
        ([*DISTILL, "--shard", "1"], "'1'; give I/N"),
        ([*DISTILL, "--shard=-1/2"], "'-1/2'; give I/N"),
        ([*TRAIN, "--learning-rate", "fast"], "'fast'; give a number from 0 to 1"),
        ([*TRAIN, "--method", "magic"], "'magic'; give medusa, medusa2 or mtp"),
        ([*TRAIN, "--draft-vocab-size=-1"], "'-1'; give a whole number from 0"),
        ([*TRAIN, "--held-out", "0.9"], "'0.9'; give a number from 0 to 0.5"),
        ([*TRAIN, "--num-depths", "3"], "--num-depths is an option of --method mtp, not of"),
        ([*TRAIN, "--method", "mtp", "--num-heads", "3"], "option of --method medusa or medusa2"),
        ([*TRAIN, "--method", "medusa2", "--lora-targets", "q_proj,,v_proj"], "several of them"),
        ([*EVALUATE, "--unknown", "1"], "unrecognized arguments: --unknown 1"),
        ([*TRAIN, "--epoch", "1"], "unrecognized arguments: --epoch 1; did you mean --epochs"),
        ([], "no COMMAND is given; give one of distill, train"),
    ],
)
def test_a_wrong_option_is_an_error_with_its_value(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parsed(*argv)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "medusa2", "--learning-rate", "0"), "give the heads a rate above 0"),
        (
            ("--method", "medusa2", "--warmup-epochs", "2", "--init-heads", "x"),
            "leave out one of --warmup-epochs and --init-heads",
        ),
        (("--hidden-cache-dtype", "float16"), "there is no directory to keep hidden states in"),
    ],
)
def test_a_method_checks_its_options(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(RunError, match=message):
        parsed(*TRAIN, *more)


def test_a_wrong_name_of_a_data_set_is_an_error_with_the_right_form() -> None:
    with pytest.raises(DataError, match="give hf:NAME"):
        parsed("train", "--data", "hf:name", "--output", "heads")


def test_a_wrong_command_line_ends_with_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TRAIN, "--epochs", "0"]) == 2
    assert capsys.readouterr().err == "error: --epochs is '0'; give a whole number from 1\n"


def test_a_file_may_hold_what_the_command_requires(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = ["d.jsonl", "e.jsonl.gz"]', 'output = "heads"')
    expected = replace(TRAIN_OPTIONS, data=(Path("d.jsonl"), Path("e.jsonl.gz")))
    assert parsed("train", "--config", str(path))["options"] == expected
    assert parsed("train", f"--config={path}")["options"] == expected
    path = write(tmp_path, 'data = "d.jsonl"', 'output = "heads"')
    assert parsed("train", "--config", str(path))["options"] == TRAIN_OPTIONS
    with pytest.raises(ConfigError, match="required: --data"):
        parsed("train", "--config", str(write(tmp_path, 'output = "heads"')))


def test_every_kind_of_value_arrives_from_a_file(tmp_path: Path) -> None:
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
    found = parsed("distill", "--config", str(path))
    assert found["sampling"] == Sampling(temperatures=(0.0, 0.7), stop_repeats=False)
    assert found["options"] == DistillOptions(
        data=Path("p.jsonl"),
        output=Path("d.jsonl"),
        limit=5,
        shard=Shard(1, 2),
        method="medusa",
        num_threads=2,
        category_weights={"math": 2.0, "open qa": 0.5},
    )


def test_the_command_line_wins_over_a_file_and_replaces_lists(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = ["a", "b"]', 'output = "x"', "cache = false", "epochs = 9")
    found = parsed("train", "--config", str(path), "--data", "c", "--epochs", "3", "--cache")
    assert found["options"] == TrainOptions(data=(Path("c"),), output=Path("x"))
    assert found["config"] == TrainConfig(epochs=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean epochs"),
        ("learning_rate = 0.1", "unknown key 'learning_rate'; did you mean learning-rate"),
        ("no-cache = true", "unknown key 'no-cache'; did you mean cache"),
        ("zzz = 1", "unknown key 'zzz'; --help lists all options"),
        ("[train]", "unknown key 'train'"),
        ('epochs = "3"', "epochs is '3'; give a whole number"),
        ("epochs = 3.0", "epochs is 3.0; give a whole number"),
        ("epochs = 0", "epochs is 0; give a whole number from 1"),
        ("learning-rate = nan", "learning-rate is nan; give a number from 0 to 1"),
        ("cache = 1", "cache is 1; give true or false"),
        ("data = 7", "data is 7"),
        ('device = "tpu"', "device is 'tpu'; give auto, cpu or cuda"),
        ("num-depths = 3", "num-depths is an option of --method mtp"),
        ("epochs 3", "cannot be read: Expected '='"),
    ],
)
def test_a_wrong_file_is_an_error_with_file_key_and_value(
    line: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, line)
    with pytest.raises(ConfigError, match=f"run.toml:? {re.escape(message)}"):
        parsed("train", "--config", str(path), "--data", "a", "--output", "h")


@pytest.mark.parametrize(
    "line",
    [
        "temperatures = [0, 3.0]",
        "temperatures = []",
        "temperatures = [true]",
        "category-weights = {math = -1}",
        "category-weights = {math = 'x'}",
        "category-weights = 3",
        'shard = "2/2"',
    ],
)
def test_lists_tables_and_parts_in_a_file_pass_the_checks_of_the_command_line(
    line: str, tmp_path: Path
) -> None:
    path = write(tmp_path, line)
    with pytest.raises(ConfigError, match=f"{line.split()[0]} is .*; give "):
        parsed("distill", "--config", str(path), "--data", "a", "--output", "b")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_ends_the_command_with_a_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    assert main(["train", "--config", str(path)]) == 2
    noted = error_text(capsys)
    assert "error: " in noted
    assert "run.toml cannot be read" in noted


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("train", TRAIN),
        ("train", [*TRAIN, "--learning-rate", "1e-05", "--max-grad-norm", "0", "--no-cache"]),
        ("train", [*TRAIN, "--method", "mtp", "--num-depths", "3", "--hidden-cache", "x"]),
        ("train", [*TRAIN, "--method", "medusa2", "--lora-targets", "a,b", "--track", "x,y"]),
        ("train", [*TRAIN, "--data", "hf:owner/name#train"]),
        ("distill", DISTILL),
        (
            "distill",
            [
                *(*DISTILL, "--shard", "2/3", "--temperatures", "0,0,0.7", "--no-stop-repeats"),
                *("--category-weights", 'math=2,open qa=0.5,quo"te=0,=1'),
            ],
        ),
        ("evaluate", ["evaluate", "--heads", 'odd "name\\ 你好\n\x7f', "--data", "d"]),
        ("convert", [*CONVERT, "--model", "m", "--device", "cpu"]),
        ("report", [*REPORT, "--output", "p.html"]),
    ],
)
def test_saved_options_are_read_again_as_they_were(
    command: str, argv: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "saved.toml"
    found = PROGRAM.parse(argv, {})
    save_options(path, found.command, found.arguments)
    assert PROGRAM.parse([command, "--config", str(path)], {}).arguments == found.arguments


def test_a_saved_file_does_not_drop_the_run_that_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    found = parsed(*TRAIN, "--overwrite")
    save_options(path, TRAIN_COMMAND, found)
    assert parsed("train", "--config", str(path))["options"] == TRAIN_OPTIONS
    assert path.read_text().startswith("# python -m training train --config train.toml\n")


def test_the_written_file_is_plain_toml(tmp_path: Path) -> None:
    path = tmp_path / "saved.toml"
    save_options(path, TRAIN_COMMAND, parsed(*TRAIN, "--data", "hf:o/n#train"))
    values: dict[str, Any] = tomllib.loads(path.read_text())
    assert values["data"] == ["d.jsonl", str(HubData("o/n", "train"))]
    assert (values["head-decay"], values["method"]) == (TrainConfig().head_decay, "medusa")
    assert values["learning-rate"] == 2e-3
    assert "num-depths" not in values
    assert "limit" not in values


def test_the_base_model_is_the_same_for_all_commands() -> None:
    for kind in (DistillOptions, TrainOptions, EvaluateOptions, ConvertOptions):
        assert issubclass(kind, ModelOptions)


def test_errors_are_of_one_root() -> None:
    assert issubclass(RunError, EuryaleError)
