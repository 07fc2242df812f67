"""Building an engine from a configuration: files, sizes, refusals and the measured step cost."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.calibration import NUM_BINS, head_cell
from server.cache import CACHE_VARIABLE
from server.config import EngineConfig
from server.engine.engine import Engine
from server.errors import ConfigError, HeadsCheckpointError, HeadsMismatchError, ModelError
from server.model.draft_heads import DraftHeads
from tests.support.engine_tools import (
    SlowModel,
    assert_as_expected,
    heads_for,
    make_engine,
    make_request,
    random_prompt,
    tiny_loaded,
    wide_profile,
)
from tests.support.log_lines import LogLines
from tests.support.native_checkpoints import NativeName, save_native
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

# Layers x keys and values x KV heads x channels x tokens of a block x bytes of a float32.
BLOCK_BYTES = 3 * 2 * 2 * 8 * 4 * 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("heads") / "tiny-medusa")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(model_dir: Path, **options: Any) -> Engine:
    sizes: dict[str, Any] = {
        "model": str(model_dir),
        "heads": "none",
        "device": "cpu",
        "block_size": 4,
        "num_blocks": 32,
        "max_num_seqs": 4,
        "max_tokens_per_step": 64,
        "max_nodes": 8,
    }
    return Engine.from_config(EngineConfig(**(sizes | options)))


def assert_generates_as_the_oracle(engine: Engine) -> None:
    request = make_request(random_prompt(2, 9), max_tokens=12)
    expected = SlowModel().complete(request)
    assert_as_expected(engine.generate([request])[0], expected)


class TestModel:
    def test_a_checkpoint_directory_is_served(self, model_dir: Path) -> None:
        engine = build(model_dir)
        assert engine.model_name == str(model_dir)
        assert engine.heads_name is None
        assert_generates_as_the_oracle(engine)

    def test_a_missing_model_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="nowhere"):
            build(tmp_path / "nowhere")

    def test_each_stage_is_reported_and_the_step_cost_kept(
        self, model_dir: Path, heads_dir: Path, own_cache: Path, log: LogLines
    ) -> None:
        config = EngineConfig(
            model=str(model_dir), heads=str(heads_dir), device="cpu", num_blocks=16, max_nodes=4
        )
        engine = Engine.from_config(config)
        assert [line.split()[0] for line in log.take()] == ["loading"] * 2 + ["measuring"] * 3
        costs = engine.speculator.stats().costs
        assert costs is not None
        [kept] = (own_cache / "costs").iterdir()
        assert json.loads(kept.read_text())["costs"]["draft_s"] == costs.measured.draft_s

    @pytest.mark.usefixtures("_threads")
    def test_threads_are_set_before_the_model_runs(self, model_dir: Path) -> None:
        build(model_dir, num_threads=2)
        assert torch.get_num_threads() == 2


class TestHeads:
    def test_heads_of_this_model_are_loaded_and_leave_the_text_as_it_is(
        self, model_dir: Path, heads_dir: Path
    ) -> None:
        engine = build(model_dir, heads=str(heads_dir), tree_size=8)
        assert engine.heads_name == "tiny-medusa"
        assert engine.speculator.stats().costs is None, "a fixed tree needs no measurement"
        assert_generates_as_the_oracle(engine)
        assert engine.counters.num_draft_tokens > 0

    def test_an_automatic_tree_is_chosen_from_the_measured_cost(
        self, model_dir: Path, heads_dir: Path
    ) -> None:
        engine = build(model_dir, heads=str(heads_dir))
        costs = engine.speculator.stats().costs
        assert costs is not None
        assert costs.measured.draft_s > 0.0
        assert all(seconds > 0.0 for seconds in costs.measured.step_s)
        assert_generates_as_the_oracle(engine)

    def test_trees_start_from_the_calibration_that_the_heads_bring(self) -> None:
        loaded = tiny_loaded("llama")
        ratios_KC = ((0.5,) * NUM_BINS, (2.0,) * NUM_BINS)
        profile = replace(wide_profile(), calibration_KC=ratios_KC)
        draft = DraftHeads(heads_for(loaded), None, profile, "tiny")
        source = make_engine(draft=draft, tree_size=8).speculator.sources["medusa"]
        assert source.ratios[head_cell(1, 0.4)] == 0.5
        assert source.ratios[head_cell(2, 0.4)] == 2.0

    def test_heads_of_another_base_model_are_refused(self, heads_dir: Path, tmp_path: Path) -> None:
        other = save_tiny_model("llama", tmp_path, seed=1)
        with pytest.raises(HeadsMismatchError, match="tiny"):
            build(other, heads=str(heads_dir))

    def test_heads_of_another_architecture_are_refused(
        self, heads_dir: Path, tmp_path: Path
    ) -> None:
        other = save_tiny_model("qwen3", tmp_path)
        with pytest.raises(HeadsMismatchError):
            build(other, heads=str(heads_dir))

    def test_a_directory_that_is_missing_is_refused_with_the_alternatives(
        self, model_dir: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"no directory; give .*'auto', 'native' or 'none'"):
            build(model_dir, heads=str(tmp_path / "missing"))

    def test_a_directory_without_a_checkpoint_is_refused(
        self, model_dir: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(HeadsCheckpointError):
            build(model_dir, heads=str(tmp_path))

    @pytest.mark.parametrize("kind", ["medusa", "mtp"])
    def test_shipped_heads_that_do_not_exist_are_named(self, model_dir: Path, kind: str) -> None:
        config = EngineConfig(model=str(model_dir), heads=kind, num_blocks=8)
        with pytest.raises(ConfigError, match=f"heads is '{kind}', but none of that kind ship"):
            Engine.from_config(config)

    def test_auto_serves_other_models_without_heads(self, model_dir: Path) -> None:
        assert build(model_dir, heads="auto").heads_name is None


class TestNativeHeads:
    @pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe", "qwen2"])
    def test_the_models_own_mtp_layer_drafts_and_leaves_the_text_as_it_is(
        self, name: NativeName, tmp_path: Path
    ) -> None:
        save_native(name, tmp_path)
        requests = [make_request(random_prompt(seed, 9), max_tokens=12) for seed in range(3)]
        plain, drafting = (
            build(tmp_path, num_blocks=128),
            build(tmp_path, heads="native", tree_size=8, num_blocks=128),
        )
        assert (drafting.heads_name, plain.heads_name) == ("native", None)
        expected = [completion.token_ids for completion in plain.generate(requests)]
        found = [completion.token_ids for completion in drafting.generate(requests)]
        assert found == expected
        assert drafting.counters.num_draft_tokens > 0

    def test_its_step_cost_can_be_measured(self, tmp_path: Path) -> None:
        save_native("qwen3", tmp_path)
        costs = build(tmp_path, heads="native").speculator.stats().costs
        assert costs is not None
        assert costs.measured.draft_s > 0.0

    def test_a_model_that_ships_none_is_refused(self, model_dir: Path) -> None:
        with pytest.raises(ModelError, match="ships no native MTP layer"):
            build(model_dir, heads="native")


class TestCacheSize:
    def test_the_number_of_blocks_can_be_fixed(self, model_dir: Path) -> None:
        engine = build(model_dir, num_blocks=7)
        assert engine.blocks.num_blocks == 7
        assert engine.max_model_len == 28

    def test_bytes_make_as_many_whole_blocks_as_fit(self, model_dir: Path) -> None:
        engine = build(model_dir, num_blocks=None, kv_cache_bytes=10 * BLOCK_BYTES + 100)
        assert engine.blocks.num_blocks == 10

    def test_without_a_size_a_share_of_the_free_memory_is_taken(self, model_dir: Path) -> None:
        # Large blocks, so that the books of a tiny model's cache stay small.
        engine = build(model_dir, num_blocks=None, block_size=4096)
        assert engine.blocks.num_blocks >= 1
        assert engine.max_model_len == 512, "the model's own limit"

    def test_no_more_blocks_are_made_than_all_sequences_together_can_fill(
        self, model_dir: Path
    ) -> None:
        engine = build(model_dir, num_blocks=None, kv_cache_bytes=10_000 * BLOCK_BYTES)
        assert engine.blocks.num_blocks == 4 * 512 // 4

    def test_on_a_cpu_prompts_beside_streams_come_in_small_chunks(self, model_dir: Path) -> None:
        assert build(model_dir).config.max_prefill_tokens == 64
        assert build(model_dir, max_prefill_tokens=9).config.max_prefill_tokens == 9

    def test_less_than_one_block_is_refused(self, model_dir: Path) -> None:
        with pytest.raises(ConfigError, match=f"one block takes {BLOCK_BYTES}"):
            build(model_dir, num_blocks=None, kv_cache_bytes=BLOCK_BYTES - 1)

    def test_a_length_limit_can_be_lowered_but_not_raised(self, model_dir: Path) -> None:
        assert build(model_dir, max_model_len=100).max_model_len == 100
        with pytest.raises(ConfigError, match=r"max_model_len is 129, .* allow 128"):
            build(model_dir, max_model_len=129)
        with pytest.raises(ConfigError, match="allow 512"):
            build(model_dir, num_blocks=1000, max_model_len=513)

    @pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 1), (1, 2), (3, 1), (2, 4)])
    def test_the_step_cost_is_measured_in_the_smallest_cache(
        self, model_dir: Path, heads_dir: Path, num_blocks: int, block_size: int
    ) -> None:
        engine = build(
            model_dir, heads=str(heads_dir), num_blocks=num_blocks, block_size=block_size
        )
        assert engine.speculator.stats().costs is not None

    def test_the_step_cost_is_measured_for_a_model_of_few_positions(
        self, model_dir: Path, heads_dir: Path, tmp_path: Path
    ) -> None:
        short = save_tiny_model("llama", tmp_path)
        path = short / "config.json"
        config = json.loads(path.read_text()) | {"max_position_embeddings": 64}
        path.write_text(json.dumps(config))
        engine = build(short, heads=str(heads_dir), num_blocks=500)
        assert engine.max_model_len == 64
        assert_generates_as_the_oracle(engine)
