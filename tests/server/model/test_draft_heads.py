from pathlib import Path

import pytest
import torch

from heads.checkpoint import save_heads
from heads.medusa import MedusaConfig, MedusaHeads
from heads.mtp import MTPConfig, MTPModule
from server.attention.hook import AttentionContext
from server.errors import HeadsCheckpointError, HeadsMismatchError
from server.model.decoder_layer import DecoderLayer
from server.model.draft_heads import load_draft_heads
from server.model.loading import LoadedModel, load_model
from tests.support.tiny_models import save_tiny_model
from training.methods.unrolled_attention import Unroll, UnrolledAttention


def load_tiny(directory: Path, seed: int) -> LoadedModel:
    return load_model(str(save_tiny_model("llama", directory, seed)), "cpu", "float32")


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load_tiny(tmp_path / "base", seed=0)


@pytest.fixture
def heads_dir(tmp_path: Path, loaded: LoadedModel) -> Path:
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=2)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    torch.nn.init.ones_(heads.layer_biases)
    save_heads(tmp_path / "heads", heads, loaded.fingerprint, loaded.name, None)
    return tmp_path / "heads"


def test_heads_of_the_base_model_come_in_its_dtype(heads_dir: Path, loaded: LoadedModel) -> None:
    found = load_draft_heads(heads_dir, loaded)
    assert isinstance(found.heads, MedusaHeads)
    assert found.layer is None
    assert found.heads.layer_biases.dtype == loaded.dtype
    assert bool((found.heads.layer_biases == 1).all())


def test_heads_of_another_base_model_are_refused(heads_dir: Path, tmp_path: Path) -> None:
    other = load_tiny(tmp_path / "other", seed=1)
    with pytest.raises(HeadsMismatchError, match="base"):
        load_draft_heads(heads_dir, other)


def test_a_missing_or_damaged_checkpoint_is_refused(heads_dir: Path, loaded: LoadedModel) -> None:
    weights = heads_dir / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(HeadsCheckpointError, match=r"heads\.safetensors"):
        load_draft_heads(heads_dir, loaded)
    with pytest.raises(HeadsCheckpointError):
        load_draft_heads(heads_dir / "nowhere", loaded)


def test_an_mtp_module_comes_with_the_layer_that_runs_it(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    saved_layer = DecoderLayer(loaded.model)
    module = MTPModule(
        MTPConfig(loaded.hidden_size, loaded.vocab_size, 5),
        saved_layer.module,
        loaded.unembedding(),
        loaded.input_embedding(),
        torch.arange(5),
    )
    save_heads(tmp_path / "mtp", module, loaded.fingerprint, loaded.name, None, torch.float32)
    found = load_draft_heads(tmp_path / "mtp", loaded)
    assert isinstance(found.heads, MTPModule)
    assert found.layer is not None
    assert found.layer.module is found.heads.block
    positions = torch.arange(3)
    states = []
    for layer, heads in ((saved_layer, module), (found.layer, found.heads)):
        memory = Unroll()
        memory.begin_depth([positions])
        runner = layer.runner(positions, AttentionContext(UnrolledAttention(), memory))
        states.append(heads(torch.ones(3, loaded.hidden_size), positions, runner))
    assert torch.equal(states[0], states[1])
