from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from heads.medusa import MedusaHeads
from tests.support.engine_tools import random_heads
from training.errors import RunError
from training.loop.run_state import STATE_FILE, Best, Progress, RunRecord, load_state, save_state

OPTIONS: dict[str, object] = {"learning_rate": 0.1, "sizes": (1, 2)}


def fresh() -> tuple[MedusaHeads, torch.optim.Optimizer]:
    heads = random_heads(20)
    return heads, torch.optim.AdamW(heads.parameters(), lr=0.1)


def take_step(heads: MedusaHeads, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_a_run_that_is_resumed_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    heads, optimizer = fresh()
    take_step(heads, optimizer, seed=1)
    save_state(RunRecord(tmp_path, OPTIONS), heads, optimizer, Progress(1, 64))
    other_heads, other_optimizer = fresh()
    found = load_state(RunRecord(tmp_path, OPTIONS), other_heads, other_optimizer)
    assert found == Progress(1, 64)
    for pair in ((heads, optimizer), (other_heads, other_optimizer)):
        take_step(*pair, seed=2)
    for ours, expected in zip(other_heads.parameters(), heads.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_the_best_weights_are_kept_as_well_as_the_present_ones(tmp_path: Path) -> None:
    heads, optimizer = fresh()
    weights = {name: torch.full_like(p, 7.0).detach() for name, p in heads.named_parameters()}
    best = Best(3, 1.25, weights)
    save_state(RunRecord(tmp_path, OPTIONS), heads, optimizer, Progress(5, 64, best=best))
    found = load_state(RunRecord(tmp_path, OPTIONS), *fresh())
    assert found is not None
    assert found.best is not None
    assert (found.step, found.best.step, found.best.length) == (5, 3, 1.25)
    assert found.best.weights.keys() == weights.keys()
    assert all(torch.equal(found.best.weights[name], weights[name]) for name in weights)


def test_without_a_state_nothing_is_set(tmp_path: Path) -> None:
    heads, optimizer = fresh()
    before = [parameter.clone() for parameter in heads.parameters()]
    assert load_state(RunRecord(tmp_path, OPTIONS), heads, optimizer) is None
    assert all(map(torch.equal, before, heads.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.2, "sizes": (1, 2)}, "learning_rate 0.1, but now it is 0.2"),
        ({"sizes": (1, 2)}, "learning_rate 0.1, but now it is None"),
        ({**OPTIONS, "extra": 3}, "extra None, but now it is 3"),
    ],
)
def test_other_options_are_an_error_with_name_and_values(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    heads, optimizer = fresh()
    save_state(RunRecord(tmp_path, OPTIONS), heads, optimizer, Progress(1, 64))
    with pytest.raises(RunError, match=message):
        load_state(RunRecord(tmp_path, options), heads, optimizer)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: safetensors.torch.save({"heads.x": torch.ones(1)}),
        lambda data: safetensors.torch.save({}, {"kind": "euryale-training-state-3"}),
    ],
    ids=["truncated", "empty", "no-metadata", "no-step"],
)
def test_a_damaged_state_is_an_error_with_a_remedy(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    heads, optimizer = fresh()
    save_state(RunRecord(tmp_path, OPTIONS), heads, optimizer, Progress(1, 64))
    path = tmp_path / STATE_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"is no state of a training run .*remove it to start over"):
        load_state(RunRecord(tmp_path, OPTIONS), heads, optimizer)


def test_a_state_of_heads_of_another_shape_is_an_error(tmp_path: Path) -> None:
    heads, optimizer = fresh()
    take_step(heads, optimizer, seed=1)
    save_state(RunRecord(tmp_path, OPTIONS), heads, optimizer, Progress(1, 64))
    other = random_heads(20, num_heads=5)
    with pytest.raises(RunError, match="does not fit the heads"):
        load_state(RunRecord(tmp_path, OPTIONS), other, torch.optim.AdamW(other.parameters()))


def test_a_state_of_version_3_is_read_under_todays_names(tmp_path: Path) -> None:
    heads, optimizer = fresh()
    take_step(heads, optimizer, seed=1)
    weights = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    record = RunRecord(tmp_path, {"num_layers": 1})
    save_state(record, heads, optimizer, Progress(1, 64, best=Best(1, 1.5, weights)))
    path = tmp_path / STATE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["kind"] = "euryale-training-state-3"
    metadata["options"] = '{"num_blocks": 1, "option_of_another_method": 7}'
    tensors = {
        name.replace("layer_", "block_"): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path, metadata)
    other, other_optimizer = fresh()
    found = load_state(record, other, other_optimizer)
    assert found is not None
    assert found.best is not None
    assert found.best.weights.keys() == weights.keys()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, weights[name])
    with pytest.raises(RunError, match="num_layers 1, but now it is 2"):
        load_state(RunRecord(tmp_path, {"num_layers": 2}), *fresh())
