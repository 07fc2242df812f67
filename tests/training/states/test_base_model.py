from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.errors import ModelError
from server.model.loading import LoadedModel
from training.commands.options import ModelOptions
from training.data.distilled import Manifest, Sampling
from training.errors import DataError
from training.states.base_model import check_base, load_base


def test_the_model_is_loaded_as_the_options_say(model_dir: Path) -> None:
    num_threads = torch.get_num_threads()
    options = ModelOptions(model=str(model_dir), device="cpu", dtype="bfloat16", num_threads=1)
    try:
        found = load_base(options)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(num_threads)
    assert (found.name, found.dtype) == (str(model_dir), torch.bfloat16)


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_base(ModelOptions(model=str(tmp_path / "absent")))


def test_data_of_the_same_base_passes_whatever_its_name(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    Manifest("another/name", loaded.fingerprint, Sampling(), "0").save(data)
    check_base(data, loaded)


def test_data_of_another_base_is_refused_by_what_differs(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    Manifest("big", replace(loaded.fingerprint, num_layers=9), Sampling(), "0").save(data)
    with pytest.raises(DataError, match=r"answers of big, not of .*num_layers is 9"):
        check_base(data, loaded)
