from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import BENCHES, PROGRAM, ReportOptions
from bench.benches.peers import PeersOptions
from bench.benches.prefill import PrefillOptions
from bench.benches.serving import ServingOptions
from bench.benches.setup import BatchOptions, PromptOptions
from bench.errors import BenchError
from bench.load.rounds import LoadPlan
from server.config import SpeculationParams
from server.errors import ConfigError, EuryaleError

NAMES = [bench.name for bench in BENCHES]


def parse(*argv: str) -> Any:
    return PROGRAM.parse(argv, {}).arguments


@pytest.mark.parametrize("name", NAMES)
def test_every_bench_runs_without_options(name: str) -> None:
    arguments = parse(name)
    assert (arguments["config"].model, arguments["config"].compile) == ("smollm2", "auto")
    assert arguments["prompts"] == PromptOptions(data=None, limit=None, max_new_tokens=128)
    assert arguments["speculation"] == SpeculationParams()
    assert arguments["report"] == ReportOptions(output=None)


def test_every_common_option_is_read() -> None:
    line = (
        "latency --data d.jsonl.gz --limit 3 --max-new-tokens 9 --model m --heads h --method medusa"
        " --max-nodes 16 --tree-size 8 --dtype float32 --quantization int8 --device cpu"
        " --num-threads 2 --compile off --output o.json"
    )
    arguments = parse(*line.split())
    assert arguments["prompts"] == PromptOptions(data=Path("d.jsonl.gz"), limit=3, max_new_tokens=9)
    config = arguments["config"]
    assert (config.model, config.heads, config.max_nodes, config.tree_size) == ("m", "h", 16, 8)
    assert (config.dtype, config.quantization, config.device) == ("float32", "int8", "cpu")
    assert (config.num_threads, config.compile) == (2, "off")
    assert arguments["speculation"] == SpeculationParams(method="medusa")
    assert arguments["report"] == ReportOptions(output=Path("o.json"))


def test_options_stand_in_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text('max-new-tokens = 9\ntree-size = "auto"\nconcurrency = 3\n')
    arguments = parse("exactness", "--config", str(path))
    assert arguments["prompts"].max_new_tokens == 9
    assert arguments["batch"] == BatchOptions(concurrency=3, tree_size="auto")


@pytest.mark.parametrize("name", ["latency", "overhead"])
def test_batch_one_benches_have_no_concurrency(name: str) -> None:
    assert parse(name)["config"].max_num_seqs == 1
    with pytest.raises(ConfigError, match="unrecognized arguments: --concurrency"):
        parse(name, "--concurrency", "4")


def test_batched_benches_take_a_concurrency() -> None:
    assert parse("acceptance", "--concurrency", "3")["batch"].concurrency == 3
    assert parse("exactness")["batch"].concurrency > 1


@pytest.mark.parametrize("name", NAMES)
def test_no_run_reuses_an_earlier_prompt(name: str) -> None:
    assert not parse(name)["config"].prefix_caching


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--limit 0", "--limit is '0'; give a whole number from 1"),
        ("--limit many", "--limit is 'many'; give a whole number from 1"),
        ("--max-new-tokens -5", "--max-new-tokens is '-5'; give a whole number from 1"),
        ("--max-nodes 65", "max_nodes is 65; give 1 to 64"),
        ("--max-nodes 0", "max_nodes is 0; give 1 to 64"),
        ("--tree-size 0", "--tree-size is '0'; give auto or a whole number from 1"),
        ("--dtype int8", "--dtype is 'int8'; give auto"),
        ("--quantization fp8", "--quantization is 'fp8'; give none or int8"),
        ("--batch 2", "unrecognized arguments: --batch 2"),
        ("--static", "unrecognized arguments: --static"),
    ],
)
def test_wrong_options_are_rejected_with_their_value(arguments: str, message: str) -> None:
    with pytest.raises(EuryaleError) as error_info:
        parse("acceptance", *arguments.split())
    assert message in str(error_info.value)


def test_a_command_is_required() -> None:
    with pytest.raises(ConfigError, match="COMMAND"):
        parse()


def test_help_lists_all_benches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)


def test_every_option_of_the_load_is_read() -> None:
    line = (
        "serving --concurrency 1,8 --rate 2.5 --rounds 7 --requests-per-round 9"
        " --seconds-per-round 30 --seed 3 --engine --plot p.png"
    )
    arguments = parse(*line.split())
    assert arguments["plan"] == LoadPlan(
        concurrency=(1, 8),
        rate=2.5,
        rounds=7,
        requests_per_round=9,
        seconds_per_round=30.0,
        seed=3,
    )
    assert arguments["options"] == ServingOptions(engine=True, plot=Path("p.png"))


def test_the_load_has_defaults() -> None:
    arguments = parse("serving")
    assert arguments["plan"] == LoadPlan(concurrency=(1, 2, 4, 8, 16, 32, 64), rounds=5)
    assert arguments["options"] == ServingOptions(engine=False, plot=None)


def test_every_size_of_the_prefill_bench_is_read() -> None:
    line = (
        "prefill --prompt-tokens 100 --long-prompt-tokens 300 --streams 3 --rounds 2"
        " --max-prefill-tokens 32"
    )
    arguments = parse(*line.split())
    assert arguments["sizes"] == PrefillOptions(
        prompt_tokens=100, long_prompt_tokens=300, streams=3, rounds=2
    )
    assert arguments["config"].max_prefill_tokens == 32


def test_the_prefill_bench_has_default_sizes() -> None:
    arguments = parse("prefill")
    assert arguments["sizes"] == PrefillOptions(
        prompt_tokens=2000, long_prompt_tokens=4000, streams=8, rounds=5
    )
    assert arguments["config"].max_prefill_tokens is None


@pytest.mark.parametrize("option", ["--streams", "--prompt-tokens", "--max-prefill-tokens"])
def test_sizes_of_the_prefill_bench_are_counts(option: str) -> None:
    with pytest.raises(ConfigError, match="0"):
        parse("prefill", option, "0")


def test_llama_server_is_an_option_of_peers_alone() -> None:
    assert parse("peers", "--llama-server", "x")["others"] == PeersOptions(llama_server=Path("x"))
    with pytest.raises(ConfigError, match="unrecognized arguments: --llama-server"):
        parse("latency", "--llama-server", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--concurrency 1,0", "--concurrency is '1,0'; give a whole number from 1"),
        ("--concurrency 1,,2", "--concurrency is '1,,2'; give a whole number from 1"),
        ("--rate 0", "--rate is '0'; give a number above 0"),
        ("--seconds-per-round inf", "--seconds-per-round is 'inf'; give a number above 0"),
        ("--rate fast", "--rate is 'fast'; give a number above 0"),
        ("--rounds 0", "--rounds is '0'; give a whole number from 1"),
        ("--plot ratios", "--plot is 'ratios'; give a file that ends in .png, .svg, .pdf"),
    ],
)
def test_a_wrong_load_is_rejected(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError) as error_info:
        parse("serving", *arguments.split())
    assert message in str(error_info.value)


def test_a_number_of_clients_is_given_once() -> None:
    with pytest.raises(BenchError, match="2,4,2 names a count twice"):
        parse("serving", "--concurrency", "2,4,2")


def test_quantization_compares_int8_by_default() -> None:
    assert parse("quantization")["config"].quantization == "int8"
    assert parse("latency")["config"].quantization == "none"
