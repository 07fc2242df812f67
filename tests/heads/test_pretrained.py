"""The heads that ship: whole, small, and of the kind that their directory says."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import heads
from heads.tree_search import AcceptanceProfile

PRETRAINED = Path(heads.__path__[0]) / "pretrained"
MIB = 1 << 20


@pytest.mark.parametrize("kind", ["medusa", "mtp"])
def test_shipped_heads_are_whole_and_small(kind: str) -> None:
    directory = PRETRAINED / f"smollm2-{kind}"
    config = json.loads((directory / "config.json").read_bytes())
    assert config["type"] == kind
    assert config["base"]["name"] == "smollm2"
    for name, digest in config["sha256"].items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
    assert set(config["sha256"]) == {"heads.safetensors", "acceptance_profile.json"}
    assert sum(path.stat().st_size for path in directory.iterdir()) < 10 * MIB
    tensors = safetensors.torch.load_file(directory / "heads.safetensors")
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())
    assert len(tensors["draft_vocab_ids"]) == 4096


@pytest.mark.parametrize("kind", ["medusa", "mtp"])
def test_their_profile_covers_four_depths(kind: str) -> None:
    path = PRETRAINED / f"smollm2-{kind}" / "acceptance_profile.json"
    profile = AcceptanceProfile.from_json(json.loads(path.read_bytes()))
    assert profile.max_depth == 4
    assert profile.accept_rates_KR[0][0] > 0.3
