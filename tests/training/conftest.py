from pathlib import Path

import pytest

from server.model.loading import LoadedModel, load_model
from tests.support.tiny_models import save_tiny_model
from tests.training.corpora import PROMPT_LINES, write_lines
from training.__main__ import main
from training.states.hidden_states import HiddenStateEncoder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("training") / "model")


@pytest.fixture(scope="session")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(str(model_dir), "cpu", "float32")


@pytest.fixture(scope="session")
def encoder(loaded: LoadedModel) -> HiddenStateEncoder:
    return HiddenStateEncoder(loaded, max_batch_tokens=64)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("training") / "prompts.jsonl", PROMPT_LINES)


@pytest.fixture(scope="session")
def distilled_file(
    model_dir: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Answers of the tiny model, made by the command."""
    output = tmp_path_factory.mktemp("training") / "distilled.jsonl"
    argv = ["distill", "--data", str(prompts_file), "--output", str(output)]
    argv += ["--model", str(model_dir), "--device", "cpu", "--max-new-tokens", "24"]
    assert main(argv) == 0
    return output
