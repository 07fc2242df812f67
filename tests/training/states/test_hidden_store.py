import resource
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from training.errors import DataError, RunError
from training.states.hidden_store import HiddenStore


def states(*lengths: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{seed:02}-{index:02}": torch.randn(length, 6, generator=generator).to(dtype)
        for index, length in enumerate(lengths)
    }


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_bit_for_bit_in_any_order(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = states(3, 0, 5, dtype=dtype), states(1, 2, dtype=dtype, seed=1)
    writer = HiddenStore(tmp_path / "new")
    writer.write(first)
    writer.write(second)
    for store in (writer, HiddenStore(tmp_path / "new")):
        keys = [*reversed(first | second), "00-00"]
        for key, found in zip(keys, store.read(keys), strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, (first | second)[key])


def test_a_key_is_there_once_it_is_written(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path)
    assert "00-00" not in store
    store.write(states(3))
    assert "00-00" in store
    assert "00-01" not in store


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    HiddenStore(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_others_write_is_seen_after_a_look(tmp_path: Path) -> None:
    ours, theirs = HiddenStore(tmp_path), HiddenStore(tmp_path)
    theirs.write(states(4))
    assert "00-00" not in ours
    ours.refresh()
    assert torch.equal(ours.read(["00-00"])[0], states(4)["00-00"])


def test_the_same_states_written_twice_are_there_once(tmp_path: Path) -> None:
    for store in (HiddenStore(tmp_path), HiddenStore(tmp_path)):
        store.write(states(4, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_states_that_are_a_part_of_something_larger_are_written_alone(tmp_path: Path) -> None:
    whole = torch.randn(9, 12)
    HiddenStore(tmp_path).write({"part": whole[2:5, ::2]})
    assert torch.equal(HiddenStore(tmp_path).read(["part"])[0], whole[2:5, ::2])
    assert only_file(tmp_path).stat().st_size < 500


def test_what_a_killed_writer_leaves_is_passed_over(tmp_path: Path) -> None:
    HiddenStore(tmp_path).write(states(4))
    path = only_file(tmp_path)
    torn = tmp_path / f".{path.name}.123.tmp"
    torn.write_bytes(path.read_bytes()[:40])
    assert "00-00" in HiddenStore(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path: Path, num_bytes: int) -> None:
    HiddenStore(tmp_path).write(states(4, 3))
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=rf"{path.name} is damaged .*; remove it and run the same"):
        HiddenStore(tmp_path)
    path.unlink()
    assert "00-00" not in HiddenStore(tmp_path)


def test_a_changed_byte_never_gives_other_states(tmp_path: Path) -> None:
    """Wherever it lies: an error, or the document counts as missing."""
    expected = states(4, 3, 6)
    HiddenStore(tmp_path / "whole").write(expected)
    content = only_file(tmp_path / "whole").read_bytes()
    random = Random(0)
    # A place is tried for each byte of the header, and a few of the states.
    places = [
        *range(len(content) - 300),
        *random.sample(range(len(content) - 300, len(content)), 40),
    ]
    num_errors = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << random.randrange(8)
        directory = tmp_path / "changed"
        directory.mkdir()
        (directory / "hidden-0.safetensors").write_bytes(changed)
        try:
            store = HiddenStore(directory)
            for key in filter(store.__contains__, expected):
                assert torch.equal(store.read([key])[0], expected[key])
        except DataError:
            num_errors += 1
        shutil.rmtree(directory)
    assert num_errors > 0.8 * len(places)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path)
    store.write(states(4))
    path = only_file(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        store.read(["00-00"])


def test_a_directory_of_something_else_is_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"model\.safetensors holds no hidden states; give a"):
        HiddenStore(tmp_path)


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "states"
    path.write_text("")
    with pytest.raises(RunError, match="states is no directory; give another --hidden-cache"):
        HiddenStore(path)


def test_a_failed_write_names_the_file_and_keeps_what_was_there(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path)
    store.write(states(4))
    before, limits = only_file(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"hidden-\w+\.safetensors cannot be written: File too"):
            store.write(states(400, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "01-00" not in store
    assert only_file(tmp_path) == before
