import math
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from training.commands.options import (
    ConvertOptions,
    DistillOptions,
    EvaluateOptions,
    ReportOptions,
    TrainOptions,
    parse_options,
)
from training.data.distilled import Sampling, Shard
from training.states.encoded import TokenPlan
from training.states.examples import BatchPlan

DISTILL = ["distill", "--data", "p.jsonl", "--output", "d.jsonl"]
TRAIN = ["train", "--data", "d.jsonl", "--output", "heads"]
EVALUATE = ["evaluate", "--heads", "heads", "--data", "d.jsonl"]
REPORT = ["report", "--heads", "heads"]
CONVERT = ["convert", "--source", "original", "--output", "heads"]


def test_defaults_are_those_of_the_types() -> None:
    data = Path("d.jsonl")
    assert parse_options(DISTILL) == DistillOptions(data=Path("p.jsonl"), output=data)
    assert parse_options(TRAIN) == TrainOptions(data=(data,), output=Path("heads"))
    assert parse_options(EVALUATE) == EvaluateOptions(heads=Path("heads"), data=(data,))
    heads = ConvertOptions(source=Path("original"), output=Path("heads"))
    assert parse_options(CONVERT) == heads
    assert parse_options(REPORT) == ReportOptions(heads=Path("heads"))


@pytest.mark.parametrize("argv", [DISTILL, TRAIN, EVALUATE, CONVERT, REPORT])
def test_every_field_is_an_option_with_help(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse_options(argv)
    with pytest.raises(SystemExit, match="0"):
        parse_options([argv[0], "--help"])
    text = capsys.readouterr().out
    for item in fields(options):
        assert f"--{item.name.replace('_', '-')}" in text
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(names) == len(fields(options)) + len(["--config"])


def test_required_options_are_those_without_a_default() -> None:
    for argv in (DISTILL, TRAIN, EVALUATE, CONVERT, REPORT):
        required = [f.name for f in fields(parse_options(argv)) if f.default is MISSING]
        assert [f"--{name}" for name in required] == [a for a in argv if a.startswith("--")]
        for position in range(1, len(argv), 2):
            with pytest.raises(SystemExit, match="2"):
                parse_options(argv[:position] + argv[position + 2 :])


def test_options_arrive_where_they_are_used() -> None:
    distill = parse_options(
        [
            *DISTILL,
            "--max-new-tokens",
            "9",
            "--temperatures",
            "0,0.5",
            "--category-weights",
            "math=2,chat=0.5",
            "--seed",
            "3",
            "--no-stop-repeats",
            "--shard",
            "1/3",
        ]
    )
    assert isinstance(distill, DistillOptions)
    assert distill.sampling == Sampling(
        max_new_tokens=9, temperatures=(0.0, 0.5), seed=3, stop_repeats=False
    )
    assert distill.shard == Shard(1, 3)
    assert distill.category_weights == {"math": 2.0, "chat": 0.5}
    train = parse_options([*TRAIN, "--epochs", "7", "--batch-size", "5", "--no-cache"])
    assert isinstance(train, TrainOptions)
    assert train.train_config.epochs == 7
    assert train.train_config.clip_norm == 1.0
    unclipped = parse_options([*TRAIN, "--max-grad-norm", "0"])
    assert isinstance(unclipped, TrainOptions)
    assert unclipped.train_config.clip_norm == math.inf
    assert train.batch_plan == BatchPlan(batch_size=5, is_cached=False)
    mtp = parse_options([*TRAIN, "--method", "mtp", "--batch-tokens", "9", "--seed", "3"])
    assert isinstance(mtp, TrainOptions)
    assert mtp.method == "mtp"
    assert mtp.token_plan == TokenPlan(batch_tokens=9, seed=3)


def test_data_may_be_given_several_times_and_keeps_its_order() -> None:
    for argv in (TRAIN, EVALUATE):
        options = parse_options([*argv, "--data", "c.jsonl"])
        assert isinstance(options, TrainOptions | EvaluateOptions)
        assert options.data == (Path("d.jsonl"), Path("c.jsonl"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*DISTILL, "--limit", "0"], "'0' is no count"),
        ([*DISTILL, "--temperatures", "0,3"], "3 is out of range; give 0 to 2"),
        ([*DISTILL, "--temperatures", "0,warm"], "'warm' is no number"),
        ([*DISTILL, "--category-weights", "math"], "'math' is no weight; give NAME=WEIGHT"),
        ([*DISTILL, "--category-weights", "math=-1"], "-1 is out of range"),
        ([*DISTILL, "--shard", "2/2"], "'2/2' is no shard; give I/N with I from 0 and below N"),
        ([*DISTILL, "--shard", "0/0"], "'0/0' is no shard"),
        ([*DISTILL, "--shard", "1"], "'1' is no shard"),
        ([*DISTILL, "--shard", "-1/2"], "is no shard|expected one argument"),
        ([*DISTILL, "--method", "magic"], "invalid choice: 'magic'"),
        ([*TRAIN, "--learning-rate", "fast"], "'fast' is no number"),
        ([*TRAIN, "--method", "magic"], "invalid choice: 'magic'"),
        ([*TRAIN, "--draft-vocab-size", "-1"], "'-1' is no whole number|expected one argument"),
        ([*TRAIN, "--held-out", "0.9"], "0.9 is out of range; give 0 to 0.5"),
        ([*EVALUATE, "--unknown", "1"], "unrecognized arguments: --unknown 1"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_option_ends_with_its_value(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(argv)
    assert re.search(message, capsys.readouterr().err)


def test_targets_of_an_adapter_are_names() -> None:
    options = parse_options([*TRAIN, "--method", "medusa2", "--lora-targets", "q_proj, v_proj"])
    assert isinstance(options, TrainOptions)
    assert options.lora_targets == ("q_proj", "v_proj")
    with pytest.raises(SystemExit, match="2"):
        parse_options([*TRAIN, "--lora-targets", "q_proj,,v_proj"])
