import dataclasses
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from server.api.config import ApiConfig, ServerConfig, installed_version
from server.cli.program import PROGRAM, main
from server.config import EngineConfig, SamplingParams
from server.core.request import Request
from server.engine.engine import Engine
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

TINY = ["--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--num-blocks", "64"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("tiny-heads"))


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str


class Run(Protocol):
    def __call__(self, *arguments: str, env: dict[str, str] | None = None) -> Result: ...


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
        with monkeypatch.context() as patched:
            for name, value in ({"COLUMNS": "200"} | (env or {})).items():
                patched.setenv(name, value)
            try:
                exit_code = main(arguments)
            except SystemExit as ended:
                exit_code = int(ended.code or 0)
        captured = capfdbinary.readouterr()
        return Result(exit_code, captured.out.decode(), captured.err.decode())

    return run


def options(name: str) -> dict[str, Any]:
    [command] = [command for command in PROGRAM.commands if command.name == name]
    return dict(command.options())


def assert_one_line_error(result: Result, exit_code: int, *words: str) -> None:
    assert result.exit_code == exit_code, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith(f"{line}\n")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in line


def test_every_option_of_the_engine_and_the_server_can_be_given() -> None:
    found = options("serve")
    for config_type in (EngineConfig, ApiConfig, ServerConfig):
        for item in dataclasses.fields(config_type):
            # Whoever types a command has time for a compiler; who builds an engine may not.
            expected = "auto" if item.name == "compile" else item.default
            assert found[item.name].default == expected, item.name


def test_generate_has_the_engines_options_too() -> None:
    found = options("generate")
    assert {item.name for item in dataclasses.fields(EngineConfig)} <= set(found)
    assert {"prompt", "raw", "max_tokens", "temperature", "top_p", "seed", "method"} <= set(found)
    assert found["temperature"].default == 0.0


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_names_options_and_environment_variables(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--max-num-seqs N" in result.stdout
    assert "EURYALE_MAX_NUM_SEQS]" in result.stdout
    assert "None" not in result.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, server.cli; print([m for m in ('torch', 'fastapi') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no COMMAND", "serve, generate, version"]),
        (["sing"], ["'sing'"]),
        (["serve", "--prot", "1"], ["--prot 1", "did you mean --port"]),
        (["generate"], ["PROMPT"]),
        (["serve", "--config", "/no/such/file"], ["/no/such/file", "give a TOML file"]),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], words: list[str]
) -> None:
    assert_one_line_error(run(*arguments), 2, *words)


def test_options_are_read_from_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("port = 70000\n")
    assert_one_line_error(run("serve", "--config", str(path)), 2, "port is 70000")
    result = run("serve", "--config", str(path), env={"EURYALE_PORT": "70001"})
    assert_one_line_error(result, 2, "port is 70001")


def test_the_version_is_that_of_the_distribution(run: Run) -> None:
    assert run("version").stdout == f"{installed_version()}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tree-size", "many"], ["--tree-size is 'many'", "auto"]),
        (["--tree-size", "99"], ["tree_size is 99"]),
        (["--max-nodes", "0"], ["max_nodes is 0"]),
        (["--port", "70000"], ["port is 70000"]),
        (["--drain-s", "-1"], ["drain_s is -1"]),
        (["--block-size", "0"], ["block_size is 0"]),
        (["--host", "no.such.host.invalid"], ["cannot listen", "no.such.host.invalid"]),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], words: list[str]
) -> None:
    assert_one_line_error(run("serve", *arguments), 2, *words)


def test_options_are_read_from_the_environment(run: Run) -> None:
    assert_one_line_error(run("serve", env={"EURYALE_PORT": "70000"}), 2, "port is 70000")
    result = run("serve", "--port", "-5", env={"EURYALE_PORT": "70000"})
    assert_one_line_error(result, 2, "port is -5")


def test_the_port_that_kubernetes_sets_for_a_service_of_our_name_is_ignored(run: Run) -> None:
    link = {"EURYALE_PORT": "tcp://10.96.0.17:8000"}
    result = run("serve", "--drain-s", "-1", env=link)
    assert_one_line_error(result, 2, "drain_s is -1")
    assert_one_line_error(run("serve", "--port", "-5", env=link), 2, "port is -5")


@pytest.mark.parametrize("value", ["udp://10.96.0.17:8000", "no port"])
def test_any_other_port_that_is_no_number_is_refused(run: Run, value: str) -> None:
    result = run("serve", "--drain-s", "-1", env={"EURYALE_PORT": value})
    assert result.exit_code == 2
    assert "EURYALE_PORT" in result.stderr


def test_an_address_as_the_option_itself_is_refused(run: Run) -> None:
    assert run("serve", "--port", "tcp://10.96.0.17:8000").exit_code == 2


def test_a_taken_port_is_known_before_a_model_is_loaded(run: Run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = run("serve", "--model", "/no/such/model", "--port", port)
    assert_one_line_error(result, 2, "cannot listen", port, "choose another")


def test_a_missing_model_is_exit_code_3(run: Run, tmp_path: Path) -> None:
    result = run("generate", "hi", "--model", str(tmp_path / "nothing"))
    assert_one_line_error(result, 3, "nothing")


def test_missing_heads_are_exit_code_2(run: Run, model_dir: Path, tmp_path: Path) -> None:
    heads = str(tmp_path / "nothing")
    result = run("generate", "hi", "--model", str(model_dir), "--heads", heads, *TINY)
    assert_one_line_error(result, 2, "nothing")


def test_heads_of_another_model_are_exit_code_4(run: Run, heads_dir: Path, tmp_path: Path) -> None:
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
def test_wrong_sampling_is_exit_code_2(
    run: Run, model_dir: Path, arguments: list[str], word: str
) -> None:
    model = ("--model", str(model_dir), "--heads", "none", *TINY)
    result = run("generate", "hi", *model, *arguments)
    assert result.exit_code == 2
    assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_a_prompt_that_does_not_fit_is_one_line(run: Run, model_dir: Path) -> None:
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
    run: Run, model_dir: Path, heads_dir: Path, raw: bool, seed: int | None
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
    assert result.exit_code == 0, result.stderr
    text = expected(model_dir, "hello there", raw, sampling)
    assert result.stdout == f"{text}\n"
    assert "tokens/s" in result.stderr
    assert re.search(r"mean acceptance length \d\.\d\d", result.stderr)
    assert "method medusa+lookup, exact acceptance" in result.stderr


def test_accepted_tokens_are_coloured_by_depth(run: Run, model_dir: Path, heads_dir: Path) -> None:
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
    printable = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", plain.stdout)
    assert ANSI.sub("", coloured.stdout) == printable
    assert "accepted at depth" in coloured.stderr
    assert "\x1b[" not in plain.stdout
