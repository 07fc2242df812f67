import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from server.config import EngineConfig
from server.engine.engine import Engine
from tests.support.serving import RunningServer, running_server
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

# Long enough that a request which is not aborted runs for seconds.
MAX_MODEL_LEN = 2048


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("tiny-model"))
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text())
    config["max_position_embeddings"] = MAX_MODEL_LEN
    config_file.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("tiny-heads"))


@pytest.fixture(scope="session")
def engine_factory(model_dir: Path, heads_dir: Path) -> Callable[..., Engine]:
    """Builds an engine with draft heads on the tiny model."""

    def build(max_num_seqs: int = 8, heads: str | None = None) -> Engine:
        return Engine.from_config(
            EngineConfig(
                model=str(model_dir),
                heads=heads or str(heads_dir),
                device="cpu",
                dtype="float32",
                num_blocks=1024,
                max_num_seqs=max_num_seqs,
                max_nodes=8,
                tree_size=8,
                lookup=False,
                num_threads=1,
            )
        )

    return build


@pytest.fixture(scope="session")
def oracle(engine_factory: Callable[..., Engine]) -> Engine:
    """An engine without heads, to be called directly."""
    return engine_factory(heads="none")


@pytest.fixture(scope="session")
def server(engine_factory: Callable[..., Engine]) -> Iterator[RunningServer]:
    """The server of all tests that do not end it."""
    with running_server(engine_factory()) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client
