from pathlib import Path

import pytest

from bench.options import COMMANDS, BenchOptions, LoadOptions, PrefillOptions, parse_options


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_runs_without_options(command: str) -> None:
    options = parse_options([command])
    assert (options.command, options.model, options.data) == (command, "smollm2", None)


def test_every_common_option_is_read() -> None:
    line = (
        "latency --data d.jsonl.gz --limit 3 --max-new-tokens 9 --model m --heads h --method medusa"
        " --max-nodes 16 --dtype float32 --quantization int8 --device cpu --num-threads 2"
        " --compile off --output o.json"
    )
    assert parse_options(line.split()) == BenchOptions(
        command="latency",
        data=Path("d.jsonl.gz"),
        limit=3,
        max_new_tokens=9,
        model="m",
        heads="h",
        method="medusa",
        max_nodes=16,
        dtype="float32",
        quantization="int8",
        compile="off",
        device="cpu",
        num_threads=2,
        output=Path("o.json"),
    )


def test_batch_one_benches_have_no_concurrency() -> None:
    assert parse_options(["latency"]).concurrency == 1
    assert parse_options(["overhead"]).concurrency == 1
    with pytest.raises(SystemExit):
        parse_options(["latency", "--concurrency", "4"])


def test_batched_benches_take_a_concurrency() -> None:
    assert parse_options(["acceptance", "--concurrency", "3"]).concurrency == 3
    assert parse_options(["exactness"]).concurrency > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "'0' is no count"),
        (["--limit", "many"], "'many' is no count"),
        (["--max-new-tokens", "-5"], "'-5' is no count"),
        (["--max-nodes", "65"], "'65' is no tree size; give 1 to 64"),
        (["--max-nodes", "0"], "'0' is no tree size"),
        (["--method", "eagle"], "invalid choice: 'eagle'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--quantization", "fp8"], "invalid choice: 'fp8'"),
        (["--batch", "2"], "unrecognized arguments: --batch 2"),
    ],
)
def test_wrong_options_are_refused_by_value(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_options(["acceptance", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options([])
    assert "COMMAND" in capsys.readouterr().err


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_every_option_of_the_load_is_read() -> None:
    line = (
        "serving --concurrency 1,8 --rate 2.5 --rounds 7 --requests-per-round 9"
        " --seconds-per-round 30 --seed 3 --engine --plot p.png"
    )
    assert parse_options(line.split()).load == LoadOptions(
        concurrencies=(1, 8),
        rate=2.5,
        rounds=7,
        requests_per_round=9,
        seconds_per_round=30.0,
        seed=3,
        engine=True,
        plot=Path("p.png"),
    )


def test_the_load_has_defaults() -> None:
    options = parse_options(["serving"])
    assert options.load == LoadOptions()
    assert options.load.concurrencies == (1, 2, 4, 8, 16, 32, 64)


def test_every_size_of_the_prefill_bench_is_read() -> None:
    line = (
        "prefill --prompt-tokens 100 --long-prompt-tokens 300 --streams 3 --rounds 2"
        " --max-prefill-tokens 32"
    )
    assert parse_options(line.split()).prefill == PrefillOptions(
        prompt_tokens=100,
        long_prompt_tokens=300,
        streams=3,
        rounds=2,
        max_prefill_tokens=32,
    )


def test_the_prefill_bench_has_default_sizes() -> None:
    options = parse_options(["prefill"])
    assert options.prefill == PrefillOptions()
    assert (options.prefill.prompt_tokens, options.prefill.long_prompt_tokens) == (2000, 4000)
    assert (options.prefill.streams, options.prefill.rounds) == (8, 5)
    assert options.load == LoadOptions()


@pytest.mark.parametrize("option", ["--streams", "--prompt-tokens", "--max-prefill-tokens"])
def test_sizes_of_the_prefill_bench_are_counts(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(["prefill", option, "0"])
    assert "'0' is no count" in capsys.readouterr().err


def test_llama_server_is_an_option_of_peers_alone() -> None:
    assert parse_options(["peers", "--llama-server", "x"]).llama_server == Path("x")
    with pytest.raises(SystemExit):
        parse_options(["latency", "--llama-server", "x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--concurrency 1,0", "'0' is no count"),
        ("--concurrency 1,,2", "'' is no count"),
        ("--concurrency 2,4,2", "'2,4,2' names a count twice"),
        ("--rate 0", "'0' is no amount"),
        ("--seconds-per-round inf", "'inf' is no amount"),
        ("--rate fast", "'fast' is no amount"),
        ("--rounds 0", "'0' is no count"),
        ("--plot ratios", "'ratios' names no image"),
    ],
)
def test_a_wrong_load_is_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(["serving", *arguments.split()])
    assert message in capsys.readouterr().err


def test_a_tree_size_is_a_number_of_nodes_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_options(["exactness"]).tree_size is None
    assert parse_options(["exactness", "--tree-size", "auto"]).tree_size == "auto"
    assert parse_options(["latency", "--tree-size", "16"]).tree_size == 16
    with pytest.raises(SystemExit):
        parse_options(["latency", "--tree-size", "0"])
    assert "'0' is no tree size" in capsys.readouterr().err
