from pathlib import Path

import pytest
import torch

from server.errors import ModelError
from training.commands.common import ModelOptions


def test_the_model_is_loaded_as_the_options_say(model_dir: Path) -> None:
    num_threads = torch.get_num_threads()
    options = ModelOptions(model=str(model_dir), device="cpu", dtype="bfloat16", num_threads=1)
    try:
        found = options.load()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(num_threads)
    assert (found.name, found.dtype) == (str(model_dir), torch.bfloat16)


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        ModelOptions(model=str(tmp_path / "absent")).load()
