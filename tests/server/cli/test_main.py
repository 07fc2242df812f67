import dataclasses
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from server.api.config import ApiConfig, ServerConfig, installed_version
from server.cli.main import app
from server.config import EngineConfig, SamplingParams
from server.core.request import Request
from server.engine.engine import Engine
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

TINY = ["--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--num-blocks", "64"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("tiny-heads"))


def run(*arguments: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **(env or {})})


def parameters(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands[command].params}


def assert_one_line_error(result: Any, exit_code: int, *words: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith(f"{line}\n")
    assert "Traceback" not in result.output
    for word in words:
        assert word in line


def test_every_option_of_the_engine_and_the_server_can_be_given() -> None:
    options = parameters("serve")
    for config_type in (EngineConfig, ApiConfig, ServerConfig):
        for item in dataclasses.fields(config_type):
            option = options[item.name]
            # Whoever types a command has time for a compiler; who builds an engine may not.
            expected = "auto" if item.name == "compile" else item.default
            assert option.default == expected, item.name
            assert f"--{item.name.replace('_', '-')}" in option.opts
            assert option.envvar == f"EURYALE_{item.name.upper()}"
            assert option.help


def test_generate_has_the_engines_options_too() -> None:
    options = parameters("generate")
    assert {item.name for item in dataclasses.fields(EngineConfig)} <= set(options)
    assert {"prompt", "raw", "max_tokens", "temperature", "top_p", "seed", "method"} <= set(options)
    assert options["temperature"].default == 0.0


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_names_options_and_environment_variables(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--max-num-seqs" in result.output
    assert "EURYALE_MAX_NUM_SEQS" in result.output


def test_the_version_is_that_of_the_distribution() -> None:
    assert run("version").output == f"{installed_version()}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tree-size", "many"], ["tree_size is 'many'", "auto"]),
        (["--tree-size", "99"], ["tree_size is 99"]),
        (["--max-nodes", "0"], ["max_nodes is 0"]),
        (["--port", "70000"], ["port is 70000"]),
        (["--drain-s", "-1"], ["drain_s is -1"]),
        (["--block-size", "0"], ["block_size is 0"]),
        (["--host", "no.such.host.invalid"], ["cannot listen", "no.such.host.invalid"]),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    assert_one_line_error(run("serve", *arguments), 2, *words)


def test_options_are_read_from_the_environment() -> None:
    assert_one_line_error(run("serve", env={"EURYALE_PORT": "70000"}), 2, "port is 70000")
    result = run("serve", "--port", "-5", env={"EURYALE_PORT": "70000"})
    assert_one_line_error(result, 2, "port is -5")


def test_the_port_that_kubernetes_sets_for_a_service_of_our_name_is_ignored() -> None:
    link = {"EURYALE_PORT": "tcp://10.96.0.17:8000"}
    result = run("serve", "--drain-s", "-1", env=link)
    assert_one_line_error(result, 2, "drain_s is -1")
    assert_one_line_error(run("serve", "--port", "-5", env=link), 2, "port is -5")


@pytest.mark.parametrize("value", ["udp://10.96.0.17:8000", "no port"])
def test_any_other_port_that_is_no_number_is_refused(value: str) -> None:
    result = run("serve", "--drain-s", "-1", env={"EURYALE_PORT": value})
    assert result.exit_code == 2
    assert "EURYALE_PORT" in result.stderr


def test_an_address_as_the_option_itself_is_refused() -> None:
    assert run("serve", "--port", "tcp://10.96.0.17:8000").exit_code == 2


def test_a_taken_port_is_known_before_a_model_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = run("serve", "--model", "/no/such/model", "--port", port)
    assert_one_line_error(result, 2, "cannot listen", port, "choose another")


def test_a_missing_model_is_exit_code_3(tmp_path: Path) -> None:
    result = run("generate", "hi", "--model", str(tmp_path / "nothing"))
    assert_one_line_error(result, 3, "nothing")


def test_missing_heads_are_exit_code_2(model_dir: Path, tmp_path: Path) -> None:
    heads = str(tmp_path / "nothing")
    result = run("generate", "hi", "--model", str(model_dir), "--heads", heads, *TINY)
    assert_one_line_error(result, 2, "nothing")


def test_heads_of_another_model_are_exit_code_4(heads_dir: Path, tmp_path: Path) -> None:
    other = save_tiny_model("llama", tmp_path, seed=1)
    result = run("generate", "hi", "--model", str(other), "--heads", str(heads_dir), *TINY)
    assert_one_line_error(result, 4, "tiny")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "9"], "temperature is 9"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--method", "magic"], "'magic'"),
    ],
)
def test_wrong_sampling_is_exit_code_2(arguments: list[str], word: str) -> None:
    result = run("generate", "hi", *arguments)
    assert result.exit_code == 2
    assert word in result.stderr
    assert "Traceback" not in result.output


def test_a_prompt_that_does_not_fit_is_one_line(model_dir: Path) -> None:
    result = run("generate", "word " * 2000, "--model", str(model_dir), "--heads", "none", *TINY)
    assert_one_line_error(result, 2, "tokens")


def expected(model_dir: Path, prompt: str, raw: bool, sampling: SamplingParams) -> str:
    config = EngineConfig(str(model_dir), "none", "cpu", "float32", num_blocks=64, num_threads=1)
    engine = Engine.from_config(config)
    token_ids = engine.tokenizer.encode(prompt)
    if not raw:
        token_ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return engine.generate([Request("oracle", tuple(token_ids), sampling)])[0].text


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("seed", [None, 4])
def test_generate_writes_the_engines_text_and_nothing_else_to_stdout(
    model_dir: Path, heads_dir: Path, raw: bool, seed: int | None
) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=0.0 if seed is None else 1.0, seed=seed)
    options = ["--max-tokens", "40", "--temperature", str(sampling.temperature)]
    if seed is not None:
        options += ["--seed", str(seed)]
    result = run(
        "generate",
        "hello there",
        *(["--raw"] if raw else []),
        *options,
        *TINY,
        "--model",
        str(model_dir),
        "--heads",
        str(heads_dir),
        "--tree-size",
        "8",
    )
    assert result.exit_code == 0, result.output
    text = expected(model_dir, "hello there", raw, sampling)
    assert result.stdout_bytes.decode() == f"{text}\n"
    assert "tokens/s" in result.stderr
    assert re.search(r"mean acceptance length \d\.\d\d", result.stderr)
    assert "method medusa, exact acceptance" in result.stderr


def test_accepted_tokens_are_coloured_by_depth(model_dir: Path, heads_dir: Path) -> None:
    arguments = ["--max-tokens", "120", *TINY, "--model", str(model_dir)]
    coloured = run(
        "generate",
        "hello there",
        *arguments,
        "--heads",
        str(heads_dir),
        "--tree-size",
        "16",
        env={"FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )
    plain = run("generate", "hello there", *arguments, "--heads", "none")
    assert "\x1b[32m" in coloured.stdout
    # A terminal must not get the control characters that a random model writes.
    printable = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", plain.stdout_bytes.decode()
    )
    assert ANSI.sub("", coloured.stdout_bytes.decode()) == printable
    assert "accepted at depth" in coloured.stderr
    assert "\x1b[" not in plain.stdout
