from pathlib import Path

import pytest
import torch

from heads.checkpoint import save_heads
from heads.medusa import MedusaConfig, MedusaHeads
from heads.tree_search import AcceptanceProfile
from server.config import EngineConfig
from server.engine.engine import Engine
from server.model.loading import load_model
from tests.tiny_models import save_tiny_model

PROFILE = AcceptanceProfile(((0.5, 0.2, 0.1), (0.4, 0.2, 0.1), (0.3, 0.1, 0.05)))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random draft heads of that model on disk."""
    loaded = load_model(str(model_dir), "cpu", "float32")
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=3)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    directory = tmp_path_factory.mktemp("heads")
    save_heads(directory, heads, loaded.fingerprint, loaded.name, PROFILE)
    return directory


@pytest.fixture(scope="session")
def engine(model_dir: Path, heads_dir: Path) -> Engine:
    """An idle engine with heads and a fixed tree of 6 nodes, shared by the tests."""
    return Engine.from_config(
        EngineConfig(
            model=str(model_dir),
            heads=str(heads_dir),
            device="cpu",
            num_blocks=256,
            max_num_seqs=4,
            max_nodes=6,
            tree=6,
            prefix_caching=False,
        )
    )
