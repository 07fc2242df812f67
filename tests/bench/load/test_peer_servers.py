import json
import os
import sys
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.load.peer_servers import (
    free_port,
    llama_command,
    llama_contender,
    running,
    transformers_command,
    transformers_contender,
)
from bench.measure.reference import ReferenceModel
from bench.workload.dialogues import make_turn
from server.engine.engine import Engine
from tests.bench.fakes import fake_llama_server
from tests.bench.traces import make_conversation
from tests.bench.traces import make_turn as turn_of

pytestmark = pytest.mark.slow


def test_llama_server_is_asked_for_token_ids(tmp_path: Path) -> None:
    program, port = fake_llama_server(tmp_path), free_port()
    command = llama_command(program, Path("m.gguf"), 2, 512, port)
    with running("llama-server", command, 2):
        run = llama_contender(port)(turn_of((5, 6, 7)), 4)
    assert run.token_ids == (7, 7, 7, 7)
    assert (run.timing.num_tokens, run.num_steps) == (4, 3)
    assert 0.0 < run.timing.first_token_s <= run.timing.request_s
    arguments = json.loads(program.with_suffix(".arguments").read_text())
    assert arguments[:2] == ["--model", "m.gguf"]
    assert arguments[-2:] == ["--port", str(port)]
    assert arguments[arguments.index("--threads") + 1] == "2"


def test_a_server_ends_with_its_block(tmp_path: Path) -> None:
    program, port = fake_llama_server(tmp_path), free_port()
    with running("llama-server", llama_command(program, Path("m.gguf"), 1, 512, port), 1):
        pass
    with pytest.raises(BenchError, match="cannot reach"):
        llama_contender(port)(turn_of((5,)), 4)


def test_a_server_that_ends_at_once_says_why() -> None:
    code = "import sys, os; sys.exit('no such model, threads ' + os.environ['OMP_NUM_THREADS'])"
    command = [sys.executable, "-c", code, str(free_port())]
    before = os.environ.get("OMP_NUM_THREADS")
    with (
        pytest.raises(BenchError, match=r"peer did not become ready.*no such model, threads 3"),
        running("peer", command, 3),
    ):
        pass
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_transformers_serve_says_what_generate_says(engine: Engine, model_dir: Path) -> None:
    turn = make_turn(engine.tokenizer, make_conversation("How many arms?"), [])
    port = free_port()
    with running(
        "transformers serve", transformers_command(str(model_dir), "float32", "cpu", port), 1
    ):
        run = transformers_contender(str(model_dir), engine.tokenizer, port)(turn, 6)
    _, expected = ReferenceModel(engine.loaded).generate(turn.prompt_token_ids, 6)
    assert engine.tokenizer.decode(run.token_ids) == engine.tokenizer.decode(expected)
    assert run.timing.num_tokens == len(expected)
