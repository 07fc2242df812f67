from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from bench.benches.setup import (
    engine_config,
    greedy,
    load_workload,
    speculation_off,
    speculation_on,
)
from bench.errors import BenchError
from bench.options import BenchOptions
from bench.workload.dialogues import SkippedTurn

OPTIONS = BenchOptions(command="acceptance", concurrency=8, max_nodes=32)


def test_the_shipped_prompts_are_the_default() -> None:
    workload = load_workload(BenchOptions(command="acceptance", limit=8))
    described = workload.describe(())
    assert (described["data"], described["num_rows"], described["num_prompts"]) == (
        "sample.jsonl",
        24,
        8,
    )
    assert len({c.category for c in workload.conversations}) == 8


def test_skipped_turns_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    workload = load_workload(BenchOptions(command="acceptance", data=path))
    described = workload.describe((SkippedTurn(1, 2, "too long"),))
    assert described["skipped"] == [{"line": 1, "turn": 2, "reason": "too long"}]
    assert described["data"] == "rows.jsonl"
    assert len(described["data_sha256"]) == 64


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot read"):
        load_workload(BenchOptions(command="acceptance", data=tmp_path / "none"))


def test_a_step_has_room_for_full_trees_of_all_requests() -> None:
    config = engine_config(OPTIONS, tree_size=32)
    room_for_trees = config.max_tokens_per_step * 3 // 4
    assert room_for_trees // OPTIONS.concurrency >= 32
    assert config.max_num_seqs == 8


def test_a_bench_has_a_tree_size_of_its_own() -> None:
    assert engine_config(OPTIONS, tree_size=32).tree_size == 32
    assert engine_config(OPTIONS, tree_size="auto").tree_size == "auto"


@pytest.mark.parametrize("tree_size", ["auto", 8])
def test_a_tree_size_that_was_asked_for_comes_before_the_benchs_own(
    tree_size: Literal["auto"] | int,
) -> None:
    options = replace(OPTIONS, tree_size=tree_size)
    assert engine_config(options, tree_size="auto").tree_size == tree_size
    assert engine_config(options, tree_size=32).tree_size == tree_size


def test_no_run_reuses_an_earlier_prompt() -> None:
    assert not engine_config(OPTIONS, tree_size="auto").prefix_caching


def test_options_reach_the_engine() -> None:
    options = BenchOptions(
        command="latency",
        model="m",
        heads="h",
        device="cpu",
        dtype="bfloat16",
        quantization="int8",
        compile="off",
        num_threads=2,
    )
    config = engine_config(options, tree_size="auto")
    assert (config.model, config.heads, config.device, config.dtype) == (
        "m",
        "h",
        "cpu",
        "bfloat16",
    )
    assert (config.compile, config.quantization) == ("off", "int8")
    assert (config.num_threads, config.tree_size, config.max_num_seqs) == (2, "auto", 1)
    assert engine_config(options, tree_size="auto", dtype="float32").dtype == "float32"


def test_requests_are_greedy_and_speculate_as_asked() -> None:
    assert greedy(OPTIONS).is_greedy
    assert greedy(OPTIONS).max_tokens == 128
    assert speculation_on(OPTIONS).max_nodes == 32
    assert speculation_off().method == "none"
