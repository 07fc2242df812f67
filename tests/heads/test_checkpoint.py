import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from heads.checkpoint import (
    BaseFingerprint,
    LoadedHeads,
    load_adapter,
    load_heads,
    save_heads,
)
from heads.errors import HeadsCheckpointError, HeadsMismatchError
from heads.kinds import BaseParts
from heads.lora import AdapterFiles
from heads.medusa import MedusaConfig, MedusaHeads
from heads.mtp import MTPConfig, MTPModule
from heads.tree_search import AcceptanceProfile

WIDTH, VOCAB_SIZE = 8, 30
CPU = torch.device("cpu")
DRAFT_VOCAB = torch.tensor([4, 0, 29, 7])
PROFILE = AcceptanceProfile(((0.5, 0.25), (0.125, 0.0)))


def tiny_base(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unembedding = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        return nn.Sequential(nn.Embedding(VOCAB_SIZE, WIDTH), unembedding)


def fingerprint(base: nn.Module, **layout: Any) -> BaseFingerprint:
    arguments: dict[str, Any] = {
        "model_type": "tiny",
        "num_layers": 2,
        "hidden_size": WIDTH,
        "vocab_size": VOCAB_SIZE,
    }
    return BaseFingerprint.of(**(arguments | layout), parameters=base.named_parameters())


def matrix(base: nn.Sequential, index: int) -> Tensor:
    weight = base[index].weight
    assert isinstance(weight, Tensor)
    return weight


def make_heads(base: nn.Sequential, restricted: bool = True, **options: Any) -> MedusaHeads:
    config = MedusaConfig(
        WIDTH,
        VOCAB_SIZE,
        num_heads=2,
        draft_vocab_size=len(DRAFT_VOCAB) if restricted else None,
        **options,
    )
    ids = DRAFT_VOCAB if restricted else None
    heads = MedusaHeads(config, matrix(base, 1), matrix(base, 0), ids)
    for parameter in heads.parameters():
        # Rounded, so that a checkpoint in bfloat16 brings the same values back.
        nn.init.normal_(parameter)
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return heads


class Block(nn.Linear):
    """Stands for a decoder block."""


def make_block() -> nn.Module:
    return Block(WIDTH, WIDTH)


def make_module(base: nn.Sequential) -> MTPModule:
    config = MTPConfig(WIDTH, VOCAB_SIZE, len(DRAFT_VOCAB))
    module = MTPModule(config, make_block(), matrix(base, 1), matrix(base, 0), DRAFT_VOCAB)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return module


def load(directory: Path, model: nn.Sequential, **changes: Any) -> LoadedHeads:
    arguments: dict[str, Any] = {
        "parts": BaseParts(matrix(model, 1), matrix(model, 0), make_block),
        "base": fingerprint(model),
        "device": CPU,
        "dtype": torch.float32,
    }
    return load_heads(directory, **(arguments | changes))


def load_medusa(directory: Path, model: nn.Sequential, **changes: Any) -> MedusaHeads:
    heads = load(directory, model, **changes).heads
    assert isinstance(heads, MedusaHeads)
    return heads


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint for the tiny base with seed 0."""
    base = tiny_base()
    save_heads(tmp_path / "heads", make_heads(base), fingerprint(base), "acme/tiny", PROFILE)
    return tmp_path / "heads"


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


class TestFingerprint:
    def test_a_base_is_its_own_match(self) -> None:
        assert fingerprint(tiny_base()).difference(fingerprint(tiny_base())) is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_base_in_half_precision_is_the_same_base(self, dtype: torch.dtype) -> None:
        full, half = fingerprint(tiny_base()), fingerprint(tiny_base().to(dtype))
        assert full.difference(half) is None
        assert half.difference(full) is None

    def test_the_order_of_the_parameters_does_not_matter(self) -> None:
        parameters = list(tiny_base().named_parameters())
        layout = ("tiny", 2, WIDTH, VOCAB_SIZE)
        forwards = BaseFingerprint.of(*layout, parameters)
        assert BaseFingerprint.of(*layout, parameters[::-1]) == forwards

    @pytest.mark.parametrize(
        ("name", "value"),
        [("model_type", "huge"), ("num_layers", 3), ("hidden_size", 9), ("vocab_size", 31)],
    )
    def test_another_layout_is_named(self, name: str, value: Any) -> None:
        mine, theirs = fingerprint(tiny_base()), fingerprint(tiny_base(), **{name: value})
        assert mine.difference(theirs) == f"{name} is {getattr(mine, name)} against {value}"

    def test_other_weights_are_counted_and_shown(self) -> None:
        difference = fingerprint(tiny_base(0)).difference(fingerprint(tiny_base(1)))
        assert difference is not None
        assert "of 8 sampled weights differ, the first is" in difference

    def test_another_number_of_weights_is_a_difference(self) -> None:
        mine = fingerprint(tiny_base())
        theirs = fingerprint(nn.Sequential(*tiny_base(), nn.Linear(2, 2)))
        assert mine.difference(theirs) == "8 weights were sampled against 14"

    def test_a_weight_that_is_no_number_is_a_difference(self) -> None:
        broken = tiny_base()
        with torch.no_grad():
            matrix(broken, 1).fill_(torch.nan)
        assert fingerprint(broken).difference(fingerprint(broken)) is not None

    def test_a_large_model_is_sampled_in_256_places(self) -> None:
        parameters = [(f"layer.{index}", torch.randn(10, 10)) for index in range(500)]
        taken = BaseFingerprint.of("tiny", 500, 10, 10, parameters)
        assert len(taken.samples) == 256
        assert len(set(taken.samples)) == 256

    def test_small_and_empty_parameters_are_fine(self) -> None:
        parameters = [("a", torch.tensor(2.0)), ("b", torch.zeros(0)), ("c", torch.ones(3))]
        assert BaseFingerprint.of("tiny", 1, 1, 1, parameters).samples == (2.0, 1.0, 1.0, 1.0)


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("restricted", "options"),
        [
            (True, {}),
            (False, {}),
            (True, {"root_conditioned": False, "num_layers": 2}),
            (False, {"root_conditioned": False, "num_layers": 2}),
            (False, {"own_unembedding": True}),
        ],
    )
    def test_heads_come_back_as_they_were(
        self, tmp_path: Path, restricted: bool, options: dict[str, Any]
    ) -> None:
        base = tiny_base()
        heads = make_heads(base, restricted, **options)
        save_heads(tmp_path, heads, fingerprint(base), "acme/tiny", PROFILE)
        loaded = load(tmp_path, base)
        assert loaded.heads.config == heads.config
        assert loaded.base_name == "acme/tiny"
        assert loaded.profile == PROFILE
        assert not loaded.heads.training
        before, after = heads.state_dict(), loaded.heads.state_dict()
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
        hidden_BD, roots_B = torch.randn(2, WIDTH), torch.tensor([1, 2])
        expected = heads.propose(hidden_BD, roots_B, 3, [None, None])
        proposed = loaded.heads.propose(hidden_BD, roots_B, 3, [None, None])
        assert torch.equal(proposed.token_ids_BKR, expected.token_ids_BKR)

    def test_heads_saved_before_there_were_own_matrices_load(self, saved: Path) -> None:
        path = saved / "config.json"
        config = json.loads(path.read_text())
        del config["heads"]["own_unembedding"]
        path.write_text(json.dumps(config))
        assert not load_medusa(saved, tiny_base()).config.own_unembedding

    def test_heads_saved_when_layers_were_called_blocks_load(self, saved: Path) -> None:
        heads = load_medusa(saved, tiny_base())
        tensors = safetensors.torch.load_file(saved / "heads.safetensors")
        for name in ("weights", "biases"):
            tensors[f"block_{name}"] = tensors.pop(f"layer_{name}")
        path = saved / "config.json"
        config = json.loads(path.read_text())
        config["heads"]["num_blocks"] = config["heads"].pop("num_layers")
        data = safetensors.torch.save(tensors)
        (saved / "heads.safetensors").write_bytes(data)
        config["sha256"]["heads.safetensors"] = hashlib.sha256(data).hexdigest()
        path.write_text(json.dumps(config))
        former = load_medusa(saved, tiny_base())
        assert former.config == heads.config
        for name, weight in heads.state_dict().items():
            assert torch.equal(former.state_dict()[name], weight)

    def test_a_checkpoint_is_three_files(self, saved: Path) -> None:
        names = sorted(path.name for path in saved.iterdir())
        assert names == ["acceptance_profile.json", "config.json", "heads.safetensors"]

    def test_weights_are_stored_as_bfloat16_and_ids_as_int32(self, saved: Path) -> None:
        tensors = safetensors.torch.load_file(saved / "heads.safetensors")
        assert tensors["layer_weights"].dtype == torch.bfloat16
        assert tensors["draft_vocab_ids"].dtype == torch.int32

    def test_weights_can_be_stored_in_full(self, tmp_path: Path) -> None:
        base = tiny_base()
        heads = make_heads(base)
        nn.init.normal_(heads.layer_weights)
        save_heads(tmp_path, heads, fingerprint(base), "tiny", None, torch.float32)
        assert torch.equal(load_medusa(tmp_path, base).layer_weights, heads.layer_weights)

    def test_heads_load_in_the_type_that_is_asked_for(self, saved: Path) -> None:
        heads = load(saved, tiny_base(), dtype=torch.bfloat16).heads
        assert heads.layer_weights.dtype == torch.bfloat16
        assert heads.draft_rows_UD.dtype == torch.bfloat16

    def test_a_profile_is_optional(self, tmp_path: Path) -> None:
        base = tiny_base()
        save_heads(tmp_path, make_heads(base), fingerprint(base), "tiny", None)
        assert load(tmp_path, base).profile is None

    def test_saving_again_replaces_all_and_leaves_other_files(self, saved: Path) -> None:
        base = tiny_base()
        (saved / "train.log").write_text("loss 1.0")
        heads = make_heads(base, restricted=False)
        save_heads(saved, heads, fingerprint(base), "acme/tiny-2", None)
        loaded = load(saved, base)
        assert (loaded.base_name, loaded.profile) == ("acme/tiny-2", None)
        loaded_heads = loaded.heads
        assert isinstance(loaded_heads, MedusaHeads)
        assert torch.equal(loaded_heads.layer_weights, heads.layer_weights)
        names = sorted(path.name for path in saved.iterdir())
        assert names == ["config.json", "heads.safetensors", "train.log"]

    def test_the_config_says_what_the_heads_are(self, saved: Path) -> None:
        config = load(saved, tiny_base()).config
        assert config == config_of(saved)
        assert config["format"] == "euryale-heads"
        assert config["type"] == "medusa"
        assert config["heads"]["draft_vocab_size"] == 4


class TestMismatch:
    def test_heads_of_another_base_are_refused_and_both_are_named(self, saved: Path) -> None:
        other = tiny_base(seed=1)
        with pytest.raises(HeadsMismatchError) as caught:
            load(saved, other)
        message = str(caught.value)
        assert "trained for acme/tiny (tiny, 2 layers, width 8, vocabulary 30)" in message
        assert "the loaded base model is another one (tiny, 2 layers" in message
        assert "sampled weights differ" in message

    def test_heads_of_another_size_are_refused_before_their_weights_are_read(
        self, saved: Path
    ) -> None:
        (saved / "heads.safetensors").unlink()
        base = tiny_base()
        with pytest.raises(HeadsMismatchError, match="num_layers is 2 against 12"):
            load(saved, base, base=fingerprint(base, num_layers=12))

    def test_matrices_that_are_not_the_fingerprinted_ones_are_refused(self, saved: Path) -> None:
        base = tiny_base()
        with pytest.raises(HeadsCheckpointError, match="unembedding_VD has shape"):
            load(saved, base, parts=BaseParts(torch.zeros(31, WIDTH), matrix(base, 0)))


class TestDamage:
    @pytest.mark.parametrize("name", ["config.json", "heads.safetensors"])
    def test_a_missing_file_is_named(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(HeadsCheckpointError, match=f"{name} cannot be read"):
            load(saved, tiny_base())

    def test_a_missing_directory_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(HeadsCheckpointError, match="give the directory of a heads checkpoint"):
            load(tmp_path / "nowhere", tiny_base())

    @pytest.mark.parametrize("name", ["heads.safetensors", "acceptance_profile.json"])
    @pytest.mark.parametrize("kept_share", [0.0, 0.5, 0.99])
    def test_a_truncated_file_is_noticed(self, saved: Path, name: str, kept_share: float) -> None:
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[: int(kept_share * len(data))])
        with pytest.raises(HeadsCheckpointError, match=f"{name} is damaged or incomplete"):
            load(saved, tiny_base())

    def test_a_truncated_config_is_noticed(self, saved: Path) -> None:
        text = (saved / "config.json").read_text()
        (saved / "config.json").write_text(text[: len(text) // 2])
        with pytest.raises(HeadsCheckpointError, match=r"config\.json cannot be read"):
            load(saved, tiny_base())

    def test_weights_of_another_save_are_noticed(self, saved: Path, tmp_path: Path) -> None:
        # As after a crash between the two files of a second save.
        base = tiny_base()
        save_heads(tmp_path / "other", make_heads(base), fingerprint(base), "tiny", None)
        (tmp_path / "other" / "heads.safetensors").replace(saved / "heads.safetensors")
        with pytest.raises(HeadsCheckpointError, match="is damaged or incomplete"):
            load(saved, base)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}', '"euryale-heads"'])
    def test_other_json_is_no_checkpoint(self, saved: Path, text: str) -> None:
        (saved / "config.json").write_text(text)
        with pytest.raises(HeadsCheckpointError, match="is not a heads checkpoint"):
            load(saved, tiny_base())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "format_version 2 .* reads version 1"),
            ({"type": "eagle"}, "type 'eagle'; this release reads .* medusa, mtp"),
            ({"notes": "hi"}, "exactly .* are known"),
            ({"sha256": []}, "exactly .* are known"),
            ({"sha256": {}}, "is damaged or incomplete"),
            ({"base": None}, "is malformed"),
            ({"base": {"name": "x"}}, "is malformed"),
            ({"base": {"name": "x", "fingerprint": {"samples": []}}}, "is malformed"),
            ({"heads": {"hidden_size": 8}}, "exactly .* are known"),
            ({"heads": None}, "exactly .* are known"),
        ],
    )
    def test_what_is_unknown_or_malformed_is_named(
        self, saved: Path, changes: dict[str, Any], message: str
    ) -> None:
        change_config(saved, **changes)
        with pytest.raises(HeadsCheckpointError, match=message):
            load(saved, tiny_base())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_heads": 0}, "num_heads is 0"),
            ({"num_heads": "two"}, "cannot be loaded"),
            ({"num_heads": 3}, "size mismatch for layer_weights"),
            ({"root_conditioned": False}, "Unexpected key"),
            ({"draft_vocab_size": None}, "draft_vocab_size is None"),
            ({"draft_vocab_size": 5}, "one id for each of the 5"),
        ],
    )
    def test_sizes_that_the_weights_do_not_have_are_refused(
        self, saved: Path, changes: dict[str, Any], message: str
    ) -> None:
        change_config(saved, heads=config_of(saved)["heads"] | changes)
        with pytest.raises(HeadsCheckpointError, match=message):
            load(saved, tiny_base())


class TestMTPModule:
    @pytest.fixture
    def saved_module(self, tmp_path: Path) -> Path:
        base = tiny_base()
        module, directory = make_module(base), tmp_path / "module"
        save_heads(directory, module, fingerprint(base), "acme/tiny", PROFILE)
        return directory

    def test_it_comes_back_with_its_block_and_its_profile(self, tmp_path: Path) -> None:
        base = tiny_base()
        module = make_module(base)
        save_heads(tmp_path, module, fingerprint(base), "acme/tiny", PROFILE)
        assert config_of(tmp_path)["type"] == "mtp"
        assert config_of(tmp_path)["heads"]["block"] == "Block"
        loaded = load(tmp_path, base)
        assert isinstance(loaded.heads, MTPModule)
        assert loaded.heads.config == module.config
        assert loaded.profile == PROFILE
        assert not loaded.heads.training
        before, after = module.state_dict(), loaded.heads.state_dict()
        assert before.keys() == after.keys()
        assert "block.weight" in after
        assert all(torch.equal(before[name], after[name]) for name in before)
        states, tokens = torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4])
        expected = module(states, tokens, module.block)
        assert torch.equal(loaded.heads(states, tokens, loaded.heads.block), expected)

    def test_all_of_it_comes_in_the_asked_dtype(self, saved_module: Path) -> None:
        module = load(saved_module, tiny_base(), dtype=torch.bfloat16).heads
        assert isinstance(module, MTPModule)
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert module.draft_rows_UD.dtype == torch.bfloat16
        assert module.draft_vocab_ids.dtype == torch.int64

    def test_a_block_of_another_class_is_named(self, saved_module: Path) -> None:
        base = tiny_base()
        parts = BaseParts(matrix(base, 1), matrix(base, 0), lambda: nn.Linear(WIDTH, WIDTH))
        with pytest.raises(HeadsCheckpointError, match=r"its block is a Block, .* of class Linear"):
            load(saved_module, base, parts=parts)

    def test_without_a_block_it_is_refused(self, saved_module: Path) -> None:
        base = tiny_base()
        with pytest.raises(HeadsCheckpointError, match="needs a decoder block of its base"):
            load(saved_module, base, parts=BaseParts(matrix(base, 1), matrix(base, 0)))

    def test_a_block_of_another_shape_is_refused(self, saved_module: Path) -> None:
        base = tiny_base()
        parts = BaseParts(matrix(base, 1), matrix(base, 0), lambda: Block(WIDTH, WIDTH, bias=False))
        with pytest.raises(HeadsCheckpointError, match=r"block\.bias"):
            load(saved_module, base, parts=parts)

    @pytest.mark.parametrize(
        "sizes", [{"hidden_size": 8, "block": "Block"}, ["Block"], {"block": "Block", "x": 1}]
    )
    def test_sizes_that_are_unknown_or_missing_are_refused(
        self, saved_module: Path, sizes: object
    ) -> None:
        change_config(saved_module, heads=sizes)
        with pytest.raises(HeadsCheckpointError, match=r"exactly .*'vocab_size'.* are known"):
            load(saved_module, tiny_base())

    def test_a_module_without_draft_vocabulary_is_refused(self, saved_module: Path) -> None:
        path = saved_module / "heads.safetensors"
        tensors = safetensors.torch.load_file(path)
        del tensors["draft_vocab_ids"]
        path.write_bytes(safetensors.torch.save(tensors))
        digests = config_of(saved_module)["sha256"]
        digests["heads.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
        change_config(saved_module, sha256=digests)
        with pytest.raises(HeadsCheckpointError, match="draft_vocab_ids are missing"):
            load(saved_module, tiny_base())

    def test_medusa_heads_need_no_block(self, saved: Path) -> None:
        base = tiny_base()
        parts = BaseParts(matrix(base, 1), matrix(base, 0))
        assert isinstance(load(saved, base, parts=parts).heads, MedusaHeads)


class TestInterruptedSave:
    def test_a_first_save_that_fails_leaves_nothing_that_loads(self, tmp_path: Path) -> None:
        base = tiny_base()
        (tmp_path / "config.json").mkdir()
        with pytest.raises(OSError, match=r"config\.json"):
            save_heads(tmp_path, make_heads(base), fingerprint(base), "tiny", None)
        with pytest.raises(HeadsCheckpointError):
            load(tmp_path, base)
        assert not list(tmp_path.glob(".*"))


class TestAdapter:
    FILES = AdapterFiles(b"{}", b"weights")

    @pytest.fixture
    def with_adapter(self, tmp_path: Path) -> Path:
        base = tiny_base()
        heads, directory = make_heads(base), tmp_path / "heads"
        save_heads(directory, heads, fingerprint(base), "acme/tiny", None, adapter=self.FILES)
        return directory

    def test_it_comes_back_byte_by_byte(self, with_adapter: Path) -> None:
        assert load(with_adapter, tiny_base()).adapter == self.FILES
        assert load_adapter(with_adapter, fingerprint(tiny_base())) == self.FILES

    def test_heads_without_one_have_none(self, saved: Path) -> None:
        assert load(saved, tiny_base()).adapter is None
        assert load_adapter(saved, fingerprint(tiny_base())) is None

    def test_heads_that_are_saved_again_without_it_lose_its_files(self, with_adapter: Path) -> None:
        base = tiny_base()
        save_heads(with_adapter, make_heads(base), fingerprint(base), "acme/tiny", None)
        assert load(with_adapter, base).adapter is None
        assert list((with_adapter / "adapter").iterdir()) == []

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_missing_or_changed_file_is_named(self, with_adapter: Path, name: str) -> None:
        path = with_adapter / "adapter" / name
        path.write_bytes(b"other")
        with pytest.raises(HeadsCheckpointError, match=rf"{name} is damaged"):
            load(with_adapter, tiny_base())
        path.unlink()
        with pytest.raises(HeadsCheckpointError, match=rf"{name} cannot be read"):
            load_adapter(with_adapter, fingerprint(tiny_base()))

    def test_half_an_adapter_is_no_adapter(self, with_adapter: Path) -> None:
        digests = config_of(with_adapter)["sha256"]
        del digests["adapter/adapter_config.json"]
        change_config(with_adapter, sha256=digests)
        with pytest.raises(HeadsCheckpointError, match=r"adapter_config\.json is damaged"):
            load(with_adapter, tiny_base())

    def test_that_of_another_base_is_refused(self, with_adapter: Path) -> None:
        with pytest.raises(HeadsMismatchError, match="acme/tiny"):
            load_adapter(with_adapter, fingerprint(tiny_base(1)))

    def test_files_that_this_release_does_not_know_are_refused(self, saved: Path) -> None:
        change_config(saved, sha256=config_of(saved)["sha256"] | {"tower.safetensors": "0"})
        with pytest.raises(HeadsCheckpointError, match=r"lists the files \['tower"):
            load(saved, tiny_base())
