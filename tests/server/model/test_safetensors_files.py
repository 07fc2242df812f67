from pathlib import Path

import pytest
import torch

from server.errors import ModelError
from server.model.safetensors_files import SafetensorsFiles
from tests.support.native_checkpoints import save_native

NAME = "mtp.fc.weight"


@pytest.mark.parametrize("sharded", [True, False])
def test_tensors_are_read_by_name(sharded: bool, tmp_path: Path) -> None:
    checkpoint = save_native("qwen3", tmp_path)
    expected = checkpoint.saved()
    if sharded:
        checkpoint.shard()
    files = SafetensorsFiles("m", str(tmp_path))
    assert sorted(files.names) == sorted(expected)
    found = files.read([NAME, "lm_head.weight"])
    assert list(found) == [NAME, "lm_head.weight"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_other_shards_are_not_needed(tmp_path: Path) -> None:
    checkpoint = save_native("qwen3", tmp_path)
    expected = checkpoint.saved()[NAME]
    checkpoint.shard()
    files = SafetensorsFiles("m", str(tmp_path))
    for path in tmp_path.glob("part-*.safetensors"):
        if NAME.encode() not in path.read_bytes():
            path.unlink()
    assert torch.equal(files.read([NAME])[NAME], expected)


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    save_native("qwen3", tmp_path).shard()
    files = SafetensorsFiles("m", str(tmp_path))
    for path in tmp_path.glob("part-*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match=r"cannot read mtp.fc.weight of m from part-\d+"):
        files.read([NAME])


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot list the tensors of m"):
        SafetensorsFiles("m", str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="cannot list the tensors of m"):
        SafetensorsFiles("m", str(tmp_path))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="cannot list the tensors of m"):
        SafetensorsFiles("m", str(tmp_path))
