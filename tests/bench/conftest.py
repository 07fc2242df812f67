from pathlib import Path

import pytest

from server.config import EngineConfig
from server.engine.engine import Engine
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="session")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("bench") / "heads")


@pytest.fixture(scope="session")
def engine(model_dir: Path, heads_dir: Path) -> Engine:
    """Idle before and after each test; its trees have six nodes."""
    config = EngineConfig(
        model=str(model_dir),
        heads=str(heads_dir),
        device="cpu",
        num_blocks=256,
        max_num_seqs=4,
        max_nodes=6,
        tree_size=6,
        prefix_caching=False,
    )
    return Engine.from_config(config)
