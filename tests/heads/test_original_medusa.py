import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.errors import HeadsCheckpointError
from heads.original_medusa import load_original_heads

VOCAB, WIDTH, HEADS, BLOCKS = 30, 8, 3, 2


class ResBlock(nn.Module):
    """As the original has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def original(shared: bool) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(
            *(ResBlock() for _ in range(BLOCKS)),
            *([] if shared else [nn.Linear(WIDTH, VOCAB, bias=False)]),
        )
        for _ in range(HEADS)
    )


UNEMBEDDING = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5))


def save(directory: Path, tensors: dict[str, Tensor], suffix: str = ".pt") -> Path:
    sizes = {"medusa_num_heads": HEADS, "medusa_num_layers": BLOCKS, "version": "2"}
    (directory / "config.json").write_text(json.dumps(sizes))
    path = directory / f"medusa_lm_head{suffix}"
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return path


def load(directory: Path) -> nn.Module:
    return load_original_heads(directory, UNEMBEDDING, UNEMBEDDING)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_drafts_are_those_of_the_original_modules(
    shared: bool, suffix: str, prefix: str, tmp_path: Path
) -> None:
    modules = original(shared)
    tensors = {prefix + name: value for name, value in modules.state_dict().items()}
    save(tmp_path, tensors, suffix)
    heads = load_original_heads(tmp_path, UNEMBEDDING, UNEMBEDDING)
    assert heads.config.own_unembedding is not shared
    hidden, roots = torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4])
    logits = torch.stack(
        [module(hidden) @ UNEMBEDDING.T if shared else module(hidden) for module in modules]
    )
    with torch.no_grad():
        found = heads.draft_logits(heads(hidden, roots))
        assert torch.allclose(found, logits, atol=1e-5)
        candidates = heads.propose(hidden, roots, 5, [heads.seen_rows([1, 29])] * 4)
    expected = logits.log_softmax(2).topk(5)
    assert torch.equal(candidates.token_ids_BKR, expected.indices.transpose(0, 1))
    assert torch.allclose(candidates.log_probs_BKR, expected.values.transpose(0, 1), atol=1e-5)
    for head in range(HEADS):
        rows = UNEMBEDDING if shared else modules[head][-1].weight  # type: ignore[index]
        assert torch.equal(heads.draft_rows(head), rows)


def test_a_missing_or_surplus_entry_is_named(tmp_path: Path) -> None:
    tensors = dict(original(False).state_dict())
    save(tmp_path, {k: v for k, v in tensors.items() if k != "1.0.linear.bias"})
    with pytest.raises(HeadsCheckpointError, match=r"lacks '1\.0\.linear\.bias'"):
        load(tmp_path)
    save(tmp_path, tensors | {"9.0.linear.bias": torch.zeros(1)})
    with pytest.raises(HeadsCheckpointError, match=r"unknown entry '9\.0\.linear\.bias'"):
        load(tmp_path)
    save(tmp_path, {k: v for k, v in tensors.items() if k != "1.2.weight"})
    with pytest.raises(HeadsCheckpointError, match="vocabulary matrices for 2 of 3 heads"):
        load(tmp_path)


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    save(tmp_path, dict(original(True).state_dict()))
    wide = torch.zeros(VOCAB, 16)
    with pytest.raises(HeadsCheckpointError, match=r"has shape \(8, 8\).*asks for \(16, 16\)"):
        load_original_heads(tmp_path, wide, wide)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


def test_a_pickle_that_holds_more_than_weights_is_not_run(tmp_path: Path) -> None:
    path = save(tmp_path, {})
    torch.save({"0.0.linear.weight": _Evil()}, path)
    with pytest.raises(HeadsCheckpointError, match="damaged or holds more than weights"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_cut_short_is_refused(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path, OrderedDict(original(True).state_dict()), suffix)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(HeadsCheckpointError, match="damaged"):
        load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(HeadsCheckpointError, match="damaged"):
        load(tmp_path)


def test_something_else_than_a_state_dict_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {})
    for content in ([torch.zeros(1)], {0: torch.zeros(1)}, {"0.0.linear.bias": 1}):
        torch.save(content, path)
        with pytest.raises(HeadsCheckpointError, match="no state dict"):
            load(tmp_path)


def test_what_is_ambiguous_is_refused(tmp_path: Path) -> None:
    tensors = dict(original(True).state_dict())
    save(tmp_path, tensors | {f"medusa_head.{name}": value for name, value in tensors.items()})
    with pytest.raises(HeadsCheckpointError, match="both with and without"):
        load(tmp_path)
    save(tmp_path, tensors, ".safetensors")
    with pytest.raises(HeadsCheckpointError, match="has 2 of the files"):
        load(tmp_path)


def test_quantised_weights_and_wrong_matrices_are_refused(tmp_path: Path) -> None:
    tensors = dict(original(False).state_dict())
    save(tmp_path, tensors | {"1.0.linear.bias": torch.zeros(WIDTH, dtype=torch.int8)})
    with pytest.raises(HeadsCheckpointError, match=r"'1\.0\.linear\.bias' is of type torch\.int8"):
        load(tmp_path)
    save(tmp_path, tensors | {"2.2.weight": torch.zeros(VOCAB + 1, WIDTH)})
    with pytest.raises(HeadsCheckpointError, match=r"'2\.2\.weight' has shape \(31, 8\)"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeadsCheckpointError, match=r"config\.json cannot be read"):
        load(tmp_path)
    save(tmp_path, {}).unlink()
    with pytest.raises(HeadsCheckpointError, match=r"has 0 of the files medusa_lm_head"):
        load(tmp_path)


@pytest.mark.parametrize("value", [None, 0, "3", True])
def test_a_config_without_sizes_is_refused(value: object, tmp_path: Path) -> None:
    save(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": value}))
    with pytest.raises(HeadsCheckpointError, match="medusa_num_heads = "):
        load(tmp_path)
